"""Metrics by name, computed by scikit-learn, scipy and rouge_score.

A value that is undefined (a correlation of something constant, a Matthews coefficient with one
class, an F1 without any positive) is 0.0: such predictions carry no information about the target.
No metric returns NaN.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from deltune.errors import DataError, closest, listing

if TYPE_CHECKING:
    from deltune.tasks.task import Record

_CLASSES = ("classification", "regression-as-classes")
_CHOICES = (*_CLASSES, "multiple_choice")
_NUMBERS = ("regression-as-classes",)
CORRELATIONS = ("matthews", "pearson", "spearman")
"""Metrics that are 0 without a relation, and -1 at worst."""
METRICS: dict[str, tuple[str, ...]] = {
    "accuracy": _CHOICES,
    "macro_f1": _CLASSES,
    "f1": _CLASSES,
    "matthews": _CLASSES,
    "pearson": _NUMBERS,
    "spearman": _NUMBERS,
    "exact_match": (*_CHOICES, "generation"),
    "rougeL": ("generation",),
}
"""Every metric with the kinds of task that it fits. All lie in 0..1 or -1..1, higher is better."""

Texts = Sequence[str]


def score(
    metric: str,
    predictions: Texts,
    records: Sequence["Record"],
    labels: Texts | None = None,
    positive: str | None = None,
) -> float:
    """Scores predictions against the targets of their records.

    Args:
        metric: A name of `METRICS`.
        predictions: One text for each record: a label, an option or a written text.
        records: The records, in the order of the predictions.
        labels: The label set, for metrics over classes.
        positive: The positive label of `f1`; see `positive_label` for the default.

    Example:
        >>> from deltune.tasks.task import Record
        >>> score("accuracy", ["a", "b"], [Record("x", "a"), Record("y", "a")])
        0.5
    """
    if metric not in METRICS:
        raise DataError(
            f"unknown metric `{metric}`{closest(metric, METRICS)}; choose one of {listing(METRICS)}"
        )
    if len(predictions) != len(records) or not records:
        raise DataError(
            f"{len(predictions)} predictions came for {len(records)} records; "
            "one for each of at least one record is needed"
        )
    if any(not record.target for record in records):
        raise DataError("a record without target cannot be scored; use predictions only")
    if metric == "f1":
        return _f1(predictions, _targets(records), positive or positive_label(labels or ()))
    value = float(_FUNCTIONS[metric](predictions, records))
    return 0.0 if math.isnan(value) else value


def positive_label(labels: Texts) -> str:
    """Returns which of two labels is the positive one.

    It is the label that the other negates by a prefix (`hate` of `hate` and `not hate`), otherwise
    the last in sorted order (`yes` of `no` and `yes`, `spam` of `ham` and `spam`).
    """
    if len(labels) != 2:
        raise DataError(
            f"the metric `f1` needs two labels and there are {len(labels)}: "
            f"{listing(labels) or 'none'}; use `macro_f1`"
        )
    first, last = sorted(labels)
    return first if last.endswith(first) else last


def normalise(text: str) -> str:
    """Returns the form in which `exact_match` compares texts.

    Lower case, white space collapsed and stripped, final `.,;:!?` removed (a text that is nothing
    else is kept).
    """
    text = " ".join(text.lower().split())
    return text.rstrip(_FINAL) or text


_FINAL = ".,;:!? "


def _targets(records: Sequence["Record"]) -> list[str]:
    return [record.target for record in records]


def _accuracy(predictions: Texts, records: Sequence["Record"]) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(_targets(records), list(predictions))


def _macro_f1(predictions: Texts, records: Sequence["Record"]) -> float:
    """The mean over the labels that occur among the targets or the predictions."""
    from sklearn.metrics import f1_score

    return f1_score(_targets(records), list(predictions), average="macro", zero_division=0.0)


def _f1(predictions: Texts, targets: list[str], positive: str) -> float:
    from sklearn.metrics import f1_score

    truth = [target == positive for target in targets]
    guess = [prediction == positive for prediction in predictions]
    return float(f1_score(truth, guess, zero_division=0.0))


def _matthews(predictions: Texts, records: Sequence["Record"]) -> float:
    from sklearn.metrics import matthews_corrcoef

    targets = _targets(records)
    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return matthews_corrcoef(targets, list(predictions))


def _numbers(
    predictions: Texts, records: Sequence["Record"]
) -> tuple[list[float], list[float]] | None:
    """Predictions and targets as numbers, or nothing where a correlation is undefined.

    A prediction that is not a finite number counts as the mean of the targets: a guess that knows
    nothing.
    """
    truth = [_number(target) for target in _targets(records)]
    if any(value is None for value in truth):
        index = truth.index(None)
        raise DataError(
            f"the target `{records[index].target}` is not a finite number; pearson and spearman "
            "need numbers; correct it or choose another metric"
        )
    known = [value for value in truth if value is not None]
    mean = math.fsum(known) / len(known)
    guess = [value if (value := _number(text)) is not None else mean for text in predictions]
    return None if len(set(known)) < 2 or len(set(guess)) < 2 else (guess, known)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pearson(predictions: Texts, records: Sequence["Record"]) -> float:
    from scipy.stats import pearsonr

    pairs = _numbers(predictions, records)
    return 0.0 if pairs is None else pearsonr(*pairs).statistic


def _spearman(predictions: Texts, records: Sequence["Record"]) -> float:
    from scipy.stats import spearmanr

    pairs = _numbers(predictions, records)
    return 0.0 if pairs is None else spearmanr(*pairs).statistic


def _exact_match(predictions: Texts, records: Sequence["Record"]) -> float:
    hits = (
        normalise(prediction) in {normalise(text) for text in (record.target, *record.references)}
        for prediction, record in zip(predictions, records, strict=True)
    )
    return sum(hits) / len(records)


def _rouge(predictions: Texts, records: Sequence["Record"]) -> float:
    """The mean over records of the best F-measure over target and references, without stemming.

    The library's tokeniser knows the letters a-z and digits only.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = (
        max(scorer.score(text, prediction)["rougeL"].fmeasure for text in _accepted(record))
        for prediction, record in zip(predictions, records, strict=True)
    )
    return math.fsum(best) / len(records)


def _accepted(record: "Record") -> list[str]:
    return list(dict.fromkeys((record.target, *record.references)))


_FUNCTIONS: dict[str, Callable[[Texts, Sequence["Record"]], float]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "exact_match": _exact_match,
    "rougeL": _rouge,
}
