"""VeRA: two random matrices for the whole model, scaled by trained vectors at each matrix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_

from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.tensors import Param, constant, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class VeRA(Weight):
    """Two frozen random matrices that all chosen matrices share, scaled by vectors of each.

        y = x W^T + c + s * (((drop(x) A^T) (.) d) B^T) (.) b

    with c the bias, d (r) and b (out) trained. A (r, largest in) and B (largest out, r) are drawn
    once, Kaiming-uniform, from `seed`; a matrix has the first `in` columns of A and the first `out`
    rows of B. d = `start` and b = 0 at first, so the model starts unchanged. r may be above the
    rank of a matrix: it costs as many scalars. Trainable: the sum over matrices of r + out; A and B
    are saved beside them. Merges exactly.

    Source: Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023,
    arXiv:2310.11454, eq. 2.
    Differs: matrices of several shapes have slices of one pair A and B, as in PEFT. Each role of a
    fused matrix and each stored expert has vectors of its own. Dropout is off on embeddings and
    where only the dense weight can be changed.
    """

    kind: ClassVar[str] = "vera"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Kopiczko et al.", "VeRA: Vector-based Random Matrix Adaptation", 2023, "2310.11454"
    )
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    rank: int = 256
    """Rank r of the shared matrices."""
    start: float = 0.1
    """Every entry of d at first."""
    dropout: float = 0.0
    """Dropout on the input of A, in training."""
    seed: int = 0
    """Of A and B."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")

    def group(self, site: Site) -> str:
        return "all"

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        out, into = (max(site.shape[side] for site in sites) for side in (-2, -1))

        def drawn(tensor: Tensor, generator: torch.Generator | None, which: int) -> None:
            tensor.copy_(pair(self.seed, self.rank, out, into)[which])

        return {
            "A": Param((self.rank, into), lambda t, g: drawn(t, g, 0), trained=False),
            "B": Param((out, self.rank), lambda t, g: drawn(t, g, 1), trained=False),
        }

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, _ = site.shape
        return {
            "d": Param((*experts, self.rank), constant(self.start)),
            "b": Param((*experts, out), zeros),
        }

    def update(self, t: Unit) -> LowRank:
        out, into = t.site.shape[-2:]
        # d is in `up`, so that nothing but frozen A meets x and no x is kept for backward.
        up = t.b[..., :, None] * t.shared.B[:out] * t.d[..., None, :]
        return LowRank(t.shared.A[:, :into], up, 1.0, self.dropout)


def pair(seed: int, rank: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    """A (rank, into) and B (out, rank) as PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.empty(shape, device="cpu") for shape in ((rank, into), (out, rank)))
    return kaiming_uniform_(A, generator=generator), kaiming_uniform_(B, generator=generator)
