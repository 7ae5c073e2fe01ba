"""PHM: a change of a matrix by parameterised hypercomplex multiplication."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.kronecker import KroneckerSum
from deltune.mechanisms.tensors import Param, copy_of, uniform, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class PHM(Weight):
    """Parameterised hypercomplex multiplication: a product in an algebra beside each matrix.

        y = x W^T + b + s * x H^T,    H = sum_i A_i (x) S_i,    i = 1 ... n

    with the rules A (n, n, n) and the weights S (n, out / n, in / n) trained; S = 0 at first, so
    the model starts unchanged. With `algebra="quaternion"` (n = 4) the rules are those of the
    Hamilton product, four matrices of signs that are kept and not trained.
    Trainable: the sum over matrices of n^3 + out in / n; a 768 x 768 matrix has 147,520 for n = 4,
    147,456 with quaternions. Merges exactly.

    Source: Zhang et al., "Beyond Fully-Connected Layers with Quaternions: Parameterization of
    Hypercomplex Multiplications with 1/n Parameters", 2021, arXiv:2102.08597; quaternions: Tay et
    al., "Lightweight and Efficient Neural Natural Language Processing with Quaternion Networks",
    2019, arXiv:1906.04393.
    Differs: a change beside the frozen weight instead of the weight itself, by default on query and
    value; the paper makes all matrices of attention and feed-forward so (`where="attn, ffn"`). A is
    U(-sqrt(3) / n, sqrt(3) / n), Xavier-uniform over the whole tensor.
    """

    kind: ClassVar[str] = "phm"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Zhang et al.",
        "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex "
        "Multiplications with 1/n Parameters", 2021, "2102.08597",
    )  # fmt: skip

    n: int = 4
    """Dimension n of the algebra; divides both sides of every matrix."""
    algebra: Literal["learned", "quaternion"] = "learned"
    """Whether the rules of multiplication are learned."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.n >= 1, self, "n", "1 or more")
        require(self.algebra == "learned" or self.n == 4, self, "n", "4 for quaternions")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (*experts, out, into), n = site.shape, self.n
        if out % n or into % n:
            raise SpecError(
                f"`phm(n={n})`: {n} does not divide the {out} x {into} matrix at `{site.path}`; "
                "use an `n` that divides both sides, or leave the matrix out of `where`"
            )
        shape, bound = (*experts, n, n, n), sqrt(3) / n
        learned = self.algebra == "learned"
        rules = uniform(-bound, bound) if learned else copy_of(hamilton())
        return {
            "A": Param(shape, rules, trained=learned),
            "S": Param((*experts, n, out // n, into // n), zeros),
        }

    def update(self, t: Unit) -> KroneckerSum:
        return KroneckerSum(t.A, t.S)


def hamilton() -> Tensor:
    """The rules of the Hamilton product: for quaternions w and x, w x is (sum_i A_i w_i) x."""
    rows = (
        (0, -1, -2, -3),
        (1, 0, -3, 2),
        (2, 3, 0, -1),
        (3, -2, 1, 0),
    )  # r -i -j -k; i r -k j ...
    rules = torch.zeros(4, 4, 4)
    for row, parts in enumerate(rows):
        for column, part in enumerate(parts):
            rules[abs(part), row, column] = -1.0 if part < 0 else 1.0
    return rules
