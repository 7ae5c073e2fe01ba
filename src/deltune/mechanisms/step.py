"""Steps: the units that a plan will make, before any is made."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from deltune.errors import AttachError
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Mechanism, Spot, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Spec


class Step(NamedTuple):
    """One unit to be made: a part of the spec at a site, with the tensors that it will own.

    Attributes:
        part: the name of the part among those of the delta.
        key: the path of its tensors below the delta.
        spec: the part.
        site: the place.
        tensors: by their own names.
        shared: the key of tensors that it shares, or ''.
        share: a constant factor on its effect.
        inside: the key of the unit through which it acts, or '' if it acts by itself.
        branch: the number of its part among those that act through that unit.
        after: (stack, place in it) for each stack that it is in, as far as `inside`.
        fixed: whether its tensors are kept as they are given, and not trained.
    """

    part: str
    key: str
    spec: Mechanism
    site: Site
    tensors: dict[str, Param]
    shared: str = ""
    share: float = 1.0
    inside: str = ""
    branch: int = 0
    after: tuple[tuple[int, int], ...] = ()
    fixed: bool = False

    @property
    def scalars(self) -> int:
        """Trainable scalars at this site."""
        return sum(prod(p.shape) for p in self.tensors.values() if p.trained)

    def behind(self, stack: Spec, place: int) -> "Step":
        """The step as the part of a stack at this place; what acts through another goes with it."""
        return self if self.inside else self._replace(after=((id(stack), place), *self.after))

    def scaled(self, factor: float) -> "Step":
        """The step with its effect times a factor.

        Raises:
            AttachError: it is no effect that can be scaled.
        """
        if not self.spec.unit.scalable or self.spec.owns:
            raise AttachError(
                f"`{self.spec.kind}` has no mean with other deltas: its effect is not a sum with "
                "the model's own; average what changes weights or adds to hidden states, and add "
                "this to the average with `+`"
            )
        return self._replace(share=self.share * factor)

    def kept(self) -> "Step":
        """The step with tensors that are not trained."""
        tensors = {name: param._replace(trained=False) for name, param in self.tensors.items()}
        return self._replace(tensors=tensors, fixed=True)


def arrange(steps: Sequence[Step], units: Mapping[str, Unit], atlas: Atlas) -> None:
    """Tells the units of a delta, by the keys of their steps, how they act: by how much, through
    which other unit, and when.

    Steps of a mixer come behind those that act through it. In a stack a unit waits for those of
    earlier parts at its spot.
    """
    latest: dict[tuple[int, int, Spot], int] = {}
    for step in steps:
        unit = units[step.key]
        spot = step.spec.spot(step.site, atlas.modules[step.site.path]) if step.after else None
        when = unit.turn
        if spot is not None and when:
            for stack, place in step.after:
                earlier = (latest.get((stack, n, spot), 0) for n in range(place))
                when = max(when, *earlier, 0)
                latest[stack, place, spot] = max(when, latest.get((stack, place, spot), 0))
        unit.__dict__.update(share=step.share, scale=step.share, when=when, fixed=step.fixed)
        if step.inside:
            mixer: Any = units[step.inside]
            mixer.adopt(step.branch, unit)
