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


def sorted_batches(
    lengths: Sequence[int], batch_size: int, padding: int | None = None
) -> list[list[int]]:
    """Returns batches of indices from the longest to the shortest, for evaluation.

    The longest comes first, so that memory that does not suffice shows at once.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples in a batch, at most.
        padding: tokens of padding in a batch, at most; None for any number.

    Example:
        >>> sorted_batches([9, 8, 3, 3], 4), sorted_batches([9, 8, 3, 3], 4, padding=5)
        ([[0, 1, 2, 3]], [[0, 1], [2, 3]])
    """
    batches: list[list[int]] = []
    spent = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        spent += lengths[batches[-1][0]] - lengths[i] if batches else 0
        full = not batches or len(batches[-1]) == batch_size
        if full or (padding is not None and spent > padding):
            batches.append([])
            spent = 0
        batches[-1].append(i)
    return batches


def padding_worth(device: torch.device) -> int | None:
    """Tokens of padding that cost about as much as one more forward pass: some 100 on a processor
    (measured with a model of 22 million parameters); elsewhere more than a batch has."""
    return 128 if device.type == "cpu" else None
