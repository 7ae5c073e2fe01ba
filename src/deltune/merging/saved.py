"""A delta without its model: its parts, and at each place a unit that holds its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.attaching import Description
from deltune.delta import Delta
from deltune.errors import MergeError, StoreError, listing
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.modules import Node, at, pretrained
from deltune.mechanisms.terms import Value
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.merging.algebra import Term, wide
from deltune.planning import named, resolve
from deltune.sites.discover import discover
from deltune.sites.site import Site, read_noted
from deltune.spec import Operator, Spec, Sum, primitives
from deltune.store.native import ABOUT, read_shapes, read_tensors

DAMAGE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""What a unit raises that lacks a tensor, or has one of another shape."""


@dataclass(frozen=True, slots=True)
class Part:
    """One method of a delta, with its units by the name of their place below the part."""

    spec: Mechanism
    units: Mapping[str, Unit]


@dataclass(frozen=True, slots=True)
class Saved:
    """A delta, read whole."""

    label: str
    """The folder or the name, for messages."""
    spec: Spec
    head: bool
    """Whether a task head belongs to it."""
    scale: float
    backbone: Mapping[str, Any]
    parts: Mapping[str, Part]
    trained: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    value: Value | None
    """Gives parameters of the backbone; None where it is not there."""

    @classmethod
    def read(cls, source: "str | Path | Delta", model: nn.Module | None = None) -> "Saved":
        """A delta from its folder, or one that is attached.

        Args:
            source: the folder that `Delta.save` wrote, or a delta.
            model: the backbone, where a change is computed from its weights.

        Raises:
            StoreError: no such folder, a damaged one, or one without a note of its places.
        """
        return _attached(source) if isinstance(source, Delta) else _folder(Path(source), model)

    def terms(self, unit: Unit) -> dict[str, Term]:
        """What a unit adds, in float64.

        Raises:
            MergeError: it has no sum, or is computed from weights that are not here.
            StoreError: its tensors are not those of its method at this place.
        """
        try:
            with torch.no_grad():
                value = self.value or partial(_unknown, unit)
                found = {name: wide(term) for name, term in unit.terms(value).items()}
        except DAMAGE as error:
            raise StoreError(
                f"the tensors of `{self.label}` at `{unit.site.path}` are not those of "
                f"`{unit.spec.kind}` there ({error!r}); the folder is damaged, or the `model` "
                "another one: save the delta again"
            ) from error
        for term in found.values():
            if not isinstance(term, LowRank) and not term.isfinite().all():
                raise MergeError(
                    f"`{self.label}`: the change by `{unit.spec.kind}` at `{unit.site.path}` is "
                    "computed from the model's weights; give the `model`"
                )
        return found

    def below(self, part: str, kept: bool = False) -> dict[str, Tensor]:
        """The tensors of a part by their names below it."""
        every = self.kept if kept else self.trained
        mark = f"{part}."
        return {n.removeprefix(mark): t.cpu() for n, t in every.items() if n.startswith(mark)}


def _check_sum(label: str, spec: Spec) -> None:
    """Refuses a delta that an operator has made, whose parts are no terms of a sum."""
    own = spec.parts if isinstance(spec, Sum) else (spec,)
    odd = next((one for one in own if isinstance(one, Operator)), None)
    if odd is not None:
        raise MergeError(
            f"`{label}` is made by `{odd.kind}`, and its tensors are no terms of a sum; merge its "
            "parts, or make one delta of several with `deltune.algebra.compose`"
        )


def _attached(delta: Delta) -> Saved:
    tree = delta.tree
    _check_sum(delta.name, tree.spec)
    parts: dict[str, Part] = {}
    places = {id(unit): path for path, unit in tree.places().items()}
    for part, units in tree.parts.items():
        own = {places[id(u)].removeprefix(part).lstrip("."): u for u in units}
        parts[part] = Part(units[0].spec, own)
    every, trained = delta.tensors(), tree.named().keys()
    return Saved(
        delta.name, tree.spec, tree.with_head, tree.factor, delta.backbone(), parts,
        {n: t for n, t in every.items() if n in trained},
        {n: t for n, t in every.items() if n not in trained},
        _of_model(delta.model),
    )  # fmt: skip


