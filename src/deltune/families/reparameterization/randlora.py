"""RandLoRA: a change of full rank, a sum of random low-rank bases with trained diagonals."""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_

from deltune.errors import SpecError
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
class RandLoRA(Weight):
    """A sum of frozen random low-rank matrices with trained diagonals beside each chosen matrix.

        y = x W^T + c + s * drop(x) D^T,    D = alpha / r * sum_j B_j diag(L_j) A diag(G_j)

    for j = 1 ... n, n = ceil(m / r) with m the smaller side of the matrix and M the larger, c the
    bias, L (r, n) and G (n, m) trained, the tensors `Lambda` and `Gamma`; where out < in, D is that
    sum transposed. A (r, 1, largest m) and B (largest M, n, r) are drawn once from `seed` for all
    matrices, each divided by its standard deviation; a matrix has slices of them. L = 0 and
    G = 1 / m at first, so the model starts unchanged. A smaller rank trains more: r n + n m scalars
    for each matrix, about m + m^2 / r; A and B are saved beside them. Merges exactly.

    Source: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    2025, arXiv:2502.00987.
    Differs: as in PEFT, the n r columns of B, numbered j r + k, meet the rows of the scaled A,
    numbered k n + j, by their numbers, and not base by base; all of them are random. Dense bases
    are drawn in bfloat16, as there. The zeros of sparse ones are multiplied too. Dropout is off on
    embeddings and where only the dense weight can be changed.
    """

    kind: ClassVar[str] = "randlora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Albert et al.",
        "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025, "2502.00987",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    rank: int = 32
    """Rank r of each base."""
    alpha: float = 640.0
    """Numerator of the scale."""
    bases: Literal["dense", "sparse", "very_sparse"] = "dense"
    """Kaiming-uniform, or -1, 0 and 1 with zeros for two thirds, or for all but 1 / sqrt(m)."""
    dropout: float = 0.0
    """Dropout on the input, in training."""
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
        sides = [max(site.shape[side] for site in sites) for side in (-2, -1)]
        small, large = min(sides), max(sides)

        def drawn(tensor: Tensor, generator: torch.Generator | None, which: int) -> None:
            tensor.copy_(self._pair(small, large)[which])

        n = ceil(small / self.rank)
        return {
            "A": Param((self.rank, 1, small), lambda t, g: drawn(t, g, 0), trained=False),
            "B": Param((large, n, self.rank), lambda t, g: drawn(t, g, 1), trained=False),
        }

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        m = min(out, into)
        n = ceil(m / self.rank)
        return {
            "Lambda": Param((*experts, self.rank, n), zeros),
            "Gamma": Param((*experts, n, m), constant(1 / m)),
        }

    def update(self, t: Unit) -> LowRank:
        out, into = t.site.shape[-2:]
        n, m = t.Gamma.shape[-2:]
        A = t.Lambda[..., None] * t.shared.A[..., :m] * t.Gamma[..., None, :, :]  # (..., r, n, m)
        A, B = A.flatten(-3, -2), t.shared.B[: max(out, into), :n].flatten(1)
        down, up = (A, B) if into <= out else (B.mT, A.mT)
        return LowRank(down, up, self.alpha / self.rank, self.dropout)

    def _pair(self, small: int, large: int) -> tuple[Tensor, Tensor]:
        """A and B as PEFT draws them."""
        r, n = self.rank, ceil(small / self.rank)
        generator = torch.Generator().manual_seed(self.seed)
        if self.bases == "dense":
            parts = [torch.empty(shape, dtype=torch.bfloat16, device="cpu")
                     for shape in ((r, 1, small), *[(large, 1, r)] * n)]  # fmt: skip
            A, *B = (kaiming_uniform_(part, sqrt(5), generator=generator) for part in parts)
            found = [A, torch.cat(B, 1)]
        else:
            edge = 1 / (2 * (3 if self.bases == "sparse" else sqrt(small)))
            numbers = [torch.rand(shape, generator=generator, device="cpu")
                       for shape in ((r, 1, small), (large, n, r))]  # fmt: skip
            found = [(u > 1 - edge).float() - (u < edge).float() for u in numbers]
        A, B = (part / part.std() for part in found)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise SpecError(
                f"`{self}`: the bases for {large} x {small} have no spread; use `bases='dense'`, a "
                "larger `rank`, or matrices with more entries"
            )
        return A, B
