"""The baselines that delta tuning is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import SpecError, WhereError
from deltune.mechanisms.select import Select, backbone, fitting, narrowed
from deltune.sites.discover import Atlas
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class FullTuning(Select):
    """Full fine-tuning, as a delta: every parameter of the backbone changes.

        p' = p + s * d,    d trained, zero at first

    for every parameter p, or those of the modules of `where`. Kept as a difference it composes,
    scales, saves and merges like any delta, at the price of holding p beside d; the same steps as
    training p under any optimiser without weight decay.
    """

    kind: ClassVar[str] = "full"
    family: ClassVar[Family] = "baseline"
    later: ClassVar[tuple[str, ...]] = ("where",)

    where: Where = ""
    """Chosen modules, e.g. `embed, head, norm`; all of the backbone by default."""

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, self.where, self.within)


@register
@dataclass(frozen=True)
class LastLayers(Select):
    """The last `layers` blocks of each stack; everything else stays frozen.

        p' = p + s * d,    d trained, zero at first

    It stays a difference, as in full fine-tuning.
    """

    kind: ClassVar[str] = "last"
    family: ClassVar[Family] = "baseline"

    layers: int = 1
    """How many blocks of each stack."""

    def __post_init__(self) -> None:
        require(self.layers >= 1, self, "layers", "1 or more")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        blocks = [site for site in atlas.sites if site.role == "block"]
        counts: dict[str, int] = {}
        for site in blocks:
            counts[site.stack] = counts.get(site.stack, 0) + 1
        if not blocks or self.layers > min(counts.values()):
            raise WhereError(
                f"`last(layers={self.layers})`: {type(atlas.model).__name__} has "
                f"{', '.join(f'{n} blocks in {s}' for s, n in counts.items()) or 'no blocks'}"
            )
        last = [s.path for s in blocks if (s.layer or 0) >= counts[s.stack] - self.layers]
        inside = [
            (p, n) for p, n in backbone(atlas) if any(p == b or p.startswith(b + ".") for b in last)
        ]
        return narrowed(atlas, inside, "", self.within)


@register
@dataclass(frozen=True)
class RandomModules(Select):
    """Selective-module tuning: modules of the backbone drawn at random, the rest frozen.

        p' = p + s * d,    d trained, zero at first

    for every parameter p of the drawn modules. All modules with parameters of their own (a linear
    map, a norm, a table of embeddings) come in random order, and each is taken if it fits into what
    is left of `share` of the backbone's scalars. Same `seed`, same modules. It stays a difference,
    as in full fine-tuning.

    Source: Ding et al., "Delta Tuning: A Comprehensive Study of Parameter Efficient Methods for
    Pre-trained Language Models", 2022, arXiv:2203.06904.
    Differs: the source gives neither the number of modules nor how they are drawn.
    """

    kind: ClassVar[str] = "random_modules"
    family: ClassVar[Family] = "baseline"
    paper: ClassVar[Paper | None] = Paper(
        "Ding et al.",
        "Delta Tuning: A Comprehensive Study of Parameter Efficient Methods for Pre-trained "
        "Language Models", 2022, "2203.06904",
    )  # fmt: skip

    share: float = 0.1
    """How much of the backbone is tuned, at most."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        require(0.0 < self.share <= 1.0, self, "share", "above 0 and at most 1")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        sizes: dict[str, int] = {}
        seen: set[int] = set()
        inside = backbone(atlas, within=self.within)
        for path, name in inside:
            value = atlas.modules[path].get_parameter(name)
            if id(value) not in seen:
                seen.add(id(value))
                sizes[path] = sizes.get(path, 0) + value.numel()
        budget = int(self.share * sum(sizes.values()))
        taken = fitting(sizes, budget, self.seed)
        if not taken:
            raise SpecError(
                f"`{self}` has {budget:,} scalars and the smallest module of "
                f"{type(atlas.model).__name__} has {min(sizes.values(), default=0):,}; give a "
                "larger `share`"
            )
        return [(path, name) for path, name in inside if path in taken]
