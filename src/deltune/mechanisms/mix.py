"""Mixing: the changes that several deltas make at one spot, put in as one.

A mixer is a unit at a spot that has others behind it. They act through it as they would by
themselves, each part of the spec in a chain, on what is there before any of them:

    h <- h + s mix(h, z_1, ..., z_n),    z_i = chain_i(h) - h

So a mechanism says what it changes, never with whom: a mixer serves whatever changes hidden states,
and is itself such a change, so that mixers nest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.insert import linear
from deltune.mechanisms.masks import MaskedUnit, watched
from deltune.mechanisms.modules import at, changed_output
from deltune.mechanisms.step import Step
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Mechanism, Spot, Unit
from deltune.sites.discover import Atlas
from deltune.sites.matrices import matrix
from deltune.sites.site import Site
from deltune.spec import Operator

SUFFIX = {"weight": ".weight", "output": "", "input": ".input"}


class MixUnit(MaskedUnit):
    """What is behind an operator at one spot.

    Attributes:
        branches: for each part of the operator its units here.
    """

    spec: "Mix"
    bares: ClassVar[bool] = True

    def __init__(self, spec: "Mix", site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        self.branches: list[list[Unit]]
        self.hooks: dict[int, list[Callable[..., Any]]]
        self.__dict__.update(branches=[[] for _ in spec.parts], hooks={})

    def adopt(self, branch: int, unit: Unit) -> None:
        """Lets a unit act through this one, as a member of the part of this number."""
        self.branches[branch].append(unit)
        unit.__dict__["mixer"] = self

    @property
    def behind(self) -> list[Unit]:
        return [unit for units in self.branches for unit in sorted(units, key=lambda u: u.when)]

    @property
    def turn(self) -> int:
        return max((unit.when for units in self.branches for unit in units), default=0)

    @property
    def reads(self) -> bool:
        return any(unit.reads for unit in self.behind)

    @property
    def stream(self) -> set[str]:
        return {path for unit in self.behind for path in unit.stream}

    @property
    def changed(self) -> list[str]:
        return [path for unit in self.behind for path in unit.changed]

    @property
    def hooked(self) -> set[int]:
        return super().hooked.union(*(unit.hooked for unit in self.behind))

    def install(self, root: nn.Module) -> None:
        self.hooks.clear()
        self.watch(root)
        for units in self.branches:
            for unit in units:
                unit.__dict__.update(crowd=self.crowd, bare=len(units) == 1)
        for unit in self.behind:
            unit.install(root)
        module = at(root, self.site.path)
        if self.site.entry:
            self.change_input(module, self.mix_input)
        else:
            self.change_output(module, self.mix_output)

    def remove(self, root: nn.Module) -> None:
        super().remove(root)
        for unit in self.behind:
            unit.remove(root)

    def gather(self, unit: Unit, hook: Callable[..., Any]) -> None:
        """Takes the hook that a unit would register at this spot."""
        branch = next(n for n, units in enumerate(self.branches) if any(u is unit for u in units))
        self.hooks.setdefault(branch, []).append(hook)

    def mix_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        def change(hook: Callable[..., Any], h: Tensor) -> Tensor:
            return hook(module, args, h)

        return changed_output(output, lambda h: self.mixed(module, h, change))

    def mix_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        def change(hook: Callable[..., Any], h: Tensor) -> Tensor:
            return hook(module, (h, *args[1:]))[0]

        return (self.mixed(module, args[0], change), *args[1:])

    def mixed(
        self, module: nn.Module, h: Tensor, change: Callable[[Callable[..., Any], Tensor], Tensor]
    ) -> Tensor:
        """h + s mix(h, z_1, ..., z_n)."""
        changes: list[Tensor | None] = []
        for branch in range(len(self.branches)):
            state = h
            for hook in self.hooks.get(branch, ()):
                state = change(hook, state)
            here = self.branches[branch]
            bare = len(here) == 1 and here[0].bares
            changes.append(None if not here else state if bare else state - h)
        mixed = self.spec.mix(self, module, h, changes)
        mixed = mixed if self.scale == 1.0 else self.scale * mixed
        return mixed.to(h.dtype) if self.bare else h + mixed.to(h.dtype)

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        factors = self.spec.factors
        if not factors:
            raise AttachError(
                f"`{self.spec.kind}` cannot be merged: it mixes its parts anew for each token"
            )
        if not all(_apart(units) for units in self.branches):
            raise AttachError(
                f"`{self.spec}` cannot be merged: at `{self.site.path}` a part has functions "
                "behind each other, and their mean with others is no change of weights"
            )
        for n, units in enumerate(self.branches):
            for unit in units:
                for owner, name, own, change in unit.weights(root):
                    yield owner, name, f"{n}.{own}", self.scale * factors[n] * change


@dataclass(frozen=True)
class Mix(Operator, Mechanism):
    """An operator that mixes, at each spot, the changes that its parts make: define `mix`, and
    `tensors` where it has some of its own."""

    mechanism: ClassVar[str] = "mix"
    unit: ClassVar[type[Unit]] = MixUnit
    summed: ClassVar[bool] = False
    """Whether changes of weights are left to act by themselves, each with its factor."""

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors of the parts, where they are constants."""
        return ()

    @property
    def freezes(self) -> bool:
        """Whether the parts are kept as they are given."""
        return False

    def mix(
        self, t: MixUnit, module: nn.Module, h: Tensor, changes: Sequence[Tensor | None]
    ) -> Tensor:
        """What is added at a spot.

        Args:
            t: the unit at the spot.
            module: that the spot is of.
            h: what is there without the parts.
            changes: by each part, in the shape of h; None of a part that does not act here.
        """
        raise NotImplementedError

    def check(self, step: Step, atlas: Atlas) -> None:
        """Refuses a unit whose change cannot be mixed, though there is a spot of it."""

    def spot(self, site: Site, module: nn.Module) -> Spot:
        return Spot("input" if site.entry else "output" if site.exit else "weight", site.path)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        return {}

    def arranged(
        self, below: list[list[Step]], name: str, atlas: Atlas, shared: dict[str, dict[str, Param]]
    ) -> list[Step]:
        found: list[Step] = []
        spots: dict[Spot, Step] = {}
        for branch, steps in enumerate(below):
            for step in steps:
                step = self._kept(step, shared) if self.freezes else step
                if not step.inside:
                    spot = self._spot(step, atlas)
                    if spot is None:
                        step = step.scaled(self.factors[branch])
                    else:
                        if spot not in spots:
                            spots[spot] = self._mixer(name, spot, step, atlas)
                        step = step._replace(inside=spots[spot].key, branch=branch)
                found.append(step)
        sites = watched(self, [mixer.site for mixer in spots.values()], atlas)
        mixers = [
            mixer._replace(site=site, tensors=self.tensors(site, atlas))
            for mixer, site in zip(spots.values(), sites, strict=True)
        ]
        return found + mixers

    def _spot(self, step: Step, atlas: Atlas) -> Spot | None:
        spot = step.spec.spot(step.site, atlas.modules[step.site.path])
        if self.summed and (spot is None or spot.side == "weight"):
            return None
        if spot is None:
            raise AttachError(
                f"`{self.kind}` mixes what its parts add to hidden states, token by token, and "
                f"`{step.spec.kind}` at `{step.site.path or 'the root'}` changes what is one for "
                f"all tokens; put it beside: `{self.kind}(...) + {step.spec.kind}`"
            )
        self.check(step, atlas)
        return spot

    def _mixer(self, name: str, spot: Spot, first: Step, atlas: Atlas) -> Step:
        site, path, side = first.site, spot.path, spot.side
        here = Site(
            path, site.role, site.stack, site.layer, entry=path if side == "input" else "",
            exit=path if side == "output" else "", width=_width(spot, site, atlas),
        )  # fmt: skip
        return Step(name, f"{name}.{path}{SUFFIX[side]}", self, here, {})

    @staticmethod
    def _kept(step: Step, shared: dict[str, dict[str, Param]]) -> Step:
        if step.shared:
            held = shared[step.shared]
            shared[step.shared] = {n: p._replace(trained=False) for n, p in held.items()}
        return step.kept()


def _apart(units: Sequence[Unit]) -> bool:
    """Whether units at one spot change other features each, so that their changes add up."""
    rows = {unit.site.rows for unit in units}
    return len(units) < 2 or (None not in rows and len(rows) == len(units))


def _width(spot: Spot, site: Site, atlas: Atlas) -> int:
    """The number of features at a spot."""
    module = atlas.modules[spot.path]
    if linear(module):
        return matrix(spot.path, module)["shape"][-1 if spot.side == "input" else -2]
    return module.embedding_dim if isinstance(module, nn.Embedding) else site.width


def present(changes: Sequence[Tensor | None]) -> tuple[list[int], Tensor]:
    """The numbers of the parts that act, and their changes (..., parts, width)."""
    here = [n for n, change in enumerate(changes) if change is not None]
    return here, torch.stack([changes[n] for n in here], -2)  # type: ignore
