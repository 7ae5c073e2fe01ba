"""Ways to make one term of several at one place."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deltune.errors import MergeError, closest, listing
from deltune.mechanisms.factors import LowRank, dense
from deltune.merging.algebra import Term, cosine, precise, summed
from deltune.merging.recipe import RECIPES, Recipe

Statistics = Sequence[Mapping[str, Tensor]]
"""For each delta, by place: see `merging.statistics`."""
WORST = 1e12
"""Condition from which on the equations of `regmean` are those of rounding errors."""
NEEDS_STATISTICS = ("regmean", "fisher")


class Way(Protocol):
    """One term of several; None stands for no change."""

    def __call__(
        self, terms: Sequence[Term | None], weights: Sequence[float], place: str
    ) -> Term: ...


def way_of(
    how: str | Recipe, count: int, statistics: Statistics | None, seed: int, mixing: float,
    factor: float,
) -> Way:  # fmt: skip
    """The way of a name or a recipe.

    Raises:
        MergeError: an unknown name, too many deltas for it, statistics that are lacking.
    """
    if isinstance(how, Recipe):
        return _Mixed(how, seed)
    names = [*RECIPES, "slerp", *NEEDS_STATISTICS]
    if how not in names:
        raise MergeError(f"unknown way `{how}`{closest(how, names)}; ways: {listing(names)}")
    if how == "slerp":
        if count != 2:
            raise MergeError(f"`slerp` goes from one delta to another, and {count} were given")
        return _Arc(factor)
    if statistics is None or len(statistics) != count:
        given = "none were given" if statistics is None else f"{len(statistics)} were given"
        what = {"regmean": "grams", "fisher": "fishers"}[how]
        raise MergeError(
            f"`{how}` needs `statistics`, one for each of {count} deltas, and {given}; "
            f"`deltune.merging.{what}` measures them on an attached delta"
        )
    kinds = {"regmean": _Regression, "fisher": _Fisher}
    return kinds[how](statistics, mixing, factor)


class _Mixed:
    """A recipe; of a plain weighted sum factors stay factors."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed

    def __call__(self, terms: Sequence[Term | None], weights: Sequence[float], place: str) -> Term:
        here, shares = _there(terms, weights)
        if self.recipe.plain:
            return summed(here, [self.recipe.factor * w for w in shares])
        full = [None if term is None else dense(term) for term in terms]
        like = next(term for term in full if term is not None)
        every = [torch.zeros_like(like) if term is None else term for term in full]
        return self.recipe.blend(every, weights, self.seed, place)


class _Arc:
    """Spherical interpolation between two: with the angle W between them and t = w_2,

        sin((1 - t) W) / sin(W) T_1 + sin(t W) / sin(W) T_2

    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves".
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, terms: Sequence[Term | None], weights: Sequence[float], place: str) -> Term:
        if abs(sum(weights) - 1.0) > 1e-6:
            raise MergeError(f"`slerp` takes weights 1 - t and t, got {listing(map(str, weights))}")
        here, shares = _there(terms, weights)
        between = cosine(*here) if len(here) == 2 else None
        if between is not None and between < 1.0 - 1e-12:
            angle = math.acos(between)
            if math.sin(angle) < 1e-6:
                raise MergeError(
                    f"the changes at `{place}` are opposite, so no arc is the shortest"
                )
            shares = [math.sin(w * angle) / math.sin(angle) for w in shares]
        return summed(here, [self.factor * w for w in shares])


class _Regression:
    """The change whose outputs are nearest to those of each delta on its own inputs:

        M = (sum_i w_i T_i G_i) (sum_i w_i G_i)^-1,    G_i = mixing X_i^T X_i + (1 - mixing) diag

    which solves min_M sum_i w_i || X_i (M - T_i)^T ||^2 with `mixing` = 1. Factors stay factors, of
    rank sum_i r_i: B_i (A_i G_i (sum G)^-1). Where no G_i was measured, the weighted mean.

    Source: Jin et al. 2022, "Dataless Knowledge Fusion by Merging Weights of Language Models",
    arXiv:2212.09849, its closed form.
    """

    def __init__(self, statistics: Statistics, mixing: float, factor: float) -> None:
        self.statistics, self.mixing, self.factor = statistics, mixing, factor

    def __call__(self, terms: Sequence[Term | None], weights: Sequence[float], place: str) -> Term:
        found = [one.get(place) for one in self.statistics]
        grams = [self._mixed(precise(gram)) for gram in found if gram is not None]
        if len(grams) < len(terms):
            return _mean(terms, weights, self.factor)
        total = torch.stack([w * g for w, g in zip(weights, grams, strict=True)]).sum(0)
        moved: list[Term | None] = []
        for term, gram in zip(terms, grams, strict=True):
            if term is None:
                moved.append(None)
            elif isinstance(term, LowRank):
                moved.append(term._replace(down=_solved(term.down @ gram, total, place)))
            else:
                moved.append(_solved(term @ gram, total, place))
        here, shares = _there(moved, weights)
        return summed(here, [self.factor * w for w in shares])

    def _mixed(self, gram: Tensor) -> Tensor:
        return self.mixing * gram + (1.0 - self.mixing) * torch.diag(torch.diag(gram))


class _Fisher:
    """The mean of the changes weighted by the Fisher information of each entry:

        M = sum_i w_i F_i (.) T_i / sum_i w_i F_i

    Entries of which no delta knows anything, and places where none was measured, have the weighted
    mean.

    Source: Matena and Raffel 2021, "Merging Models with Fisher-Weighted Averaging",
    arXiv:2111.09832, with diagonal information.
    """

    def __init__(self, statistics: Statistics, mixing: float, factor: float) -> None:
        self.statistics, self.factor = statistics, factor

    def __call__(self, terms: Sequence[Term | None], weights: Sequence[float], place: str) -> Term:
        found = [one.get(place) for one in self.statistics]
        fishers = [precise(fisher) for fisher in found if fisher is not None]
        if len(fishers) < len(terms):
            return _mean(terms, weights, self.factor)
        shares = [w * fisher for w, fisher in zip(weights, fishers, strict=True)]
        total = torch.stack(shares).sum(0)
        known = total > 0
        plain = dense(_mean(terms, weights, 1.0))
        pairs = [(f, dense(t)) for f, t in zip(shares, terms, strict=True) if t is not None]
        weighed = torch.stack([f.view(t.shape) * t for f, t in pairs]).sum(0)
        known, total = known.view(plain.shape), total.view(plain.shape)
        return self.factor * torch.where(known, weighed / torch.where(known, total, 1.0), plain)


def _there(
    terms: Sequence[Term | None], weights: Sequence[float]
) -> tuple[list[Term], list[float]]:
    pairs = [(t, w) for t, w in zip(terms, weights, strict=True) if t is not None]
    return [term for term, _ in pairs], [weight for _, weight in pairs]


def _mean(terms: Sequence[Term | None], weights: Sequence[float], factor: float) -> Term:
    total = sum(weights)
    if abs(total) < 1e-12:
        raise MergeError("a weighted mean needs weights whose sum is not 0")
    here, shares = _there(terms, weights)
    return summed(here, [factor * w / total for w in shares])


def _solved(right: Tensor, gram: Tensor, place: str) -> Tensor:
    """right gram^-1, for a symmetric gram."""
    if not torch.linalg.cond(gram, 1) < WORST:
        raise MergeError(
            f"the inputs at `{place}` span less than the whole space, so the nearest change is not "
            "the only one; measure more of them, or use a `mixing` below 1"
        )
    return torch.linalg.solve(gram, right.mT).mT
