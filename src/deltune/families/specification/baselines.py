"""The baselines that delta tuning is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import WhereError
from deltune.mechanisms.select import Select, backbone, narrowed
from deltune.sites.discover import Atlas
from deltune.spec import Family, register, require


@register
@dataclass(frozen=True)
class FullTuning(Select):
    """Full fine-tuning, as a delta: every parameter of the backbone changes.

        p' = p + s * d,    d trained, zero at first

    Kept as a difference it composes, scales, saves and merges like any delta, at the price of
    holding p beside d; the same steps as training p under any optimiser without weight decay.
    """

    kind: ClassVar[str] = "full"
    family: ClassVar[Family] = "baseline"

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, within=self.within)


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
