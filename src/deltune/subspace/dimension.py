"""The intrinsic dimension of a task: how few directions are enough."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deltune.errors import SubspaceError


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where a curve of a metric against dimension reaches a share of full fine-tuning."""

    first: int | None
    """d90 as it is defined: the smallest dimension that was tried and reaches it; None if none."""
    between: float | None
    """The same between dimensions, linear in log d from the one before; None where none above 0 is
    before it."""


def crossing(
    scores: Mapping[int, float], full: float, share: float = 0.9, chance: float = 0.0
) -> Crossing:
    """d90: the smallest d with score(d) >= chance + share * (full - chance).

    Args:
        scores: dimension -> metric, mean over seeds; dimension 0 is the model that moves nowhere,
            or what is trained beside the directions.
        full: the metric of full fine-tuning, above `chance`.
        share: 0.9 for d90.
        chance: the metric of guessing.

    Raises:
        SubspaceError: no dimension, or a metric of full fine-tuning that is not above `chance`.

    Source: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", 2018,
    arXiv:1804.08838; Aghajanyan et al. 2021, arXiv:2012.13255.
    Differs: they have a chance of 0, the default, with which guessing between two labels is 50 %
    of the way to any metric.

    Example:
        >>> found = crossing({10: 0.5, 100: 0.7, 1000: 0.9}, full=0.9)
        >>> found.first, round(found.between)
        (1000, 355)
    """
    if not scores or not full > chance:
        raise SubspaceError(
            f"there are {len(scores)} dimensions and full fine-tuning has {full:g}; give at least "
            f"one dimension and a metric above {chance:g}"
        )
    wanted, before = chance + share * (full - chance), None
    for d in sorted(scores):
        if scores[d] >= wanted:
            if not before:  # none, or 0
                return Crossing(d, None)
            way = (wanted - scores[before]) / (scores[d] - scores[before])
            log = math.log(before) + way * (math.log(d) - math.log(before))
            return Crossing(d, math.exp(log))
        before = d
    return Crossing(None, None)
