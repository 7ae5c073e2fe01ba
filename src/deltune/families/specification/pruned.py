"""Pruned: fine-tuned matrices of which a fixed part is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltune.mechanisms.binary import Masked, bits_of, pack, targets, unpack
from deltune.mechanisms.sparse import SparseSelect
from deltune.mechanisms.tensors import Param, constant, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Pruned(Masked, SparseSelect):
    """Matrices of which `count` entries are left, and those are fine-tuned: what `movement` folds
    to.

        W' = W + s (M (.) (W + D) - W),    M in {0, 1} kept, D trained where M = 1

    M is kept as one bit for each entry (`bits`), D as one vector over the ones of all matrices
    (`shared:all.values`), of which `start` is where a matrix begins. Trainable: `count`, the
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

    count: int | None = None
    """How many weights are left; all by default."""

    def __post_init__(self) -> None:
        require(self.count is None or self.count >= 1, self, "count", "1 or more")

    def kept(self, total: int, atlas: Atlas) -> int:
        return self.count or total

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        assert sites[0].segment is not None
        return {"values": Param((sites[0].segment.kept,), zeros)}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        assert site.segment is not None
        offset, total, kept = site.segment
        end = offset + prod(site.shape) + 1

        def spread(bits: Tensor, generator: torch.Generator | None) -> None:
            before = torch.arange(offset, end, device=bits.device) * kept // total
            bits.copy_(pack(before.diff() > 0))

        start = Param((), constant(kept * offset // total), trained=False, dtype=torch.int64)
        return {"bits": bits_of(site.shape, spread), "start": start}

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        return unpack(t.bits, shape)

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        mask, values = self.mask(t, name, value.shape), t.shared.values.to(value.device)
        at = (mask.reshape(-1).cumsum(0) - 1 + t.start).clamp(0, len(values) - 1)
        return torch.where(mask, values[at].view(value.shape), -value.to(values.dtype))


def remains(spec: Masked, units: Mapping[str, Unit]) -> tuple[Pruned, dict[str, Tensor]]:
    """What a method's masks leave of the matrices and their changes, and the spec of that."""
    tensors: dict[str, Tensor] = {}
    values: list[Tensor] = []
    start = 0
    for place, unit in units.items():
        for _, name in targets([unit]):
            key = place if name == "weight" else f"{place}.{name}".lstrip(".")
            change = unit.own(name)
            mask = spec.mask(unit, name, change.shape)
            tensors |= {f"{key}.bits": pack(mask), f"{key}.start": torch.tensor(start)}
            values.append(change[mask].cpu())
            start += len(values[-1])
    tensors["shared:all.values"] = torch.cat(values)
    return Pruned(spec.where, count=start, within=spec.within), tensors