def _folder(path: Path, model: nn.Module | None) -> Saved:
    about = Description.read(path)
    try:
        sites = None if about.sites is None else read_noted(about.sites)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise StoreError(f"`{path}/{ABOUT}` is incomplete or damaged: {error!r}") from None
    spec, head, scale, layout = about.spec, about.head, about.scale, about.layout
    _check_sum(str(path), spec)
    if sites is None:
        sites = _planned(path, spec, head, model)
    shapes = read_shapes(path)
    lacking = {name: shape for name, shape in layout.items() if shapes.get(name) != shape}
    tensors = read_tensors(path, shapes | lacking)  # says what is missing or of another shape
    trained = {name: tensors[name] for name in layout}
    kept = {name: tensor for name, tensor in tensors.items() if name not in layout}
    _check_kinds(path, spec, trained, kept)
    parts = _parts(path, spec, sites, trained, kept, scale)
    value = None if model is None else _of_model(model)
    return Saved(str(path), spec, head, scale, about.backbone, parts, trained, kept, value)


def _check_kinds(path: Path, spec: Spec, trained: Iterable[str], kept: Iterable[str]) -> None:
    """Refuses a layout that lacks a tensor whose like is trained elsewhere in the same part, or all
    of a method that trains some."""
    own, others = (
        {(name.partition(".")[0], name.rpartition(".")[2]) for name in names}
        for names in (trained, kept)
    )
    parts, trains = {part for part, _ in own}, named(primitives(spec))
    lacking = [n for n, m in trains if isinstance(m, Mechanism) and m.trains and n not in parts]
    if lacking or own & others:
        such = [f"{part}.*" for part in lacking] + [f"{n}.*.{own}" for n, own in own & others]
        raise StoreError(
            f"the layout in `{path}/{ABOUT}` lacks trained tensors, such as {listing(such, 3)}; "
            "save the delta again"
        )


def _planned(path: Path, spec: Spec, head: bool, model: nn.Module | None) -> dict[str, Site]:
    if model is None:
        raise StoreError(
            f"`{path}` was saved by a version that did not note its places; give the `model`, or "
            "load the delta and save it again"
        )
    return {step.key: step.site for step in resolve(discover(model), spec, head).steps}


def _parts(
    path: Path, spec: Spec, sites: Mapping[str, Site], trained: Mapping[str, Tensor],
    kept: Mapping[str, Tensor], scale: float,
) -> dict[str, Part]:  # fmt: skip
    methods = dict(named(primitives(spec)))
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in {**trained, **kept}.items():
        place, _, own = name.rpartition(".")
        owned.setdefault(place, {})[own] = tensor
    shared: dict[str, nn.Module] = {}
    units: dict[str, dict[str, Unit]] = {}
    for key, site in sites.items():
        name = next((n for n in (*methods, "head") if f"{key}.".startswith(f"{n}.")), "")
        method = methods.get(name) or _head()
        if not name or not isinstance(method, Mechanism):
            raise StoreError(f"`{path}/{ABOUT}` has a place `{key}` that no part of `{spec}` has")
        group = method.group(site) and f"{name}.shared:{method.group(site)}"
        if group and group not in shared:
            shared[group] = _filled(Node(), owned.pop(group, {}), trained, group)
        unit = method.unit(method, site, shared.get(group))
        unit.__dict__["scale"] = scale
        _filled(unit, owned.pop(key, {}), trained, key)
        units.setdefault(name, {})[key.removeprefix(name).lstrip(".")] = unit
    if owned:
        raise StoreError(f"`{path}` has tensors at {listing(owned, 4)}, which are no places of it")
    return {name: Part(next(iter(own.values())).spec, own) for name, own in units.items()}


def _head() -> Mechanism:
    from deltune.mechanisms.head import HeadOnly

    return HeadOnly()


def _filled(
    owner: nn.Module, tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], key: str
) -> Any:
    for own, tensor in tensors.items():
        if f"{key}.{own}" in trained:
            owner._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[own] = tensor
    return owner


def _of_model(model: nn.Module) -> Value:
    return lambda path, name: pretrained(at(model, path), name).detach()


def _unknown(unit: Unit, path: str, name: str) -> Tensor:
    """Not-a-numbers in the place of a parameter: what is computed from its shape alone is right,
    what is computed from its values is none either."""
    own, site = unit._parameters.get(name), unit.site
    shape = tuple(own.shape) if own is not None else site.shape
    if not shape:
        raise MergeError(
            f"`{unit.spec.kind}` needs the pre-trained `{name}` of `{path}`; give the `model`"
        )
    if site.rows is not None:
        shape = (*shape[:-2], shape[-2] // site.rows.length * site.rows.group, shape[-1])
    if site.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return torch.full((), torch.nan).expand(shape)
