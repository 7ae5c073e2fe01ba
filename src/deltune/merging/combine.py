"""Merging: one saved delta of several, in the space of weight changes, without a model."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

from torch import nn

from deltune.delta import Delta
from deltune.errors import MergeError
from deltune.merging.agreement import Head, common_start, one_backbone, one_head
from deltune.merging.merged import Merged
from deltune.merging.recipe import RECIPES, Recipe
from deltune.merging.saved import Saved
from deltune.merging.ways import Statistics, way_of
from deltune.merging.work import Work
from deltune.spec import Spec, parse

Source = str | Path | Delta


def merge(
    sources: Sequence[Source],
    how: str | Recipe = "linear",
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    density: float | None = None,
    factor: float = 1.0,
    to: Spec | str | None = None,
    keep_head: Head = None,
    start: Source | None = None,
    statistics: Statistics | None = None,
    mixing: float = 0.9,
    model: nn.Module | None = None,
    seed: int = 0,
    force: bool = False,
) -> Merged:
    """Makes one delta of several on one backbone; the sources are only read.

        M = sum_i w_i s_i T_i        `linear`, also task arithmetic: weights 1, -1, 1 are a - b + c

    with T_i what delta i adds at a place and s_i its scale: the change of a matrix or parameter, or
    the factors of features. Of changes in factors the sum is exact at rank sum_i r_i; `rank` gives
    the nearest of that rank (Eckart and Young), from QR of the stacked factors and the SVD of their
    small core: nothing of the size of a matrix is made.

    Args:
        sources: folders of saved deltas, or attached deltas.
        how: `linear`; `slerp`, along the arc between two; `magnitude`, `ties`, `dare`, `dare_ties`,
            `breadcrumbs`, `breadcrumbs_ties` or a `Recipe` (these make one matrix at a time whole);
            `regmean` and `fisher`, which need `statistics`.
        weights: w_i; 1 / n each if not given.
        rank: of changes of matrices in factors; the sum of those of the sources if not given.
            Changes without factors are kept whole then, as entries, unless a rank is given.
        density: share of entries that stay, instead of the recipe's.
        factor: on the result; lambda in task arithmetic.
        to: the method that holds the merged changes of matrices, `lora(rank=8)`, at its own rank if
            no other is given, or `shira`, which keeps every entry that is not 0; that of the
            sources if not given.
        keep_head: whose task head goes along where they differ: the number of a source, `mean` or
            `none`.
        start: the delta as it was before training, the same for all: then the deltas' own tensors
            are merged, as differences from it. The only way for methods that are no sums.
        statistics: for each source what `grams` or `fishers` measured.
        mixing: how much of each Gram matrix counts beside its diagonal, for `regmean`.
        model: the backbone, for methods whose change is computed from its weights.
        seed: of `dare`.
        force: also for deltas of different backbones.

    Returns:
        The merged delta, with the error that `rank` makes; `save` writes it.

    Raises:
        MergeError: other backbones, another number of weights, methods that have no sum, places or
            heads that differ. StoreError: a damaged folder.

    Example:
        >>> import deltune as dt, tempfile, torch
        >>> from deltune.merging import merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> one = dt.attach(model, dt.LoRA(rank=2, where="0"), "one")
        >>> two = dt.attach(model, dt.LoRA(rank=1, where="0"), "two")
        >>> merged = merge([one, two], weights=[1.0, -0.5])
        >>> merged.spec.rank, merged.error
        (3, 0.0)
        >>> folder = merged.save(tempfile.mkdtemp() + "/merged")
        >>> dt.load(folder, model).name
        'merged'
    """
    deltas = [Saved.read(source, model) for source in sources]
    shares = _weights(deltas, weights)
    one_backbone(deltas, force)
    _check(rank, factor, mixing)
    recipe = _recipe(how, density, factor)
    way = way_of(recipe, len(deltas), statistics, seed, mixing, factor)
    plain = isinstance(recipe, Recipe) and recipe.plain
    whole = recipe.factor if isinstance(recipe, Recipe) else factor
    work = Work(deltas, shares, way, plain, whole, rank)
    if start is not None:
        if rank is not None or to is not None:
            raise MergeError("with `start` the deltas' own tensors are merged: no `rank`, no `to`")
        work.from_start(common_start(deltas, Saved.read(start, model), force))
    else:
        target = parse(to) if isinstance(to, str) else to
        work.by_terms(target)
    work.head, work.head_sites = one_head(deltas, shares, keep_head)
    origin = {
        "how": how if isinstance(how, str) else repr(how),
        "of": [
            {"from": delta.label, "spec": str(delta.spec), "weight": share}
            for delta, share in zip(deltas, shares, strict=True)
        ],
    }
    return work.result(origin)


def _weights(deltas: Sequence[Saved], weights: Sequence[float] | None) -> list[float]:
    if not deltas:
        raise MergeError("there is nothing to merge; give one folder of a delta, or several")
    if weights is None:
        return [1.0 / len(deltas)] * len(deltas)
    if len(weights) != len(deltas):
        raise MergeError(
            f"there are {len(deltas)} deltas and {len(weights)} weights; give one for each"
        )
    if not all(isfinite(weight) for weight in weights):
        raise MergeError(f"weights must be finite numbers, got {list(weights)}")
    return [float(weight) for weight in weights]


def _check(rank: int | None, factor: float, mixing: float) -> None:
    """Refuses numbers that mean nothing."""
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise MergeError(f"`rank` must be a whole number, 1 or more, got {rank}")
    if not isfinite(factor):
        raise MergeError(f"`factor` must be a finite number, got {factor}")
    if not 0.0 <= mixing <= 1.0:
        raise MergeError(f"`mixing` must be from 0 to 1, got {mixing}")


def _recipe(how: str | Recipe, density: float | None, factor: float) -> str | Recipe:
    recipe = RECIPES.get(how) if isinstance(how, str) else how
    if recipe is None or recipe.sparsify == "none":
        if density is not None:
            raise MergeError(f"`density` has no meaning for `{how}`, which leaves all entries")
        return how if recipe is None else replace(recipe, factor=recipe.factor * factor)
    density = recipe.density if density is None else density
    return replace(recipe, density=density, factor=recipe.factor * factor)
