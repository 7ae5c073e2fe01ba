"""Folding: training-time forms become their plain equivalent."""

from typing import TYPE_CHECKING

from torch import Tensor

from deltune.errors import AttachError
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.planning import named
from deltune.spec import Spec, Sum, parts, primitives

if TYPE_CHECKING:
    from deltune.delta import Delta


def folded(delta: "Delta") -> "Delta":
    """The delta with every part in its plain form."""
    from deltune.attaching import attach

    tree, stored = delta.tree, delta.tensors()
    members: list[Spec] = []
    pieces: list[dict[str, Tensor]] = []
    names = iter([name for name, _ in named(primitives(delta.spec))])
    for whole in parts(delta.spec):
        plain: list[Spec] = []
        for part in primitives(whole):
            prefix = f"{next(names)}."
            units = _units(delta, prefix.removesuffix("."))
            found = part.fold(units) if isinstance(part, Mechanism) else None
            own = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            plain.append(found[0] if found else part)
            pieces.append({n: t.detach() for n, t in found[1].items()} if found else own)
        members += [whole] if plain == list(primitives(whole)) else plain
    if members == list(parts(delta.spec)):
        raise AttachError(f"nothing in `{delta.spec}` folds: it is already in its plain form")
    tensors = {n: t for n, t in stored.items() if n.startswith("head.")}
    kept = [one for member in members for one in primitives(member)]
    for (name, _), piece in zip(named(kept), pieces, strict=True):
        tensors |= {f"{name}.{own}": value for own, value in piece.items()}
    spec = members[0] if len(members) == 1 else Sum(tuple(members))
    enabled, head = tree.enabled, tree.with_head
    delta.detach()
    attach(delta.model, spec, delta.name, head=head).load_tensors(tensors).skip(tree.skipped)
    delta.scale = tree.factor
    if not enabled:
        delta.disable()
    return delta


def _units(delta: "Delta", name: str) -> dict[str, Unit]:
    """The units of one part, by the name of their place."""
    own = {id(unit) for unit in delta.tree.parts[name]}
    found = {path: unit for path, unit in delta.tree.places().items() if id(unit) in own}
    return {path.removeprefix(name).lstrip("."): unit for path, unit in found.items()}
