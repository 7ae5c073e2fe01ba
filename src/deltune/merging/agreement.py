"""What deltas must have in common before they are merged."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from deltune.errors import MergeError, listing
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.merging.saved import Part, Saved
from deltune.sites.site import Site, form
from deltune.sites.where import terms
from deltune.store.identity import describe

Head = int | Literal["mean", "none"] | None
NEAR = 0.2
"""Least cosine of a delta's tensors with those that it is said to have started from."""


def one_backbone(deltas: Sequence[Saved], force: bool) -> None:
    """Refuses deltas of different backbones, unless forced."""
    first = deltas[0]
    for delta in deltas[1:]:
        if not force and delta.backbone.get("weights") != first.backbone.get("weights"):
            raise MergeError(
                f"`{first.label}` and `{delta.label}` were trained on different backbones:\n"
                f"  {describe(dict(first.backbone))}\n  {describe(dict(delta.backbone))}\n"
                "merge deltas of one backbone, or pass `force=True` if you know that they agree"
            )


def present(parts: Sequence[Part | None]) -> list[Part]:
    """The parts that are there."""
    return [part for part in parts if part is not None]


def together(mine: Sequence[Sequence[Part]]) -> tuple[dict[str, Unit], Mechanism]:
    """The places of the parts of all deltas, and the first part's method over all of them.

    Raises:
        MergeError: one name means two places, or no `where` means just those of all.
    """
    units: dict[str, Unit] = {}
    every = [part for parts in mine for part in parts]
    for part in every:
        for key, unit in part.units.items():
            known = units.setdefault(key, unit)
            if (known.site.path, form(known.site)) != (unit.site.path, form(unit.site)):
                raise MergeError(
                    f"`{unit.spec}` acts in another way at `{key}` than `{known.spec}`: the place "
                    "or its entries differ; merge deltas of one spec"
                )
    first = every[0].spec
    if all(set(part.units) == set(units) for part in every):
        return units, first
    return units, first.over(_union([part.spec for part in every]))


def _union(specs: Sequence[Mechanism]) -> str:
    wheres = list(dict.fromkeys(spec.meant for spec in specs))
    plain = all(isinstance(where, str) and where and "!" not in where for where in wheres)
    if len(wheres) < 2 or not plain or any(spec.within for spec in specs):
        raise MergeError(
            f"{listing(dict.fromkeys(map(str, specs)))} are at different places, and no `where` "
            "is known that means all of them; merge deltas of one `where`"
        )
    return ", ".join(dict.fromkeys(term for where in wheres for term in terms(where)))


def same_kept(deltas: Sequence[Saved], name: str, parts: Sequence[Part | None]) -> bool:
    """Whether a part has one spec in all deltas that have it, and the same tensors that are not
    trained."""
    here = [i for i, part in enumerate(parts) if part is not None]
    if len({str(part.spec) for part in present(parts)}) > 1:
        return False
    first = deltas[here[0]].below(name, kept=True)
    return all(
        torch.equal(tensor, first[own])
        for i in here
        for own, tensor in deltas[i].below(name, kept=True).items()
    )


def common_start(deltas: Sequence[Saved], start: Saved, force: bool) -> Saved:
    """The start, if every delta can have come from it.

    Raises:
        MergeError: another spec, layout, scale or backbone, other kept tensors, or tensors that
            have next to nothing in common with those of the start.
    """
    one_backbone([start, *deltas], force)
    shapes = {name: tensor.shape for name, tensor in start.trained.items()}
    for delta in deltas:
        theirs = {name: tensor.shape for name, tensor in delta.trained.items()}
        same = delta.spec == start.spec and theirs == shapes and delta.scale == start.scale
        if not same or not _equal(delta.kept, start.kept):
            raise MergeError(
                f"`{delta.label}` (`{delta.spec}`) did not start from `{start.label}` "
                f"(`{start.spec}`): spec, shapes, scale or kept tensors differ"
            )
        near = _nearness(delta, start)
        if near < NEAR and not force:
            raise MergeError(
                f"`{delta.label}` did not start from `{start.label}`, or has left it: the cosine "
                f"of their tensors is {near:.3f}, so means of its parameters have no meaning; give "
                "the right `start`, or pass `force=True` if you know that it is"
            )
    return start


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def _nearness(delta: Saved, start: Saved) -> float:
    """The cosine of all tensors that are not zero at the start, the head's aside."""
    names = [n for n, t in start.trained.items() if t.any() and not n.startswith("head.")]
    if not names:
        return 1.0
    one, other = (
        torch.cat([of.trained[name].double().flatten() for name in names]) for of in (delta, start)
    )
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def one_head(
    deltas: Sequence[Saved], weights: Sequence[float], head: Head
) -> tuple[dict[str, Tensor], dict[str, Site]]:
    """The task head of the merged delta, and its places; nothing where there is none.

    Raises:
        MergeError: heads that differ and no choice of one; a choice that is none.
    """
    if isinstance(head, bool) or not (isinstance(head, int) or head in (None, "mean", "none")):
        raise MergeError(
            f"`keep_head` must be the number of a source, 'mean' or 'none', got {head!r}"
        )
    owners = [(i, n, p) for i, d in enumerate(deltas) for n, p in d.parts.items() if p.spec.owns]
    if isinstance(head, int):
        if head not in {i for i, _, _ in owners}:
            raise MergeError(f"source {head} has no task head; those that do: {_numbers(owners)}")
        owners = [one for one in owners if one[0] == head]
    if head == "none" or not owners:
        return {}, {}
    heads = [deltas[i].below(name) for i, name, _ in owners]
    sites = {key: unit.site for key, unit in owners[0][2].units.items()}
    if all(_equal(one, heads[0]) for one in heads):
        return heads[0], sites
    if head is None:
        raise MergeError(
            f"the task heads of the sources {_numbers(owners)} differ. They are values, no "
            "changes, so they have no sum: choose one by its number, e.g. `keep_head=0`, "
            "or `keep_head='mean'` where all started from the same head, or `keep_head='none'`"
        )
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in heads]
    total = sum(weights[i] for i, _, _ in owners)
    if any(one != shapes[0] for one in shapes) or abs(total) < 1e-12:
        raise MergeError("these task heads have no mean: their shapes differ, or weights sum to 0")
    shares = [weights[i] / total for i, _, _ in owners]
    mean = {
        name: sum((w * one[name].double() for w, one in zip(shares, heads, strict=True)),
                  torch.zeros((), dtype=torch.float64))
        for name in heads[0]
    }  # fmt: skip
    return mean, sites


def _numbers(owners: Sequence[tuple[int, str, Part]]) -> str:
    return listing(str(i) for i, _, _ in owners) or "none"
