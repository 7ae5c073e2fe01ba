"""Learning-rate schedules as closed forms of the step. Imports no torch."""

import math

from deltune.training.settings import Schedule


def factor(kind: Schedule, done: int, steps: int, warmup: int) -> float:
    """Multiplier of the learning rate for the step that follows `done` finished ones.

    With t the finished steps, w the warm-up and T all steps, it is t / w while t < w; after that,
    with p = (t - w) / (T - w), it is 1 - p (linear), (1 + cos(pi p)) / 2 (cosine) or 1 (constant).

    Example:
        >>> [factor("linear", done, steps=4, warmup=2) for done in range(4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    if done < warmup:
        return done / warmup
    if kind == "constant":
        return 1.0
    progress = (done - warmup) / max(1, steps - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
