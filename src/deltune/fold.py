"""Folding: training-time forms become their plain equivalent."""

from typing import TYPE_CHECKING

from torch import Tensor

from deltune.errors import AttachError
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.spec import Spec, Sum, parts

if TYPE_CHECKING:
    from deltune.delta import Delta


def folded(delta: "Delta") -> "Delta":
    """The delta with every part in its plain form."""
    from deltune.attaching import attach

    tree = delta.tree
    plain: dict[Mechanism, Mechanism] = {}
    tensors: dict[str, Tensor] = {}
    for key, unit in _keys(delta):
        result = unit.spec.fold(unit)
        if result is None:
            tensors.update(
                {f"{key}.{own}": p.detach() for own, p in unit._parameters.items() if p is not None}
            )
        else:
            plain[unit.spec] = result[0]
            tensors.update({f"{key}.{own}": value.detach() for own, value in result[1].items()})
    if not plain:
        raise AttachError(f"nothing in `{delta.spec}` folds: it is already in its plain form")
    members: list[Spec] = [
        plain.get(part, part) if isinstance(part, Mechanism) else part for part in parts(delta.spec)
    ]
    spec = members[0] if len(members) == 1 else Sum(tuple(members))
    enabled, head = tree.enabled, tree.with_head
    delta.detach()
    attach(delta.model, spec, delta.name, head=head).load_tensors(tensors)
    if not enabled:
        delta.disable()
    return delta


def _keys(delta: "Delta") -> list[tuple[str, Unit]]:
    names = {id(owner): name.rpartition(".")[0] for name, owner, _ in delta.tree.entries}
    paths = {id(m): path for path, m in delta.tree.named_modules()}
    return [(names.get(id(unit), paths[id(unit)]), unit) for unit in delta.tree.units]
