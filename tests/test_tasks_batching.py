"""Batches against the definition: a permutation, little padding, decided by the seed."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.tasks.batching import group_by_length, sorted_batches
from deltune.tasks.encoding import pad, padding_mask


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    lengths=st.lists(st.integers(1, 200), max_size=400),
    size=st.integers(1, 9),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_every_index_once_and_one_short_batch(lengths: list[int], size: int, seed: int) -> None:
    for batches in (group_by_length(lengths, size, seeded(seed)), sorted_batches(lengths, size)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert sum(len(batch) != size for batch in batches) <= 1
        assert all(batches)
    assert group_by_length(lengths, size, seeded(seed)) == group_by_length(
        lengths, size, seeded(seed)
    )


def test_padding_is_far_less_than_at_random_and_the_order_is_random() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(5, 60) for _ in range(2000)]
    grouped = group_by_length(lengths, 32, seeded(0))
    order = torch.randperm(2000, generator=seeded(0)).tolist()
    shuffled = [order[i : i + 32] for i in range(0, 2000, 32)]
    assert padding(lengths, grouped) < 0.1 * padding(lengths, shuffled)
    assert grouped != group_by_length(lengths, 32, seeded(1))
    means = torch.tensor([sum(lengths[i] for i in b) / len(b) for b in grouped])
    trend = torch.corrcoef(torch.stack([means, torch.arange(len(means)).float()]))[0, 1]
    assert abs(trend) < 0.35


def test_the_longest_is_evaluated_first() -> None:
    assert sorted_batches([3, 9, 5, 7], 2) == [[1, 3], [2, 0]]


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    size=st.integers(1, 9),
    most=st.integers(0, 60),
)
@settings(deadline=None, max_examples=60)
def test_a_batch_ends_where_one_more_would_be_too_much_padding(
    lengths: list[int], size: int, most: int
) -> None:
    batches = sorted_batches(lengths, size, most)
    order = [i for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for batch, behind in zip(batches, [*batches[1:], []], strict=True):
        assert len(batch) <= size and padding(lengths, [batch]) <= most
        if behind:
            assert len(batch) == size or padding(lengths, [[*batch, behind[0]]]) > most


def test_padding_and_mask_agree() -> None:
    rows = [[1, 2, 3], [4]]
    assert pad(rows, 0).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad(rows, 0, left=True, multiple=4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert padding_mask(rows, 4).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert padding_mask(rows, 4, left=True).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
