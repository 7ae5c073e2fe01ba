"""Folding: training-time forms become their plain equivalent."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from deltune.errors import AttachError
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.planning import named, nodes
from deltune.spec import Composite, Operator, Spec

if TYPE_CHECKING:
    from deltune.delta import Delta


def folded(delta: "Delta") -> "Delta":
    """The delta with every part in its plain form."""
    from deltune.attaching import attach_values

    tree, stored = delta.tree, delta.tensors()
    pieces: list[dict[str, Tensor]] = []
    spec = _plain(delta.spec, iter(named(nodes(delta.spec))), delta, stored, pieces)
    if spec == delta.spec:
        raise AttachError(f"nothing in `{delta.spec}` folds: it is already in its plain form")
    tensors = {n: t for n, t in stored.items() if n.startswith("head.")}
    for (name, _), piece in zip(named(nodes(spec)), pieces, strict=True):
        tensors |= {f"{name}.{own}": value for own, value in piece.items()}
    enabled, head = tree.enabled, tree.with_head
    delta.detach()
    attach_values(delta.model, spec, lambda _: tensors, delta.name, head).skip(tree.skipped)
    delta.scale = tree.factor
    if not enabled:
        delta.disable()
    return delta


def _plain(
    spec: Spec, names: Iterator[tuple[str, Spec]], delta: "Delta", stored: dict[str, Tensor],
    pieces: list[dict[str, Tensor]],
) -> Spec:  # fmt: skip
    """The spec with its methods in their plain form; their tensors, by the names of their places,
    go to `pieces`, in the order of `nodes`."""
    if isinstance(spec, Composite):
        whole = spec.expand()
        plain = _plain(whole, names, delta, stored, pieces)
        return spec if plain == whole else plain
    if isinstance(spec, Operator):
        parts = tuple(_plain(part, names, delta, stored, pieces) for part in spec.parts)
        spec = spec if parts == spec.parts else replace(spec, parts=parts)
        if not isinstance(spec, Mechanism):
            return spec
    name = next(names)[0]
    found = spec.fold(_units(delta, name)) if isinstance(spec, Mechanism) else None
    if found is None:
        mark = f"{name}."
        pieces.append({n.removeprefix(mark): t for n, t in stored.items() if n.startswith(mark)})
        return spec
    pieces.append({n: t.detach() for n, t in found[1].items()})
    return found[0]


def _units(delta: "Delta", name: str) -> dict[str, Unit]:
    """The units of one part, by the name of their place."""
    own = {id(unit) for unit in delta.tree.parts.get(name, [])}
    found = {path: unit for path, unit in delta.tree.places().items() if id(unit) in own}
    return {path.removeprefix(name).lstrip("."): unit for path, unit in found.items()}
