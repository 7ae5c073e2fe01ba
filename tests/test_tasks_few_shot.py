"""Few-shot samples against the published rule on numpy's global generator; chance; types."""

from collections import Counter

import numpy as np
import pytest

from deltune.errors import DataError
from deltune.tasks.task import Record, Task
from deltune.tasks.types import TYPES, type_of

SEEDS = (100, 13, 21, 42, 87)
LABELS = ("bad", "good", "so so")


def made(count: int = 200, kind: str = "classification") -> Task:
    labels = LABELS if kind == "classification" else None
    rows = [Record(f"text {i}", LABELS[i * i % 3]) for i in range(count)]
    metric = "accuracy" if labels else "exact_match"
    return Task("toy", kind, metric, labels, rows, rows[:7], rows[:30])


def published(records: list[Record], seed: int, k: int) -> tuple[list[Record], list[Record]]:
    """Shuffle all lines, then the first k of each label for training, the next k for dev."""
    lines = list(records)
    state = np.random.get_state()
    np.random.seed(seed)
    np.random.shuffle(lines)
    np.random.set_state(state)
    groups: dict[str, list[Record]] = {}
    for line in lines:
        groups.setdefault(line.target, []).append(line)
    train = [line for group in groups.values() for line in group[:k]]
    return train, [line for group in groups.values() for line in group[k : 2 * k]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sample_is_that_of_the_published_rule(seed: int) -> None:
    task = made()
    few = task.few_shot(16, seed)
    assert (few.train, few.dev) == published(task.train, seed, 16)
    assert set(Counter(r.target for r in few.train).values()) == {16}
    assert few.test == task.test and not {r.input for r in few.train} & {r.input for r in few.dev}


def test_without_labels_it_is_twice_as_many_of_all() -> None:
    few = made(kind="generation").few_shot(16, 13)
    assert (len(few.train), len(few.dev)) == (32, 32)
    assert len({r.input for r in few.train + few.dev}) == 64


def test_scarce_labels_give_what_they_have_and_leave_one_for_dev() -> None:
    rows = [Record(f"a{i}", "bad") for i in range(40)]
    rows += [Record(f"b{i}", "good") for i in range(5)] + [Record("c", "so so")]
    few = Task("toy", "classification", "accuracy", LABELS, rows, [], rows).few_shot(16, 42)
    assert Counter(r.target for r in few.train) == {"bad": 16, "good": 4, "so so": 1}
    assert Counter(r.target for r in few.dev) == {"bad": 16, "good": 1}
    with pytest.raises(DataError, match="0 shots were asked for"):
        made().few_shot(0, 13)
    one = Task("toy", "classification", "accuracy", LABELS, rows[-1:], [], rows)
    with pytest.raises(DataError, match="has 1 training records, one of each label at most"):
        one.few_shot(16, 13)


def test_chance_is_what_guessing_gives() -> None:
    rows = [Record(str(i), "good" if i < 6 else "bad") for i in range(10)]
    test = [Record(str(i), "good" if i < 3 else "bad") for i in range(4)]
    task = Task("toy", "classification", "accuracy", ("bad", "good"), rows, rows, test)
    assert task.chance() == 0.75
    options = [Record("x", "a", ("a", "b")), Record("y", "a", ("a", "b", "c", "d"))]
    assert Task("toy", "multiple_choice", "accuracy", None, options, [], options).chance() == 0.375
    assert made(kind="generation").chance() == 0.0
    assert (
        Task("toy", "classification", "matthews", ("bad", "good"), rows, rows, test).chance() == 0
    )


def test_types_come_from_the_name_or_the_metadata() -> None:
    assert type_of("blimp_ellipsis") == "grammar" and type_of("hf:nyu-mll/glue:mnli") == "inference"
    assert type_of("BBH_navigate") == "reasoning" and type_of("fv_country_capital") == "knowledge"
    assert made().type == "other"
    task = made()
    assert Task(*(getattr(task, f) for f in ("name", "kind", "metric", "labels", "train", "dev",
                "test")), meta={"type": "mine"}).type == "mine"  # fmt: skip
    patterns = [pattern for found in TYPES.values() for pattern in found.split()]
    assert len(patterns) == len(set(patterns))
