"""OFT: block-diagonal rotations before each chosen matrix."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltune.mechanisms.rotation import (
    blockwise,
    cayley,
    check_blocks,
    divided,
    features_last,
    neumann,
    skew,
)
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require

MOST_TERMS = 1000
"""Of a series that every forward sums; one that wants more is far from its limit."""


@register
@dataclass(frozen=True)
class OFT(Weight):
    """Orthogonal fine-tuning: the inputs of each chosen matrix are rotated, block by block.

        y = x R W^T + b,    R = diag(R_1, ..., R_n),    R_i = (I + Q_i) (I - Q_i)^-1

    with Q_i = -Q_i^T (b, b), whose values above the diagonal are the row i of A (n, b (b - 1) / 2),
    trained; n b = in. The inverse is a Neumann series: R_i = I + 2 Q_i + ... + 2 Q_i^(k - 2) +
    Q_i^(k - 1) with k = `terms`, orthogonal for small Q_i; with `terms=None` it is exact, and of
    the other sign: R_i = (I - Q_i) (I + Q_i)^-1. With `limit` Q_i is shortened to the norm
    limit / sqrt(n). An embedding's vectors are rotated, e R. A = 0 at first, so the model starts
    unchanged. With s other than 1 the change W R^T - W is scaled, which leaves the orthogonal
    matrices. Trainable: the sum over matrices of in (b - 1) / 2. Merges exactly.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023,
    arXiv:2306.07280; the series and the inputs' side: Qiu et al., "Orthogonal Finetuning Made
    Scalable", 2025, arXiv:2506.19847.
    Differs: `limit` bounds Q, as in PEFT, where the paper bounds R - I; it is part of the equation,
    where PEFT puts the shortened values back. The weight is rotated, not the input, which is as
    much to compute as a product with the weight for b tokens. Dropping blocks in training is not
    there.
    """

    kind: ClassVar[str] = "oft"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Qiu et al.", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023,
        "2306.07280",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    factored: ClassVar[bool] = False

    block: int | None = 32
    """Size b of the blocks; None where `blocks` is given."""
    blocks: int | None = None
    """Number n of blocks, instead of their size."""
    terms: int | None = 5
    """Terms k of the series, 4 to 1000; None for the exact inverse."""
    limit: float | None = None
    """Bound on the norm of all Q_i together (COFT's epsilon); None for none."""
    share: bool = False
    """Whether all blocks are the same one; n is 1 in the shape of A and under `limit` then."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        check_blocks(self)
        fits = self.terms is None or 4 <= self.terms <= MOST_TERMS
        require(fits, self, "terms", f"4 or more and at most {MOST_TERMS}, or None")
        require(self.limit is None or self.limit > 0, self, "limit", "above 0, or None")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        count, size = divided(self, site)
        rows = 1 if self.share else count
        return {"A": Param((*site.shape[:-2], rows, size * (size - 1) // 2), zeros)}

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        W = features_last(t.site, t.site.matrix(weight)).to(t.A.dtype)
        Q = skew(self._limited(t.A), divided(self, t.site)[1])
        turn = cayley(Q) if self.terms is None else neumann(Q, self.terms)
        return features_last(t.site, blockwise(W, turn if t.site.kind == "embedding" else turn.mT))

    def _limited(self, A: Tensor) -> Tensor:
        if self.limit is None:
            return A
        most = self.limit**2 / A.shape[-2]  # Q has each value twice
        return A * (most / (2 * A.square().sum(-1, keepdim=True)).clamp(min=most)).sqrt()
