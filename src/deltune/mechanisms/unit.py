"""A unit: the tensors of one delta at one site, and the hooks through which they act.

Hooks are bound methods of the unit, which is a registered submodule of the model: so copies,
pickles and compiled models act through their own tensors. The modules of the backbone keep class,
names and state-dict keys.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltune.errors import AttachError, MergeError
from deltune.mechanisms.lanes import Lane
from deltune.mechanisms.modules import (
    ORIGINALS,
)
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.terms import Held, Terms, Value
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Spec

if TYPE_CHECKING:
    from deltune.mechanisms.factors import LowRank

INTO = "merge each into the model, with `delta.merge()`"


class Losses(Protocol):
    """Gives losses of training examples, for methods that look at them before the first step."""

    def __call__(
        self, most: int, size: int | None = None, training: bool = True
    ) -> Iterator[Tensor]:
        """Mean losses with their graphs, until `most` examples were seen.

        Args:
            most: number of examples, at most.
            size: examples to a loss; None for those of a batch as training uses it.
            training: whether the model is in train mode (dropout on).
        """
        ...


class Rate(NamedTuple):
    """How a tensor is stepped: its factor on the learning rate, and whether weights decay."""

    factor: float = 1.0
    decayed: bool = True


class Spot(NamedTuple):
    """Where hidden states are changed: what a module puts out, what it is given, or its weight, of
    which a change is evaluated at the output.

    Changes at one spot follow each other; those of weights come before those of outputs.
    """

    side: Literal["weight", "output", "input"]
    path: str


class Unit(nn.Module):
    """One delta's tensors at one site.

    Attributes:
        spec: the method.
        site: the place.
        scale: factor on the unit's effect: `share`, times `delta.scale` if nothing scales it later.
        share: the constant part of that, which averages set.
        when: its turn, or a later one that a stack asks for.
        mixer: the unit through which it acts; None if it acts by itself.
        bare: whether its hooks give the change alone, for the mixer, where it has such a form.
        fixed: whether its tensors are kept as they were given.
        lane: the rows of a batch that it acts on; None for all.
        crowd: how many acting units change the parameters of each module, while this one acts.
        home: the module at the site, while this one acts.
        shared: the module with the tensors that this unit shares with others, or None.
    """

    scalable: ClassVar[bool] = True
    bares: ClassVar[bool] = False
    """Whether its hooks can give the change alone."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # a method reads its tensors: t.A, t.shared.E
            ...

    def __init__(self, spec: "Mechanism", site: Site, shared: nn.Module | None) -> None:
        super().__init__()
        self.site: Site
        self.scale: float
        self.crowd: Counter[str]
        self.home: nn.Module
        self.handles: list[RemovableHandle]
        self.lane: Lane | None
        self.share: float
        self.when: int
        self.mixer: Any
        self.bare: bool
        self.fixed: bool
        # `shared` and `mixer` are known, not owned: no submodules. None needs `nn.Module`'s checks.
        self.__dict__.update(
            spec=spec, site=site, scale=1.0, share=1.0, when=0, handles=[], lane=None,
            shared=shared, mixer=None, bare=False, fixed=False,
        )  # fmt: skip

    def renew(self, identity: str) -> None:
        """Its tensors are now those of another delta, known by this text."""

    def own(self, name: str) -> Tensor:
        """The unit's tensor of this name, also where `nn.Module` uses the name for itself."""
        tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
        assert tensor is not None
        return tensor

    def scale_by(self, factor: float) -> None:
        """Sets the scale of the delta; of units that act through another, that one has it."""
        value = self.share if self.mixer is not None else self.share * factor
        self.__dict__["scale"] = value  # a module below may be called `scale`

    @property
    def changed(self) -> Iterable[str]:
        """The modules whose parameters it changes."""
        owners = {f"{anchor}.{inner}".strip(".") for _, anchor, inner, _ in self.site.places}
        return owners or {self.site.path} if self.turn == 0 else set()

    def alone(self, module: nn.Module) -> bool:
        """Whether nothing else changes the parameters of this module, the one at the site."""
        return self.crowd[self.site.path] == 1 and ORIGINALS not in module.__dict__

    @property
    def turn(self) -> int:
        """When it acts among those at one place: 0 for changes of weights, which come first."""
        return 0

    @property
    def reads(self) -> bool:
        """Whether its effect depends on the output that it changes, and so on what came before."""
        return False

    @property
    def stream(self) -> set[str]:
        """The modules at which that output can be changed."""
        return {self.site.path}

    @property
    def behind(self) -> Sequence["Unit"]:
        """The units that act through this one."""
        return ()

    @property
    def hooked(self) -> set[int]:
        """Where its hooks are, while it acts: those of one place are called in their order."""
        return {id(handle.hooks_dict_ref()) for handle in self.handles}

    def install(self, root: nn.Module) -> None:
        """Lets the unit act."""
        raise NotImplementedError

    def remove(self, root: nn.Module) -> None:
        """Takes the unit's hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def mine(self, x: Tensor) -> Tensor:
        """The rows of `x` that the unit acts on."""
        return x if self.lane is None else self.lane.take(x)

    def ran(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the module, without hooks, makes of `x` in the unit's rows."""
        return module.forward(x) if self.lane is None else self.lane.run(module, x)

    def change_output(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Lets `hook(module, args, output)` change what the module puts out, in the unit's rows."""
        if self.mixer is not None:
            self.mixer.gather(self, hook)
        elif self.lane is None:
            self.after(module, hook)
        else:
            self.handles += self.lane.change_output(module, hook)

    def change_input(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Lets `hook(module, args)` change what the module is given, in the unit's rows."""
        if self.mixer is not None:
            self.mixer.gather(self, hook)
        elif self.lane is None:
            self.before(module, hook)
        else:
            self.handles += self.lane.change_input(module, hook)

    def bracket(
        self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]
    ) -> None:
        """Calls `enter(module, args)` and `leave(module, args, output)`, which comes in any case,
        around the module's forward, for the unit's rows."""
        if self.lane is None:
            self.before(module, enter)
            self.after(module, leave, always=True)
        else:
            self.handles += self.lane.bracket(module, enter, leave)

    def before(self, module: nn.Module, hook: Callable[..., Any], kwargs: bool = False) -> None:
        """Calls `hook` before the module's forward, with all rows."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs))

    def after(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Calls `hook` after the module's forward, with all rows; `always`: also when it failed."""
        self.handles.append(module.register_forward_hook(hook, always_call=always))

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        """(module, parameter name, own name, change) of every parameter that merging changes."""
        raise AttachError(
            f"`{self.spec.kind}` cannot be merged: its effect is no change of weights"
        )

    def terms(self, value: Value) -> "dict[str, LowRank | Tensor]":
        """What the unit adds, scaled, by own names: coordinates in which the effects of several
        deltas at one place add up. Factors of a matrix's change, or a tensor.

        Raises:
            MergeError: it adds nothing of the kind, being no linear function of anything.
        """
        merges = self.spec.merges
        what = "none that its tensors could hold a sum of" if merges else "none of weights"
        raise MergeError(
            f"`{self.spec.kind}` has no sum: the change that it makes is {what}, and sums of its "
            "tensors do other things; give the delta that all were trained from, as `start`"
            + (f", or {INTO}" if merges else "")
        )


@dataclass(frozen=True)
class Mechanism(Spec):
    """A spec that acts through one mechanism; what a method defines beside its fields."""

    unit: ClassVar[type[Unit]] = Unit
    trains: ClassVar[bool] = True
    """Whether it has tensors that are trained, beside those that are kept."""
    owns: ClassVar[bool] = False
    """Whether its tensors are values in the place of the model's own (a head's), not changes."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields in which a smaller form that does the same may differ: see `mechanisms.filling`."""
    scaled: ClassVar[tuple[str, ...]] = ()
    """Tensors that take up what `strength` differs by between two such forms."""

    @property
    def gated(self) -> bool | str:
        """How the effect is gated, as the field `gate` says where a method has one: see `gate`."""
        return getattr(self, "gate", False)

    @property
    def watches(self) -> bool:
        """Whether the units look at the masks of the self-attention beside them: see `masks`."""
        return self.gated not in (False, "token")

    def sites(self, atlas: Atlas) -> list[Site]:
        """The places that the method acts on, in model order."""
        raise NotImplementedError

    def spot(self, site: Site, module: nn.Module) -> Spot | None:
        """Where a unit at this site, with its module, changes hidden states token by token; None if
        what it does is no such change."""
        return None

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        """The tensors that the method owns at a site."""
        raise NotImplementedError

    def group(self, site: Site) -> str:
        """Names the group of sites that share tensors with this one; '' for none."""
        return ""

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        """The tensors that the sites of one group share."""
        return {}

    def strength(self, tensors: Mapping[str, Tensor]) -> float:
        """Factor of the spec on what the tensors of a site make, by their own names."""
        return 1.0

    def fold(self, units: Mapping[str, Unit]) -> tuple["Mechanism", dict[str, Tensor]] | None:
        """The plain spec and tensors with the same effect as these units, if the method has a
        training-time form that folds away.

        Args:
            units: all units of the delta with this spec, by the name of their place below it.

        Returns:
            A spec, and every tensor of it by its name below the place: `encoder.layer.0.K`,
            `shared:all.values`.
        """
        return None

    # What arithmetic on deltas without a model asks: see `merging`.

    whole: ClassVar[bool] = False
    """Whether it can hold any change of any matrices, however it came about."""

    @property
    def linear(self) -> bool:
        """Whether its effect is linear in the trained tensors, so that sums of tensors of equal
        specs are sums of effects."""
        return False

    @property
    def meant(self) -> Any:
        """The `where` by which its places are found."""
        return getattr(self, "where", "")

    def over(self, where: Any) -> "Mechanism":
        """The same method at other places."""
        return replace(self, where=where)  # type: ignore[call-arg]

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """This method with tensors of these terms: the opposite of `Unit.terms`.

        Args:
            terms: by the place below the delta's part, then by own names.
            units: those places, with tensors of a delta that was one of the sources.

        Raises:
            MergeError: no tensors of this method have them, or no closed form is known.
        """
        plain = self.fold(units)
        if plain is None:
            matrices = self.mechanism == "weight"
            raise MergeError(
                f"`{self}` cannot hold a given change of weights: no closed form is known; "
                + ("name another method that can, as `to`" if matrices else INTO)
            )
        return plain[0].hold(terms, units)

    # What the method asks of training beyond plain optimiser steps: see `training.course`.

    @property
    def demands(self) -> bool:
        """Whether training must call the methods below; a plain loop is refused then."""
        return False

    @property
    def asks(self) -> bool:
        """Whether plain optimiser steps at one learning rate would train it wrongly."""
        return self.demands or any(rate.factor != 1.0 for rate in self.rates().values())

    def rates(self) -> Mapping[str, Rate]:
        """How own tensors, by their name or a glob such as `*:alpha`, are stepped unlike the
        others."""
        return {}

    def prepare(self, units: Sequence[Unit], losses: Losses) -> None:
        """Before the first step, with the loss of training examples at hand."""

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        """Before step `step` of `steps`, counted from 0; `seed` is the same in every process."""

    def penalty(self, units: Sequence[Unit]) -> Tensor | None:
        """What is added to the loss; its gradient joins that of the loss."""
        return None

    def after_backward(self, units: Sequence[Unit], seed: int) -> None:
        """Between the gradients and their clipping."""

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        """After the optimiser has stepped."""

    def settled(self, units: Sequence[Unit]) -> bool:
        """Whether the units are what the spec says they become; until then no evaluation counts
        as the best."""
        return True

    def note(self, units: Sequence[Unit], model: nn.Module) -> str:
        """What there is to say of the units beside their number of scalars, in a few words."""
        return ""
