"""What a task is: records in three splits, a kind, a metric and, where it applies, labels."""

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from deltune.errors import DataError, closest, listing
from deltune.tasks.metrics import METRICS, score
from deltune.tasks.types import type_of

Kind = Literal["classification", "multiple_choice", "generation", "regression-as-classes"]
KINDS: tuple[Kind, ...] = (
    "classification",
    "multiple_choice",
    "generation",
    "regression-as-classes",
)
SPLITS = ("train", "dev", "test")
DEFAULT_METRIC: dict[str, str] = {
    "classification": "accuracy",
    "multiple_choice": "accuracy",
    "generation": "exact_match",
    "regression-as-classes": "pearson",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One example of a task."""

    input: str
    """The text that the model reads."""
    target: str
    """The label, the right option, or the text to write; empty where it is not known."""
    options: tuple[str, ...] = ()
    """The choices of a multiple-choice record; `target` is one of them."""
    references: tuple[str, ...] = ()
    """Further acceptable texts of a generation record."""


@dataclass(frozen=True, slots=True)
class Task:
    """Records in three splits with what is needed to train on them and to score them.

    Example:
        >>> rows = [Record("fine", "good"), Record("dull", "bad")]
        >>> Task("toy", "classification", "accuracy", ("bad", "good"), rows, rows, rows).labels
        ('bad', 'good')
    """

    name: str
    kind: str
    """One of `classification`, `multiple_choice`, `generation`, `regression-as-classes`."""
    metric: str
    labels: tuple[str, ...] | None
    """The label set, for `classification` and `regression-as-classes` only."""
    train: list[Record]
    dev: list[Record]
    test: list[Record]
    meta: dict[str, Any] = field(default_factory=dict)
    """Everything else that is known of the task (licence, source, sizes, ...)."""

    def __post_init__(self) -> None:
        _known(self.kind, KINDS, "kind", self.name)
        _known(self.metric, METRICS, "metric", self.name)
        _check_labels(self)
        _check_metric(self)
        positive = self.meta.get("positive")
        if positive is not None and positive not in (self.labels or ()):
            raise DataError(
                f"task `{self.name}`: the positive label `{positive}` is not in the label set; "
                f"the labels are {listing(self.labels or ())}; correct `positive` in meta.json"
            )

    @property
    def positive(self) -> str | None:
        """The positive label of the metric `f1`, when the task's metadata names one."""
        return self.meta.get("positive")

    @property
    def type(self) -> str:
        """What the task is about, e.g. `sentiment`: its metadata's `type`, or told by its name."""
        return str(self.meta.get("type") or type_of(self.name))

    def chance(self) -> float:
        """The test metric of always answering the most frequent label of the training records, or
        of a random option in multiple choice; 0 where nothing can be guessed (generation)."""
        if self.kind == "multiple_choice":
            return fmean(1 / len(record.options) for record in self.test)
        if self.kind == "generation":
            return 0.0
        counts = Counter(record.target for record in self.train)
        most = max(self.labels or (), key=lambda label: counts[label])
        guesses = [most] * len(self.test)
        return score(self.metric, guesses, self.test, self.labels, self.positive)

    def split(self, name: str) -> list[Record]:
        """Returns the records of `train`, `dev` or `test`."""
        if name not in SPLITS:
            raise DataError(
                f"unknown split `{name}`{closest(name, SPLITS)}; a task has {listing(SPLITS)}"
            )
        return getattr(self, name)

    def limited(
        self,
        train: int | None = None,
        dev: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> "Task":
        """Returns the task with at most so many records a split, drawn at random by `seed`.

        A smaller draw is contained in every larger one of the same seed, and the records keep
        their order.
        """
        sizes = {"train": train, "dev": dev, "test": test}
        kept = {
            name: _draw(self.split(name), size, f"{seed}:{name}")
            for name, size in sizes.items()
            if size is not None
        }
        return replace(self, **kept)

    def few_shot(self, shots: int, seed: int) -> "Task":
        """Returns the task with few training and as many dev records; the test records stay.

        The training records are shuffled; of each label the first `shots` are for training and
        the next `shots` for dev, fewer where a label has not so many. Where there are no labels it
        is 2 `shots` of all records each.

        Args:
            shots: records of each label.
            seed: of the shuffle. The published seeds are 100, 13, 21, 42 and 87, and give the
                samples that numpy's legacy generator gives.

        Source: Ye, Lin and Ren, "CrossFit: A Few-shot Learning Challenge for Cross-task
        Generalization in NLP", 2021, arXiv:2104.08835: 16 of each label, 32 where there is none.
        Differs: of the training records given here, which may be fewer than the original ones.

        Raises:
            DataError: fewer than 1 shot, or too few records for two splits.
        """
        if shots < 1:
            raise DataError(f"task `{self.name}`: {shots} shots were asked for; ask for 1 or more")
        from numpy.random import RandomState

        order = list(range(len(self.train)))
        RandomState(seed).shuffle(order)
        groups: dict[str, list[Record]] = {}
        for at in order:
            record = self.train[at]
            groups.setdefault(record.target if self.labels else "", []).append(record)
        most = shots if self.labels else 2 * shots
        parts = [(group, min(most, max(1, len(group) - 1))) for group in groups.values()]
        train = [record for group, cut in parts for record in group[:cut]]
        dev = [record for group, cut in parts for record in group[cut : cut + most]]
        if not dev:
            raise DataError(
                f"task `{self.name}` has {len(self.train)} training records, one of each label at "
                "most; few-shot sampling needs some for training and some for dev"
            )
        return replace(self, train=train, dev=dev)


def _draw(records: list[Record], size: int, seed: str) -> list[Record]:
    if size < 1:
        raise DataError(f"a split of {size} records was asked for; ask for at least 1")
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    return [records[index] for index in sorted(order[:size])]


def _known(word: object, known: Collection[str], what: str, task: str) -> None:
    if word in known:
        return
    raise DataError(
        f"task `{task}`: unknown {what} `{word}`{closest(str(word), known)}; "
        f"choose one of {listing(known)}"
    )


def _check_labels(task: Task) -> None:
    needs = task.kind in ("classification", "regression-as-classes")
    if not needs and task.labels:
        raise DataError(
            f"task `{task.name}` of kind `{task.kind}` has labels {listing(task.labels)}; only "
            "classification and regression-as-classes have them; remove them or change the kind"
        )
    if not needs:
        return
    labels = task.labels or ()
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"task `{task.name}` of kind `{task.kind}` has the labels {listing(labels) or 'none'}; "
            "at least two different ones are needed; correct `labels`"
        )
    if task.kind == "regression-as-classes":
        for label in labels:
            _check_number(label, task.name)


def _check_number(label: str, task: str) -> None:
    try:
        float(label)
    except ValueError:
        raise DataError(
            f"task `{task}` of kind `regression-as-classes` has the label `{label}`, which is not "
            "a number; write every label as a number or use the kind `classification`"
        ) from None


def _check_metric(task: Task) -> None:
    kinds = METRICS[task.metric]
    if task.kind not in kinds:
        fitting = [name for name, served in METRICS.items() if task.kind in served]
        raise DataError(
            f"task `{task.name}`: the metric `{task.metric}` does not fit the kind `{task.kind}`; "
            f"choose one of {listing(fitting)}"
        )
    if task.metric == "f1" and len(task.labels or ()) != 2:
        raise DataError(
            f"task `{task.name}`: the metric `f1` is for two labels and there are "
            f"{len(task.labels or ())}; use `macro_f1`"
        )
