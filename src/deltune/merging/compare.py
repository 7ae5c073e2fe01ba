"""How alike two saved deltas are: at each place the norms of their changes, the angle between them,
and how much of the directions of one lies in those of the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import MergeError
from deltune.mechanisms.weight import Weight
from deltune.merging.agreement import common_start, one_backbone
from deltune.merging.algebra import Term, cosine, inner, norm, precise, ratio, summed, svd
from deltune.merging.saved import Saved
from deltune.sites.site import Site

TOP = 8
"""Directions that are compared, at most."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two deltas at one place."""

    address: str
    """Stack, role and layer, `encoder.attn.q[3]`, or the name of a parameter."""
    role: str
    layer: int | None
    norms: tuple[float, float]
    """Frobenius norms of the changes."""
    cosine: float | None
    """Of the angle between them; None where one is zero or not there."""
    inputs: Tensor | None
    """phi (k, k) of the directions that the changes read; None where they are no matrices."""
    outputs: Tensor | None
    """phi (k, k) of the directions that they write."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two deltas, place by place, and as a whole."""

    labels: tuple[str, str]
    places: tuple[Difference, ...]
    norms: tuple[float, float]
    cosine: float | None


def diff(
    one: str | Path | Delta,
    other: str | Path | Delta,
    *,
    top: int = TOP,
    start: str | Path | Delta | None = None,
    model: nn.Module | None = None,
    force: bool = False,
) -> Comparison:
    """Compares two deltas on one backbone, without a model.

        cos = <T, T'> / (||T|| ||T'||)
        phi(i, j) = || V_i^T V'_j ||_F^2 / min(i, j), from 0 (apart) to 1 (one inside the other)

    with V_i the first i right singular vectors of a change (what it reads from the input; its left
    ones for what it writes) and V'_j those of the other. Of two random subspaces of n dimensions
    phi is max(i, j) / n on average. All from the factors, where there are some.

    Args:
        one: a folder of a saved delta, or an attached delta.
        other: the other.
        top: directions that are compared, at most.
        start: the delta that both were trained from: then their own tensors are compared, as
            differences from it. The only way for methods that are no sums.
        model: the backbone, for methods whose change is computed from its weights.
        force: also for deltas of different backbones.

    Raises:
        MergeError: other backbones, no place in common, a method that has no sum.
        StoreError: a damaged folder.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
    section 7.2 and eq. 4.
    Differs: the singular vectors are those of dW = B A, not of A; of A alone they depend on how
    dW is factored.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.merging import diff
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> a = dt.attach(model, "lora(rank=2, where='0')", "a", seed=0)
        >>> a = a.load_vector(torch.arange(32.0))
        >>> round(diff(a, a).places[0].cosine, 6)
        1.0
    """
    if top < 1:
        raise MergeError(f"`top` must be 1 or more, got {top}")
    pair = [Saved.read(source, model) for source in (one, other)]
    one_backbone(pair, force)
    if start is None:
        changes = [_changes(delta) for delta in pair]
    else:
        first = common_start(pair, Saved.read(start, model), force)
        changes = [_moved(delta, first) for delta in pair]
    keys = list(dict.fromkeys(key for found in changes for key in found))
    if not any(key in changes[0] and key in changes[1] for key in keys):
        raise MergeError(f"`{pair[0].label}` and `{pair[1].label}` have no place in common")
    places = [_difference(key, [found.get(key) for found in changes], top) for key in keys]
    norms = [sum(place.norms[i] ** 2 for place in places) ** 0.5 for i in (0, 1)]
    both = [[found[key][1] for found in changes] for key in keys if all(key in c for c in changes)]
    whole = ratio(sum(inner(*terms) for terms in both), norms[0] * norms[1])
    return Comparison((pair[0].label, pair[1].label), tuple(places), (norms[0], norms[1]), whole)


def _changes(delta: Saved) -> dict[str, tuple[Site, Term]]:
    """What a delta adds at each place, over all of its parts: changes of one matrix by several
    methods are one change."""
    found: dict[str, tuple[Site, Term]] = {}
    for name, part in delta.parts.items():
        if part.spec.owns:
            continue
        for key, unit in part.units.items():
            for own, term in delta.terms(unit).items():
                matrix = isinstance(part.spec, Weight)
                place = key if matrix else f"{name}.{key}.{own}".rstrip(".")
                if place in found:
                    term = summed([found[place][1], term], [1.0, 1.0])
                site = unit.site if matrix else unit.site._replace(param=own)
                found[place] = site, term
    return found


def _moved(delta: Saved, start: Saved) -> dict[str, tuple[Site, Term]]:
    """How far each tensor of a delta is from where it started."""
    found: dict[str, tuple[Site, Term]] = {}
    for name, part in start.parts.items():
        if part.spec.owns:
            continue
        now = delta.below(name)
        for own, first in start.below(name).items():
            place, _, tensor = own.rpartition(".")
            site = part.units[place].site if place in part.units else Site(place)
            site = site._replace(param=tensor, kind="module")
            found[f"{name}.{own}"] = site, precise(now[own]) - precise(first)
    return found


def _difference(key: str, pair: Sequence[tuple[Site, Term] | None], top: int) -> Difference:
    site = next(one[0] for one in pair if one is not None)
    terms = [None if one is None else one[1] for one in pair]
    norms = [0.0 if term is None else norm(term) for term in terms]
    one, other = terms
    matrix = site.kind not in ("sublayer", "module") and bool(site.shape)
    role = site.role if matrix or not site.role else f"{site.role}.{site.param}"
    address = site._replace(role=role).address if matrix or site.role else key
    angle = inputs = outputs = None
    if one is not None and other is not None and all(norms):
        angle = cosine(one, other)
        if matrix:
            inputs, outputs = _overlaps(one, other, top)
    return Difference(address, role, site.layer, (norms[0], norms[1]), angle, inputs, outputs)


def _overlaps(one: Term, other: Term, top: int) -> tuple[Tensor, Tensor]:
    """phi of what they read and of what they write; of several experts the mean."""
    (u1, s1, v1), (u2, s2, v2) = svd(one), svd(other)
    k1, k2 = (min(top, _rank(s)) for s in (s1, s2))
    read = v1[..., :k1, :] @ v2[..., :k2, :].mT
    write = u1[..., :k1].mT @ u2[..., :k2]
    return _phi(read), _phi(write)


def _rank(values: Tensor) -> int:
    """How many singular values are more than rounding, the most of several matrices."""
    least = values.amax(-1, keepdim=True) * 1e-9
    return max(1, int((values > least).sum(-1).max()))


def _phi(products: Tensor) -> Tensor:
    sums = products.square().cumsum(-1).cumsum(-2)
    i, j = (torch.arange(1, size + 1, dtype=sums.dtype) for size in sums.shape[-2:])
    phi = sums / torch.minimum(i[:, None], j)
    return phi.flatten(0, -3).mean(0) if phi.ndim > 2 else phi
