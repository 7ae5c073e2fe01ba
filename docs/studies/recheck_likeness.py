"""The part of `recheck.py` that recomputes the cosines of codes."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

NOTHING = -math.inf
Sums = dict[str, dict[str, tuple[int, list[float]]]]
"""task -> method -> number of its codes, and the sum of their directions."""


class Likeness:
    """How alike the codes of a space are.

    The cosines of all pairs of n directions with m others add up to <sum of n, sum of m>, those of
    n with each other to (|sum of n|^2 - n) / 2: no pair is looked at.

    Args:
        codes: the records of the codes of the space.
        types: task -> its type.
    """

    def __init__(self, codes: Iterable[dict[str, Any]], types: dict[str, str]) -> None:
        self.types = types
        by_method: Sums = defaultdict(dict)
        by_seed: dict[str, dict[int, tuple[int, list[float]]]] = defaultdict(dict)
        for record in codes:
            run = record["run"]
            for code in [row["code"] for row in record["measures"] if "code" in row]:
                length = math.sqrt(sum(number**2 for number in code))
                if length:
                    unit = [number / length for number in code]
                    for sums, key in ((by_method, run["method"]), (by_seed, run["seed"])):
                        own = sums[run["task"]["name"]]
                        count, total = own.get(key, (0, [0.0] * len(unit)))
                        own[key] = count + 1, [a + b for a, b in zip(total, unit, strict=True)]
        self.by_method, self.by_seed = by_method, by_seed

    def of(self, one: str, other: str) -> float:
        """The mean cosine of two tasks, or of the seeds of one."""
        if one == other:
            return _within(self.by_method[one].values())
        a, b = self.by_method[one], self.by_method[other]
        both = [(a[method], b[method]) for method in a if method in b]
        pairs = sum(n * m for (n, _), (m, _) in both)
        return sum(_dot(u, v) for (_, u), (_, v) in both) / pairs if pairs else NOTHING

    def means(self) -> dict[str, float]:
        """What the table says, by its columns."""
        pairs = list(combinations(self.by_method, 2))
        kinds = [(self.of(a, b), self.types[a] == self.types[b]) for a, b in pairs]
        return {
            "same task": _mean(self.of(task, task) for task in self.by_method),
            "same type": _mean(value for value, same in kinds if same),
            "other types": _mean(value for value, same in kinds if not same),
            "other methods": _mean(_within(own.values()) for own in self.by_seed.values()),
        }


def _within(groups: Iterable[tuple[int, list[float]]]) -> float:
    groups = list(groups)
    pairs = sum(n * (n - 1) for n, _ in groups)
    return sum(_dot(u, u) - n for n, u in groups) / pairs if pairs else NOTHING


def _dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if value != NOTHING]
    return statistics.fmean(known) if known else NOTHING
