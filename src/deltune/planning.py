"""Plan, then apply: what a spec means on a model, before anything is touched."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from deltune.errors import AttachError, SpecError
from deltune.mechanisms.head import HeadOnly
from deltune.mechanisms.masks import watched
from deltune.mechanisms.step import Step
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Mechanism
from deltune.sites.discover import Atlas, discover
from deltune.sites.packed import size
from deltune.sites.site import Site
from deltune.spec import Composite, Operator, Spec, primitives
from deltune.vector import Layout

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every unit of a delta on a model: printable, countable, nothing attached yet."""

    spec: Spec
    atlas: Atlas = field(repr=False, compare=False)
    steps: tuple[Step, ...]
    shared: dict[str, dict[str, Param]]

    @property
    def model(self) -> str:
        """The model's class."""
        return type(self.atlas.model).__name__

    @property
    def backbone(self) -> int:
        """Scalars of the model."""
        return sum(map(size, {id(p): p for p in _parameters(self.atlas)}.values()))

    @property
    def layout(self) -> Layout:
        """The delta's vector layout."""
        return Layout.of({name: param.shape for name, param in self.params() if param.trained})

    def params(self) -> Iterator[tuple[str, Param]]:
        """Names and declarations of all tensors, in model order, shared ones before their sites."""
        opened = set()
        for step in self.steps:
            if step.shared and step.shared not in opened:
                opened.add(step.shared)
                for name, param in self.shared[step.shared].items():
                    yield f"{step.shared}.{name}", param
            for name, param in step.tensors.items():
                yield f"{step.key}.{name}", param

    def count(self) -> int:
        """Number of trainable scalars."""
        return self.layout.size

    def __str__(self) -> str:
        from deltune.show import plan_text

        return plan_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from deltune.show import plan_html

        return plan_html(self)


def plan(model: nn.Module, spec: Spec | str, *, head: bool = True) -> Plan:
    """What `attach` would do: each site with its role, shape, tensors and cost. Changes nothing.

    Args:
        model: any PyTorch model.
        spec: a spec, or its text.
        head: whether a newly initialised task head (of a transformers classification model)
            trains and is saved with the delta.

    Raises:
        WhereError: a `where` that matches nothing, or in part; unknown roles.
        SpecError: a rank above the matrix, a method on a site that it cannot serve.
        AttachError: a site that no mechanism can reach.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> dt.plan(model, "lora(rank=2, where='0')").count()
        16
    """
    return resolve(discover(model), read(spec), head)


def read(spec: Spec | str) -> Spec:
    """A spec from a spec or its text."""
    from deltune.spec import parse

    if isinstance(spec, str):
        return parse(spec)
    if not isinstance(spec, Spec):
        raise SpecError(
            f"{spec!r} is not a spec; use e.g. `dt.LoRA(rank=8)` or its text `lora(rank=8)`"
        )
    return spec


def resolve(atlas: Atlas, spec: Spec, head: bool) -> Plan:
    """The plan of a spec on an atlas."""
    own = [HeadOnly()]
    if not head or not atlas.heads or any(isinstance(one, HeadOnly) for one in primitives(spec)):
        own = []
    names = iter(named([*nodes(spec), *own]))
    shared: dict[str, dict[str, Param]] = {}
    steps = [step for one in (spec, *own) for step in _steps(one, names, atlas, shared)]
    _disjoint(steps)
    return Plan(spec, atlas, tuple(steps), shared)


def nodes(spec: Spec) -> Iterator[Spec]:
    """The specs that have units: methods, and behind their parts the operators that mix."""
    if isinstance(spec, Composite):
        yield from nodes(spec.expand())
    elif isinstance(spec, Operator):
        for part in spec.parts:
            yield from nodes(part)
    if isinstance(spec, Mechanism) or not isinstance(spec, Composite | Operator):
        yield spec


def _steps(
    spec: Spec, names: Iterator[tuple[str, Spec]], atlas: Atlas, shared: dict[str, dict[str, Param]]
) -> list[Step]:
    """The units to be made of a spec."""
    if isinstance(spec, Composite):
        return _steps(spec.expand(), names, atlas, shared)
    if isinstance(spec, Operator):
        below = [_steps(part, names, atlas, shared) for part in spec.parts]
        name = next(names)[0] if isinstance(spec, Mechanism) else ""
        return spec.arranged(below, name, atlas, shared)
    if not isinstance(spec, Mechanism):
        raise SpecError(f"`{spec}` has no mechanism and cannot be attached")
    return list(_part(next(names)[0], spec, atlas, shared))


def named(members: Iterable[S]) -> list[tuple[str, S]]:
    """The parts of a delta with the names under which their tensors are: the kind, numbered from
    the second of a kind on."""
    times: dict[str, int] = {}
    found = []
    for part in members:
        count = times[part.kind] = times.get(part.kind, 0) + 1
        found.append((part.kind if count == 1 else f"{part.kind}_{count}", part))
    return found


def _parameters(atlas: Atlas) -> Iterator[nn.Parameter]:
    for module in atlas.modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


def _part(
    name: str, part: Mechanism, atlas: Atlas, shared: dict[str, dict[str, Param]]
) -> Iterator[Step]:
    sites = watched(part, part.sites(atlas), atlas)
    groups: dict[str, list[Site]] = {}
    for site in sites:
        if part.group(site):
            groups.setdefault(part.group(site), []).append(site)
    keys = {group: f"{name}.shared:{group}" for group in groups}
    for group, members in groups.items():
        shared[keys[group]] = part.shared(members)
    for site in sites:
        key = f"{name}.{site.key}" if site.key else name
        yield Step(name, key, part, site, part.tensors(site, atlas), keys.get(part.group(site), ""))


def _disjoint(steps: list[Step]) -> None:
    seen: set[str] = set()
    for step in steps:
        if step.key in seen:
            raise AttachError(f"`{step.spec.kind}` names the site `{step.site.path}` twice")
        seen.add(step.key)
