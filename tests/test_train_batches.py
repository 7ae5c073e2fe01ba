"""Oracle: the definition of an epoch: each example once, however the work is split."""

import pytest

from deltune.training.batches import Order
from train_toy import settings

LENGTHS = [3, 9, 4, 4, 7, 1, 12, 5, 6, 2, 8]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_each_example_once_in_each_epoch(grouped: bool, processes: int, accumulate: int) -> None:
    chosen = settings(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        group_by_length=grouped,
    )
    order = Order(LENGTHS, chosen, processes)
    assert order.steps_per_epoch == -(-len(LENGTHS) // (2 * accumulate * processes))
    for epoch in range(2):
        seen = []
        for step in range(order.steps_per_epoch):
            batch = order.batch(epoch * order.steps_per_epoch + step)
            parts = [part for rank in range(processes) for part in order.parts(batch, rank)]
            assert sorted(at for part in parts for at in part) == sorted(batch)
            assert all(1 <= len(part) <= 2 for part in parts)
            assert all(len(order.parts(batch, r)) <= accumulate for r in range(processes))
            seen += batch
        assert sorted(seen) == list(range(len(LENGTHS)))


def test_any_position_is_found_again() -> None:
    order = Order(LENGTHS, settings(per_device_train_batch_size=3))
    straight = [order.batch(step) for step in range(12)]
    for step in (11, 0, 5):
        assert Order(LENGTHS, settings(per_device_train_batch_size=3)).batch(step) == straight[step]
    assert straight[:4] != straight[4:8]
    other = Order(LENGTHS, settings(per_device_train_batch_size=3, seed=1))
    assert [other.batch(step) for step in range(12)] != straight


def test_split_of_a_step_does_not_change_its_examples() -> None:
    whole = Order(LENGTHS, settings(per_device_train_batch_size=8))
    split = Order(
        LENGTHS, settings(per_device_train_batch_size=2, gradient_accumulation_steps=2), processes=2
    )
    for step in range(4):
        assert sorted(whole.batch(step)) == sorted(split.batch(step))


def test_grouping_saves_padding() -> None:
    lengths = [1 + (37 * at) % 101 for at in range(1000)]

    def padded(grouped: bool) -> int:
        order = Order(lengths, settings(per_device_train_batch_size=10, group_by_length=grouped))
        batches = [order.batch(step) for step in range(order.steps_per_epoch)]
        return sum(max(lengths[at] for at in batch) * len(batch) for batch in batches)

    assert padded(grouped=True) < 1.15 * sum(lengths) < padded(grouped=False)
