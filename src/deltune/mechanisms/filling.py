"""The tensors of a smaller form of a method as those of a larger one."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.unit import Mechanism


def filled(
    spec: Mechanism, other: Mechanism, tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor] | None:  # fmt: skip
    """The tensors of `other` at a site as tensors of `spec` that do the same: filled up with zeros.

    Args:
        spec: the larger form.
        other: a form that may differ in the fields that `spec` names in `sizes`.
        tensors: of `other` at the site, by their own names.
        shapes: of the tensors of `spec` there.

    Returns:
        None where it is no such form, or a larger one.
    """
    if type(other) is not type(spec) or tensors.keys() != shapes.keys() or not spec.sizes:
        return None
    if replace(other, **{name: getattr(spec, name) for name in spec.sizes}) != spec:
        return None
    found = {}
    for name, shape in shapes.items():
        gaps = [b - a for a, b in zip(tensors[name].shape, shape, strict=True)]
        if any(gap < 0 for gap in gaps):
            return None
        found[name] = F.pad(tensors[name], [k for gap in reversed(gaps) for k in (0, gap)])
    ours, theirs = spec.strength(found), other.strength(tensors)
    if ours == theirs:
        return found
    if not ours:
        return None
    return found | {name: theirs / ours * found[name] for name in spec.scaled if name in found}
