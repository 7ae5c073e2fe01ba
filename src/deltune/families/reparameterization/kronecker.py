"""Kronecker sums: a change of a matrix that is small when rearranged."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import SpecError
from deltune.mechanisms.kronecker import KroneckerSum, near_root
from deltune.mechanisms.tensors import Param, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Kronecker(Weight):
    """A sum of Kronecker products beside each chosen matrix, as in Shapeshifter.

        y = x W^T + b + s * x (sum_i A_i (x) B_i)^T,    i = 1 ... r

    with A_i (m1, n1) and B_i (m2, n2) trained, m1 m2 = out and n1 n2 = in the factors nearest to
    their square roots, m1 <= m2 and n1 >= n2; B = 0 at first, so the model starts unchanged. The
    rearranged change, one row for each entry of A_i, has rank r; the change itself can have more.
    Trainable: the sum over matrices of r (m1 n1 + m2 n2); a 768 x 768 matrix has 12,288 for r = 8.
    Merges exactly.

    Source: Panahi, Saeedi and Arodz, "Shapeshifter: a Parameter-efficient Transformer using
    Factorized Reshaped Matrices", 2021 (NeurIPS); its code was never released.
    Differs: a change beside the frozen weight instead of the weight itself, by default on query and
    value; the paper makes all matrices so (`where="embed, attn, ffn"`). The initialisation of A is
    ours: N(0, s^2) with s^4 = 1 / (r in), so that B drawn likewise would give the change the
    variance 1 / in; `KroneckerSum.nearest` of `mechanisms.kronecker` gives the sum nearest to a
    known change. The paper has larger ranks for embeddings; here each `where` has one rank.
    """

    kind: ClassVar[str] = "kronecker"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Panahi et al.",
        "Shapeshifter: a Parameter-efficient Transformer using Factorized Reshaped Matrices", 2021,
    )  # fmt: skip

    rank: int = 8
    """Number of terms r."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        (m1, m2), (n2, n1) = near_root(out), near_root(into)
        most = min(m1 * n1, m2 * n2)
        if self.rank > most:
            raise SpecError(
                f"`kronecker(rank={self.rank})`: any change of the {out} x {into} matrix at "
                f"`{site.path}` is a sum of {most} products {m1} x {n1} (x) {m2} x {n2}; use a "
                f"rank of at most {most}"
            )
        std = (self.rank * into) ** -0.25
        return {
            "A": Param((*experts, self.rank, m1, n1), normal(std)),
            "B": Param((*experts, self.rank, m2, n2), zeros),
        }

    def update(self, t: Unit) -> KroneckerSum:
        return KroneckerSum(t.A, t.B)
