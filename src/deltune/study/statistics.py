"""Comparing methods over many tasks: ranks, win rates, permutation tests, critical differences.

A table of scores has a row for each task and a column for each method; higher is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deltune.errors import StudyError

Scores = Sequence[Sequence[float]]
RESAMPLES = 9999
"""Random permutations and bootstrap samples, where all are too many."""
DIGITS = 12
"""Scores that agree in so many are equal: means over seeds differ in the last bit by the order in
which they are added."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method against a reference over tasks.

    Attributes:
        difference: mean of (method - reference) over the tasks.
        low, high: 95 % percentile interval of that mean, tasks and seeds drawn with replacement.
        p: two-sided p-value of the sign-flipping permutation test over the tasks.
        wins: share of the tasks on which the method is better, ties counted half.
        tasks: number of tasks.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: float
    tasks: int


def average_ranks(scores: Scores) -> list[float]:
    """Each method's mean rank over the tasks; the best has rank 1, equal ones share theirs."""
    from scipy.stats import rankdata

    _check(scores)
    ranks = [rankdata([-round(value, DIGITS) for value in row]) for row in scores]
    return [float(sum(column) / len(ranks)) for column in zip(*ranks, strict=True)]


def friedman(scores: Scores) -> tuple[float, float]:
    """Friedman's statistic, corrected for ties, and its p-value: whether the methods differ at
    all. 0 and 1 where nothing differs.

    Source: Friedman 1937; scipy.stats.friedmanchisquare, which asks for three methods.
    """
    from scipy.stats import friedmanchisquare

    _check(scores)
    scores = [[round(value, DIGITS) for value in row] for row in scores]
    if len(scores[0]) < 3 or all(len(set(row)) == 1 for row in scores):
        return 0.0, 1.0
    found = friedmanchisquare(*zip(*scores, strict=True))
    return float(found.statistic), float(found.pvalue)


def critical_difference(methods: int, tasks: int, level: float = 0.05) -> float:
    """How far average ranks must be apart to differ at this level, by Nemenyi's test.

        CD = q sqrt(k (k + 1) / (6 N))

    with k methods, N tasks and q the studentised range quantile for infinite degrees of freedom,
    divided by the root of 2.

    Source: Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", 2006, JMLR 7.
    """
    from scipy.stats import studentized_range

    quantile = float(studentized_range.ppf(1 - level, methods, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * tasks))


def cliques(ranks: Sequence[float], distance: float) -> list[tuple[int, ...]]:
    """The largest groups of methods, by their places in `ranks`, within one critical difference."""
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    found: list[tuple[int, ...]] = []
    for start, first in enumerate(order):
        group = tuple(one for one in order[start:] if ranks[one] - ranks[first] <= distance)
        if len(group) > 1 and not any(set(group) <= set(other) for other in found):
            found.append(group)
    return found


def compare(method: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Comparison:
    """A method against a reference.

    Args:
        method: for each task, the scores of its seeds.
        reference: the same of the reference.
    """
    import numpy as np
    from scipy.stats import permutation_test

    if not method or len(method) != len(reference):
        raise StudyError(
            f"{len(method)} tasks against {len(reference)}; expected the same, 1 or more"
        )
    mine, theirs = (np.array([np.mean(row) for row in rows]) for rows in (method, reference))
    differences = np.round(mine - theirs, DIGITS)
    p = 1.0
    if len(differences) > 1 and np.any(differences):
        p = float(permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES,
            vectorized=True, rng=np.random.default_rng(0),
        ).pvalue)  # fmt: skip
    low, high = _interval(method, reference)
    wins = float(np.mean((differences > 0) + 0.5 * (differences == 0)))
    return Comparison(float(differences.mean()), low, high, p, wins, len(differences))


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that at most a share `level` of such families has any
    false one below it.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, least = [0.0] * len(values), 0.0
    for place, at in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[at]))
        adjusted[at] = least
    return adjusted


def corrected(score: float, reference: float, chance: float, floor: float) -> float | None:
    """(score - chance) / (reference - chance); None where the reference is not above the floor,
    and so not told from chance: the ratio would be one of noise."""
    return (score - chance) / (reference - chance) if reference > floor else None


def steps_to(curve: Sequence[Sequence[float]], share: float = 0.9) -> tuple[float, float]:
    """Step and second of the first evaluation that reaches `share` of the curve's best, or the best
    itself where it is a correlation below 0."""
    best = max(point[2] for point in curve)
    wanted = share * best if best > 0 else best
    return next((point[0], point[1]) for point in curve if point[2] >= wanted)


def area(curve: Sequence[Sequence[float]]) -> float:
    """Mean height of a curve of (step, seconds, metric), by the trapezoid rule over its steps."""
    if len(curve) == 1:
        return curve[0][2]
    whole = sum((b[0] - a[0]) * (a[2] + b[2]) / 2 for a, b in pairwise(curve))
    return whole / (curve[-1][0] - curve[0][0])


def _interval(
    method: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> tuple[float, float]:
    import numpy as np

    generator = np.random.default_rng(0)
    tasks = generator.integers(len(method), size=(RESAMPLES, len(method)))
    means = np.zeros(RESAMPLES)
    for rows, sign in ((method, 1.0), (reference, -1.0)):
        counts = np.array([len(row) for row in rows])
        values = np.array([[*row, *[0.0] * (counts.max() - len(row))] for row in rows])
        many = counts[tasks][..., None]
        draws = generator.random((*tasks.shape, counts.max())) * many
        seeds = np.where(
            np.arange(counts.max()) < many, values[tasks[..., None], draws.astype(int)], 0
        )
        means += sign * (seeds.sum(-1) / many[..., 0]).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _check(scores: Scores) -> None:
    widths = {len(row) for row in scores}
    if len(widths) != 1 or 0 in widths:
        raise StudyError(
            f"the rows of a table of scores have {sorted(widths)} values; expected one for each "
            "method"
        )
