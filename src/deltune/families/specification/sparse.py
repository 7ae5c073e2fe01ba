"""Sparse tuning: chosen or random entries of the backbone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deltune.errors import MergeError
from deltune.mechanisms.factors import dense
from deltune.mechanisms.select import backbone
from deltune.mechanisms.sparse import SparseSelect
from deltune.mechanisms.tensors import Init
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Sparse(SparseSelect):
    """k entries of the backbone's parameters, drawn at random: the control for every method that
    picks its entries. Learned masks fold into it, with the entries that they picked.

        p' = p + s * scatter(i, v),    v (k) trained, zero at first; i (k) rising positions

    in the parameters p of `where` joined end to end, i a uniform sample without replacement. All
    other entries stay frozen bit for bit under any optimiser.
    Trainable: k = `count`, or int(`density` * entries); stored with a 4-byte position each (8
    from 2^31 entries on). Merges exactly.

    Source: the random control of Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning
    for Transformer-based Masked Language-models", 2022, arXiv:2106.10199.
    Differs: the change v is trained, not the entries: the same steps under any optimiser without
    weight decay. The control with random rows and columns of the released code is left out.
    """

    kind: ClassVar[str] = "sparse"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Ben Zaken et al.",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models", 2022, "2106.10199",
    )  # fmt: skip

    count: int | None = None
    """Number of entries k."""
    density: float | None = None
    """Share of the entries, instead of `count`; 0.005 if neither is given."""
    where: Where = ""
    """The modules whose parameters are chosen from; all of the backbone by default."""

    def __post_init__(self) -> None:
        require(self.count is None or self.count >= 1, self, "count", "1 or more")
        require(self.density is None or 0.0 < self.density <= 1.0, self, "density", "in (0, 1]")
        require(self.count is None or self.density is None, self, "density",
                "left out where `count` is given")  # fmt: skip

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """The entries that are not 0."""
        segments = {key: unit.site.segment for key, unit in units.items()}
        if None in segments.values() or len({one.total for one in segments.values() if one}) > 1:
            raise MergeError(
                f"`{self}` counts its entries over all of its parameters, and these are not the "
                "same in all deltas; merge deltas of one `where`, folded where they have a form of "
                "their own in training"
            )
        index, values = [], []
        for key, segment in segments.items():
            for term in terms[key].values():
                flat = dense(term).flatten()
                found = flat.nonzero().flatten()
                index.append(found + (segment.offset if segment else 0))
                values.append(flat[found])
        every, total = torch.cat(index), next(one.total for one in segments.values() if one)
        if not len(every):
            every, values = every.new_zeros(1), [values[0].new_zeros(1)]
        kept = every.to(torch.int64 if total >= 2**31 else torch.int32)
        spec = replace(self, count=len(kept), density=None)
        return Held(spec, {"shared:all.values": torch.cat(values)}, {"shared:all.index": kept})

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, self.where, self.within)

    def kept(self, total: int, atlas: Atlas) -> int:
        return self.count or int((self.density or 0.005) * total)

    def start(self, total: int) -> Init:
        def drawn(index: Tensor, generator: torch.Generator | None) -> None:
            index.copy_(sample(total, len(index), index.device, generator))

        return drawn


def sample(
    total: int, count: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """`count` different numbers below `total`, in rising order; every set is equally likely."""
    if 16 * count > total:  # else few draws repeat
        dtype = torch.int32 if total < 2**31 else torch.int64
        order = torch.randperm(total, generator=generator, device=device, dtype=dtype)
        return order[:count].sort().values
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < count:
        more = torch.randint(total, (count - len(found),), generator=generator, device=device)
        found = torch.cat([found, more]).unique()
    return found
