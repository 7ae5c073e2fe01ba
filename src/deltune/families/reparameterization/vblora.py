"""VB-LoRA: low-rank matrices mixed from one bank of vectors."""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.tensors import Param, normal, uniform
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, check_rank
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class VBLoRA(Weight):
    """Low-rank adaptation whose matrices are mixed from a bank of vectors that all share.

        y = x W^T + b + s * drop(x) A^T B^T
        A = [mix(P_i1) ... mix(P_i,in/b)] in row i,    B likewise from Q in column i
        mix(p) = sum over the k largest p_j of softmax(those)_j v_j

    with A (r, in) and B (out, r) cut into pieces of length b, a piece of either being a mixture of
    vectors of the bank v (h, b), h = `vectors`, by its logits P (r, in / b, h) or Q (out / b, r,
    h). All are trained, the bank by every matrix of the delta. At first v is U(-0.02, 0.02) and
    logits are N(0, 0.1^2), so the model starts slightly changed.
    Trainable: h b for the bank, and the sum over matrices of r h (in + out) / b. Merges exactly.

    Source: Li, Han and Ji, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
    2024, arXiv:2405.15179.
    Differs: the paper counts what has to be stored after training, of each piece k - 1 weights and
    k places beside the bank; here a saved delta holds the logits, with which training can go on.
    Dropout is off on embeddings and where only the dense weight can be changed.
    """

    kind: ClassVar[str] = "vblora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Li et al.", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024,
        "2405.15179",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    rank: int = 4
    """Rank r."""
    vectors: int = 256
    """Number of vectors h in the bank."""
    length: int = 256
    """Their length b; divides both sides of every matrix."""
    top: int = 2
    """Vectors k in a mixture; logits of a single one would not train."""
    dropout: float = 0.0
    """Dropout on the input of A, in training."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        for name in ("rank", "vectors", "length"):
            require(getattr(self, name) >= 1, self, name, "1 or more")
        require(1 <= self.top <= self.vectors, self, "top", "1 or more, at most `vectors`")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")

    def group(self, site: Site) -> str:
        return "bank"

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        return {"v": Param((self.vectors, self.length), uniform(-0.02, 0.02))}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (*experts, out, into), b = site.shape, self.length
        check_rank(self, site, self.rank)
        if out % b or into % b:
            raise SpecError(
                f"`vblora(length={b})`: {b} does not divide both sides of the {out} x {into} matrix"
                f" at `{site.path}`; use a divisor of {gcd(out, into)}, or leave it out of `where`"
            )
        start = normal(0.1)
        return {
            "P": Param((*experts, self.rank, into // b, self.vectors), start),
            "Q": Param((*experts, out // b, self.rank, self.vectors), start),
        }

    def update(self, t: Unit) -> LowRank:
        A, B = self._mixed(t, t.P), self._mixed(t, t.Q)
        return LowRank(A.flatten(-2), B.mT.flatten(-3, -2), 1.0, self.dropout)

    def _mixed(self, t: Unit, logits: Tensor) -> Tensor:
        largest, places = logits.topk(self.top)
        return (largest.softmax(-1)[..., None] * t.shared.v[places]).sum(-2)
