"""APET: arbitrary few parameters at a stated budget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

from deltune.errors import SpecError
from deltune.families.addition.adapter import Adapter
from deltune.families.reparameterization.lora import LoRA
from deltune.families.specification.sparse import Sparse
from deltune.mechanisms.select import K, Select, backbone, fitting
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Composite, Paper, Spec, Sum, register, require


@register
@dataclass(frozen=True)
class APET(Composite):
    """Arbitrary parameters, as many as a budget n allows: half inserted, half of the backbone.

    Inserted are LoRA pairs (on query and value) and serial adapters (behind attention and
    feed-forward), all sites of both in random order, each taken whole if it fits into what is left
    of n // 2. From the backbone come whole tensors, taken in the same way for n - n // 2, or
    exactly n - n // 2 random entries.

    Trainable: at most n, the task head not counted; what is left of a half is less than the
    smallest piece that was not taken. Same `seed`, same pieces. Merges only without adapters.

    Source: Su et al., "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", 2023,
    arXiv:2306.02320, and its released code.
    Differs: pieces that were not drawn do not exist; in the released code they are there, frozen
    as initialised. A pair or adapter is taken if all of it fits; the code asks this of its first
    tensor, and can exceed the budget. `backbone="entries"` is not in the paper.
    """

    kind: ClassVar[str] = "apet"
    paper: ClassVar[Paper | None] = Paper(
        "Su et al.", "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", 2023,
        "2306.02320",
    )  # fmt: skip

    budget: int = 589_824
    """Trainable scalars n; by default as many as the released code gives LoRA on T5-v1.1-base."""
    rank: int = 8
    """Rank of the pairs; their scale is alpha / rank with alpha = 16."""
    width: int = 24
    """Bottleneck of the adapters."""
    backbone: Literal["tensors", "entries"] = "tensors"
    """What is taken of the backbone: whole tensors, or single entries."""
    seed: int = 0
    """Of the draws of pairs, adapters and tensors; single entries follow the seed of `attach`."""

    def __post_init__(self) -> None:
        require(self.budget >= 2, self, "budget", "2 or more")

    def expand(self) -> Spec:
        rest = self.budget - self.budget // 2
        pairs = _Pairs(rank=self.rank, within=self.within, apet=self)
        bottlenecks = _Bottlenecks(width=self.width, within=self.within, apet=self)
        whole = self.backbone == "tensors"
        own = _Tensors(apet=self) if whole else Sparse(count=rest, within=self.within)
        return Sum((pairs, bottlenecks, own))

    def inserted(self, atlas: Atlas) -> set[tuple[str, str]]:
        """(method, site) of the pairs and adapters that are taken."""
        sizes = {
            (part.kind, site.key): sum(prod(p.shape) for p in part.tensors(site, atlas).values())
            for part in (LoRA(rank=self.rank, within=self.within),
                         Adapter(width=self.width, within=self.within))
            for site in part.sites(atlas)
        }  # fmt: skip
        return self.drawn(sizes, self.budget // 2, "LoRA pairs and adapters")

    def drawn(self, sizes: Mapping[K, int], budget: int, what: str) -> set[K]:
        """Pieces in random order, each taken if it fits into what is left of the budget."""
        taken = fitting(sizes, budget, self.seed)
        total = sum(sizes.values())
        if not taken or budget > total:
            raise SpecError(
                f"`{self}` has {budget:,} of its {self.budget:,} scalars for {what}, of which this "
                f"model has {len(sizes)}, from {min(sizes.values()):,} to {max(sizes.values()):,} "
                f"scalars each, {total:,} together; choose a `budget` whose half is in between"
            )
        return taken


@dataclass(frozen=True)
class _Pairs(LoRA):
    apet: APET = field(kw_only=True)

    def sites(self, atlas: Atlas) -> list[Site]:
        taken = self.apet.inserted(atlas)
        return [site for site in super().sites(atlas) if (self.kind, site.key) in taken]


@dataclass(frozen=True)
class _Bottlenecks(Adapter):
    apet: APET = field(kw_only=True)

    def sites(self, atlas: Atlas) -> list[Site]:
        taken = self.apet.inserted(atlas)
        return [site for site in super().sites(atlas) if (self.kind, site.key) in taken]


@dataclass(frozen=True)
class _Tensors(Select):
    kind: ClassVar[str] = "tensors"

    apet: APET = field(kw_only=True)

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        values: dict[int, tuple[tuple[str, str], int]] = {}
        for path, name in backbone(atlas, within=self.apet.within):
            value = atlas.modules[path].get_parameter(name)
            values.setdefault(id(value), ((path, name), value.numel()))
        sizes = dict(values.values())
        budget = self.apet.budget - self.apet.budget // 2
        taken = self.apet.drawn(sizes, budget, "backbone tensors")
        return [place for place in sizes if place in taken]
