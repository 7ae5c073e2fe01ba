"""LoKr: a Kronecker product of two small matrices, the larger of low rank."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.mechanisms.kronecker import KroneckerSum, near_root
from deltune.mechanisms.tensors import Init, Param, kaiming, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class LoKr(Weight):
    """A Kronecker product of two small matrices beside each chosen matrix.

        y = x W^T + b + s * x (C (x) (B A))^T,    s = alpha / r

    with C (m1, n1), B (m2, r) and A (r, n2) trained, m1 m2 = out and n1 n2 = in. Where r is half of
    the larger side of B A or more, one matrix D (m2, n2) stands in its place, and with `both` a
    product C_B C_A stands in that of C where r is below half of its larger side. C (or C_B) = 0 at
    first, so the model starts unchanged. Merges exactly.

    Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
    Evaluation", 2023, arXiv:2309.14859, eq. 6; Edalati et al., "KronA", 2022, arXiv:2212.10650, is
    the case of two full matrices.
    Differs: C is 0 and the rest Kaiming-uniform, as in PEFT. Dropping rows of the change or all of
    it in training is not there.
    """

    kind: ClassVar[str] = "lokr"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Yeh et al.",
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        2023, "2309.14859",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    rank: int = 8
    """Rank r of the larger matrix."""
    alpha: float = 8.0
    """Numerator of the scale s."""
    factor: int = -1
    """The smaller factors m1 and n1: this number where it divides a side, else the nearest divisor
    below it; -1 for those nearest to the square roots."""
    both: bool = False
    """Whether the smaller matrix is a product too."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(self.factor == -1 or self.factor >= 1, self, "factor", "1 or more, or -1")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        (m1, m2), (n1, n2) = self._factors(out), self._factors(into)

        def made(name: str, rows: int, columns: int, split: bool, start: Init) -> dict[str, Param]:
            if not split or self.rank >= max(rows, columns) / 2:
                return {name: Param((*experts, rows, columns), start)}
            return {
                f"{name}_B": Param((*experts, rows, self.rank), start),
                f"{name}_A": Param((*experts, self.rank, columns), kaiming),
            }

        return made("C", m1, n1, self.both, zeros) | made("D", m2, n2, True, kaiming)

    def update(self, t: Unit) -> KroneckerSum:
        C, D = (t.own(n) if n in t._parameters else t.own(f"{n}_B") @ t.own(f"{n}_A") for n in "CD")
        scale = self.alpha / self.rank
        return KroneckerSum(scale * C[..., None, :, :], D[..., None, :, :])

    def _factors(self, side: int) -> tuple[int, int]:
        if self.factor == -1:
            return near_root(side)
        if side % self.factor == 0:
            return self.factor, side // self.factor
        small = max(k for k in range(1, min(self.factor, near_root(side)[0]) + 1) if side % k == 0)
        return small, side // small
