"""Pruned: fine-tuned matrices of which a fixed part is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltune.mechanisms.binary import Masked, bits_of, pack, targets, unpack
from deltune.mechanisms.sparse import SparseSelect, SparseUnit
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


class PrunedUnit(SparseUnit):
    """The weights that are left of one matrix, which acts also where none is."""

    @property
    def empty(self) -> bool:
        return False

    def edges(self) -> list[int]:
        return self.shared.book.read(self.shared.edges, Tensor.tolist)


@register
@dataclass(frozen=True)
class Pruned(Masked, SparseSelect):
    """Matrices of which `count` entries are left, and those are fine-tuned: what `movement` folds
    to.

        W' = W + s (M (.) (W + D) - W),    M in {0, 1} kept, D trained where M = 1

    M is kept as one bit for each entry (`bits`), D as one vector over the ones of all matrices
    (`shared:all.values`), in which `edges` says where each matrix begins. Trainable: `count`, the
    number of weights that are left. Attached afresh, evenly spread ones are. Merges exactly.

    Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
    arXiv:2005.07683.
    Differs: the change D is kept beside the backbone, not the matrices that are left.
    """

    kind: ClassVar[str] = "pruned"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Sanh et al.", "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, "2005.07683"
    )

    unit: ClassVar[type[Unit]] = PrunedUnit

    count: int | None = None
    """How many weights are left; all by default."""

    def __post_init__(self) -> None:
        require(self.count is None or self.count >= 1, self, "count", "1 or more")

    def kept(self, total: int, atlas: Atlas) -> int:
        return self.count or total

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        segments = [site.segment for site in sites if site.segment is not None]
        _, total, kept = segments[0]
        edges = [kept * segment.offset // total for segment in segments] + [kept]

        def evenly(tensor: Tensor, generator: torch.Generator | None) -> None:
            tensor.copy_(torch.tensor(edges))

        index = Param((len(edges),), evenly, trained=False, dtype=torch.int64)
        return {"values": Param((kept,), zeros), "edges": index}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        assert site.segment is not None
        offset, total, kept = site.segment
        end = offset + prod(site.shape) + 1

        def spread(bits: Tensor, generator: torch.Generator | None) -> None:
            before = torch.arange(offset, end, device=bits.device) * kept // total
            bits.copy_(pack(before.diff() > 0))

        return {"bits": bits_of(site.shape, spread)}

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        return unpack(t.bits, shape)

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        mask, values = self.mask(t, name, value.shape), t.part().to(value.device)
        return (-value.to(values.dtype)).masked_scatter_(mask, values)


def remains(spec: Masked, units: Mapping[str, Unit]) -> tuple[Pruned, dict[str, Tensor]]:
    """What a method's masks leave of the matrices and their changes, and the spec of that."""
    tensors: dict[str, Tensor] = {}
    values: list[Tensor] = []
    edges = [0]
    for place, unit in units.items():
        for _, name in targets([unit]):
            key = place if name == "weight" else f"{place}.{name}".lstrip(".")
            change = unit.own(name)
            mask = spec.mask(unit, name, change.shape)
            tensors[f"{key}.bits"] = pack(mask)
            values.append(change[mask].cpu())
            edges.append(edges[-1] + len(values[-1]))
    tensors |= {"shared:all.values": torch.cat(values), "shared:all.edges": torch.tensor(edges)}
    return Pruned(spec.where, count=edges[-1], within=spec.within), tensors
