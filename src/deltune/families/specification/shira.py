"""SHiRA: a sparse change of as many entries as LoRA has scalars."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, SpecError
from deltune.families.specification.sparse import sample
from deltune.mechanisms.factors import dense
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, WeightUnit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


class ScatteredUnit(WeightUnit):
    """Values at the kept places of one matrix."""

    def install(self, root: nn.Module) -> None:
        entries = prod(self.site.shape[-2:])
        inside = self.index.is_meta or 0 <= self.index.min() <= self.index.max() < entries
        if not inside:
            raise AttachError(
                f"the index of `shira` at `{self.site.path}` is damaged: expected places from 0 to "
                f"{entries - 1:,}; load the delta again from a whole file"
            )
        super().install(root)


@register
@dataclass(frozen=True)
class SHiRA(Weight):
    """Sparse high-rank adapters: some entries of each chosen matrix, as many as LoRA has scalars.

        y = x (W + s * scatter(i, v))^T + b,    v (k) trained, zero at first,    k = r (in + out)

    with places i (k) of the matrix, counted row by row: a uniform sample without replacement, kept
    and not trained; k = ceil(`density` in out) where that is given. The model starts unchanged; the
    rank of the change is not bounded by r. Trainable: the sum over matrices of k, stored with a
    4-byte place each (8 from 2^31 entries on). Merges exactly.

    Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv:2406.13175, with its random
    mask (SHiRA-Rand).
    Differs: the change v is trained, not the entries: the same steps under any optimiser without
    weight decay. The paper's other masks are not here: `sparse` draws places over all matrices
    together, `fish` finds them by gradients.
    """

    kind: ClassVar[str] = "shira"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Bhardwaj et al.", "Sparse High Rank Adapters", 2024, "2406.13175"
    )
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    unit: ClassVar[type[Unit]] = ScatteredUnit
    factored: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    later: ClassVar[tuple[str, ...]] = ("density",)

    rank: int = 32
    """Rank r of a LoRA with as many scalars."""
    density: float | None = None
    """Share of each matrix's entries that change, instead of `rank`."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(self.density is None or 0.0 < self.density <= 1.0, self, "density", "in (0, 1]")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        entries, k = out * into, self._count(out, into)
        if k > entries:
            raise SpecError(
                f"`shira(rank={self.rank})`: {k:,} entries are more than the {out} x {into} matrix "
                f"at `{site.path}` has; use a rank of at most {entries // (out + into)}, or leave "
                "it out of `where`"
            )

        def drawn(index: Tensor, generator: torch.Generator | None) -> None:
            for own in index.view(-1, k):
                own.copy_(sample(entries, k, index.device, generator))

        index = Param((*experts, k), drawn, trained=False, dtype=_places(entries))
        return {"v": Param((*experts, k), zeros), "index": index}

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        *experts, out, into = t.site.shape
        whole = t.v.new_zeros(*experts, out * into)
        return whole.scatter_add(-1, t.index.long(), t.v).unflatten(-1, (out, into))

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """The largest entries of each matrix, as many as the fullest one has that are not 0."""
        flat = {key: dense(one).flatten(-2) for key, term in terms.items() for one in term.values()}
        shares = [int((one != 0).sum(-1).max()) / one.shape[-1] for one in flat.values()]
        spec = replace(self, density=max(*shares, 1 / max(one.shape[-1] for one in flat.values())))
        trained, kept = {}, {}
        for key, one in flat.items():
            k = spec._count(*units[key].site.shape[-2:])
            index = one.abs().topk(k, sorted=False).indices.sort().values
            trained[f"{key}.v"] = one.gather(-1, index)
            kept[f"{key}.index"] = index.to(_places(one.shape[-1]))
        return Held(spec, trained, kept)

    def _count(self, out: int, into: int) -> int:
        """Entries of a matrix."""
        if self.density is None:
            return self.rank * (out + into)
        return min(out * into, ceil(self.density * out * into))


def _places(entries: int) -> torch.dtype:
    return torch.int64 if entries >= 2**31 else torch.int32
