"""MiSS: one shard that all groups of a matrix's inputs share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.shards import Shards
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class MiSS(Weight):
    """Matrix shard sharing: one trained shard, added to every group of r columns of a matrix.

        y = x W^T + b + s * (drop(x)_1 + drop(x)_2 + ... ) D

    with x_1, x_2, ... the groups of r inputs one after the other, the last filled with zeros, and
    D (r, out) trained. With `mini` D is (r, mini), and repeated for all outputs. With `bat` the
    change depends on the weight: with W_ij the blocks (r, r) of W and D (out / r, r, r)

        W'_ij = W_ij + s * (W_ij D_i + D_i)

    D = 0 at first, so the model starts unchanged. Trainable: the sum over matrices of r out, of
    r mini or, with `bat`, of r out. Merges exactly.

    Source: Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
    Structure", 2024, arXiv:2409.15371; `mini` and `bat` as in PEFT.
    Differs: dropout is off on embeddings and where only the dense weight can be changed; there is
    none with `bat`.
    """

    kind: ClassVar[str] = "miss"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Kang and Yin",
        "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024,
        "2409.15371",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    rank: int = 64
    """Number r of inputs in a group."""
    mini: int | None = None
    """Number of columns of D, where outputs share them; it divides their number."""
    bat: bool = False
    """Whether the change is affine in the weight's blocks; r divides both sides then."""
    dropout: float = 0.0
    """Dropout on the input, in training."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(self.mini is None or self.mini >= 1, self, "mini", "1 or more, or None")
        require(not (self.bat and self.mini), self, "mini", "None with `bat`")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")
        require(not (self.bat and self.dropout), self, "dropout", "0 with `bat`")

    @property
    def factored(self) -> bool:
        return not self.bat

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        r, columns = self.rank, self.mini or out
        place = f"the matrix at `{site.path}` ({out} x {into})"
        if self.bat and (out % r or into % r):
            raise SpecError(
                f"`{self}`: {place} does not divide into blocks of {r} x {r}; use a rank that "
                "divides both sides"
            )
        if r > into:
            raise SpecError(
                f"`{self}`: {place} has {into} inputs, fewer than a group; use a rank of at most "
                f"{into}"
            )
        if out % columns:
            raise SpecError(
                f"`{self}`: {columns} columns do not divide the {out} outputs of {place}; use a "
                f"`mini` that divides {out}"
            )
        shape = (*experts, out // r, r, r) if self.bat else (*experts, r, columns)
        return {"D": Param(shape, zeros)}

    def update(self, t: Unit) -> Shards:
        *_, out, into = t.site.shape
        return Shards(t.D.tile(out // t.D.shape[-1]), into, self.dropout)

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        if not self.bat:
            return super().difference(t, weight)
        W = t.site.matrix(weight).to(t.D.dtype)
        blocks = W.unflatten(-1, (-1, self.rank)).unflatten(-3, (-1, self.rank))
        change = torch.einsum("...iajb,...ibc->...iajc", blocks, t.D) + t.D[..., :, :, None, :]
        return change.flatten(-4, -3).flatten(-2)
