"""BOFT: rotations of all features as a product of sparse ones, in butterfly form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.rotation import blockwise, cayley, check_blocks, divided, features_last
from deltune.mechanisms.tensors import Param, ones, zeros
from deltune.mechanisms.unit import Rate, Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class BOFT(Weight):
    """Orthogonal butterfly: each chosen matrix times a product of m sparse rotations, and scaled.

        W' = diag(g) W R^T,    R = B_m ... B_2 B_1,    B_i = P_i diag(R_i1, ..., R_in) P_i^T

    with R_ij = (I - Q_ij) (I + Q_ij)^-1 and Q_ij = (K_ij - K_ij^T) / 2 of K (m, n, b, b) and the
    gains g (out, 1) trained, n b = in. P_1 = I, and P_i makes blocks of two halves that are
    b 2^(i - 2) features apart: m = 1 is OFT, and every further factor doubles how many features one
    is mixed with. On an embedding W is (vocabulary, features), and g scales the features. K = 0 and
    g = 1 at first, so the model starts unchanged. With s other than 1 the change W' - W is scaled.
    Trainable: the sum over matrices of m in b + out, of which the symmetric parts of K have no
    effect. Merges exactly.

    Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
    2023, arXiv:2311.06243; the gains as in PEFT.
    Differs: dropping blocks in training is not there. The weight is rotated, not the input.
    """

    kind: ClassVar[str] = "boft"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Liu et al.",
        "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023, "2311.06243",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    factored: ClassVar[bool] = False

    block: int | None = 4
    """Size b of the blocks; None where `blocks` is given."""
    blocks: int | None = None
    """Number n of blocks, instead of their size."""
    factors: int = 1
    """Number m of factors; above 1, b is even and 2^(m - 1) divides n."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        check_blocks(self)
        require(self.factors >= 1, self, "factors", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, _ = site.shape
        count, size = divided(self, site)
        halvings = (count & -count).bit_length() - 1  # how often 2 divides the blocks
        most = 1 if size % 2 else 1 + halvings
        if self.factors > most:
            raise SpecError(
                f"`boft(factors={self.factors})`: the matrix at `{site.path}` has {count} blocks "
                f"of {size} features; m factors want blocks of an even size, and 2^(m - 1) to "
                f"divide their number: use at most {most}"
            )
        return {
            "K": Param((*experts, self.factors, count, size, size), zeros),
            "g": Param((*experts, out, 1), ones),
        }

    def rates(self) -> Mapping[str, Rate]:
        return {"g": Rate(decayed=False)}

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        matrix = t.site.matrix(weight).to(t.K.dtype)
        W = features_last(t.site, matrix)
        turns = cayley((t.K - t.K.mT) / 2).mT
        change = W.new_zeros(())
        for i in range(self.factors):
            change = change + _mixed(W + change, turns[..., i, :, :, :], i)
        change = features_last(t.site, change)
        return change + (t.g - 1) * (matrix + change)


def _mixed(rows: Tensor, blocks: Tensor, i: int) -> Tensor:
    """Rows times P diag(blocks) P^T, with P of the factor i, counted from 0."""
    if i == 0:
        return blockwise(rows, blocks)
    half = blocks.shape[-1] // 2
    paired = rows.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).flatten(-4)
    mixed = blockwise(paired, blocks).unflatten(-1, (-1, 2**i, 2, half))
    return mixed.transpose(-3, -2).flatten(-4)
