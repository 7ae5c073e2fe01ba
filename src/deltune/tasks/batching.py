"""Batches of similar length, so that little is padding."""

from collections.abc import Sequence

import torch

_MEGA = 50


def group_by_length(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Returns random batches of indices whose examples have similar lengths.

    The shuffled indices are cut into stretches of 50 batches; each stretch is sorted by length and
    cut into batches, and the batches are shuffled. Each index occurs exactly once and only one
    batch can be smaller than the rest. The order depends on the generator's state only.

    Example:
        >>> group_by_length([3, 9, 3, 9], 2, torch.Generator().manual_seed(0)) in (
        ...     [[0, 2], [1, 3]], [[2, 0], [1, 3]], [[0, 2], [3, 1]], [[2, 0], [3, 1]],
        ...     [[1, 3], [0, 2]], [[1, 3], [2, 0]], [[3, 1], [0, 2]], [[3, 1], [2, 0]],
        ... )
        True
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * _MEGA
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        stretch = sorted(order[start : start + size], key=lengths.__getitem__)
        batches += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns batches of indices from the longest to the shortest, for evaluation.

    The longest comes first, so that memory that does not suffice shows at once.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
