"""Metrics against scikit-learn, scipy, rouge_score and closed forms."""

import math
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks.metrics import METRICS, normalise, positive_label, score
from deltune.tasks.task import Record


def records(targets: list[str]) -> list[Record]:
    return [Record("x", target) for target in targets]


LABELS = ("ant", "bee", "cow")
pairs = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1)


@given(pairs)
@settings(deadline=None, max_examples=60)
def test_class_metrics_equal_counts_by_hand(found: list[tuple[str, str]]) -> None:
    guesses, targets = [g for g, _ in found], [t for _, t in found]

    def f1(label: str) -> float:
        right = sum(g == t == label for g, t in found)
        return 2 * right / (guesses.count(label) + targets.count(label))

    present = set(guesses) | set(targets)
    rows = records(targets)
    hits = sum(g == t for g, t in found) / len(found)
    assert score("accuracy", guesses, rows) == pytest.approx(hits)
    macro = sum(map(f1, present)) / len(present)
    assert score("macro_f1", guesses, rows, LABELS) == pytest.approx(macro)
    assert score("exact_match", guesses, rows) == pytest.approx(hits)
    assert score("matthews", guesses, rows) == pytest.approx(_matthews(guesses, targets))


def _matthews(guesses: list[str], targets: list[str]) -> float:
    """Gorodkin's R_K from counts; 0 where a side is constant."""
    n, c = len(targets), sum(g == t for g, t in zip(guesses, targets, strict=True))
    p = [guesses.count(label) for label in LABELS]
    t = [targets.count(label) for label in LABELS]
    above = c * n - sum(a * b for a, b in zip(p, t, strict=True))
    below = (n * n - sum(a * a for a in p)) * (n * n - sum(b * b for b in t))
    return above / math.sqrt(below) if below else 0.0


def test_metrics_equal_the_libraries_at_random() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = random.Random(0)
    numbers = [str(rng.randint(-4, 4)) for _ in range(200)]
    guesses = [str(rng.randint(-4, 4)) if rng.random() < 0.5 else n for n in numbers]
    rows, x, y = records(numbers), [float(g) for g in guesses], [float(n) for n in numbers]
    assert score("pearson", guesses, rows) == pytest.approx(pearsonr(x, y)[0], abs=1e-12)
    assert score("spearman", guesses, rows) == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    assert score("matthews", guesses, rows) == pytest.approx(matthews_corrcoef(numbers, guesses))
    two = [rng.choice(["no", "yes"]) for _ in range(100)]
    other = [rng.choice(["no", "yes"]) for _ in range(100)]
    for positive in ("no", "yes"):
        expected = f1_score(two, other, pos_label=positive)
        found = score("f1", other, records(two), ("no", "yes"), positive)
        assert found == pytest.approx(expected)
    words = ["".join(rng.choices(string.ascii_lowercase[:4], k=2)) for _ in range(400)]
    written = [" ".join(rng.sample(words, 8)) for _ in range(20)]
    wanted = [Record("x", *(" ".join(rng.sample(words, 8)) for _ in range(1))) for _ in range(20)]
    wanted = [Record(r.input, r.target, (), (" ".join(rng.sample(words, 8)),)) for r in wanted]
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(text, guess)["rougeL"].fmeasure for text in (r.target, *r.references))
        for guess, r in zip(written, wanted, strict=True)
    ]
    assert score("rougeL", written, wanted) == pytest.approx(sum(best) / 20)
    assert 0 < sum(best) / 20 < 1


def test_rouge_by_hand() -> None:
    rows = [Record("x", "the cat sat", (), ("a dog ran off", "the cat"))]
    assert score("rougeL", ["the cat ran"], rows) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert score("rougeL", ["the cat."], rows) == 1.0
    assert (
        score(
            "rougeL",
            [
                "",
            ],
            rows,
        )
        == 0.0
    )


@pytest.mark.parametrize("metric", ["pearson", "spearman", "matthews"])
def test_undefined_values_are_zero(metric: str) -> None:
    varied, constant = ["1", "2", "3"], ["2", "2", "2"]
    assert score(metric, constant, records(varied)) == 0.0
    assert score(metric, varied, records(constant)) == 0.0
    assert score(metric, constant, records(constant)) == 0.0
    assert score(metric, ["1"], records(["1"])) == 0.0
    assert score(metric, varied, records(varied)) == pytest.approx(1.0)


def test_undefined_f1_is_zero() -> None:
    assert score("f1", ["no", "no"], records(["no", "no"]), ("no", "yes")) == 0.0


@pytest.mark.parametrize("guess", ["many", "nan", "inf", ""])
def test_a_prediction_that_is_no_number_counts_as_the_mean(guess: str) -> None:
    from scipy.stats import pearsonr

    rows = records(["1", "2", "6"])
    expected = pearsonr([1, 3, 5], [1, 2, 6])[0]
    assert score("pearson", ["1", guess, "5"], rows) == pytest.approx(expected)
    with pytest.raises(DataError, match="`many` is not a finite number"):
        score("pearson", ["1"], records(["many"]))


def test_exact_match_is_normalised_and_any_reference_counts() -> None:
    rows = [Record("x", "New York", (), ("NYC", "The Big Apple"))]
    for right in ("new  york.", " NEW YORK ", "nyc!", "the big apple"):
        assert score("exact_match", [right], rows) == 1.0
    for wrong in ("york", "new-york", ""):
        assert score("exact_match", [wrong], rows) == 0.0
    assert normalise("f(x)") == "f(x)" and normalise("?!") == "?!" and normalise("3.5.") == "3.5"


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (("hate", "not hate"), "hate"),
        (("irony", "non_irony"), "irony"),
        (("equivalent", "not equivalent"), "equivalent"),
        (("no", "yes"), "yes"),
        (("yes", "no"), "yes"),
        (("ham", "spam"), "spam"),
        (("0", "1"), "1"),
    ],
)
def test_the_positive_label_is_the_affirmed_one(labels: tuple[str, str], positive: str) -> None:
    assert positive_label(labels) == positive
    right = [positive]
    assert score("f1", right, records(right), labels) == 1.0


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(DataError, match=r"unknown metric `acuracy`.*`accuracy`"):
        score("acuracy", ["a"], records(["a"]))
    with pytest.raises(DataError, match="2 predictions came for 1 records"):
        score("accuracy", ["a", "b"], records(["a"]))
    with pytest.raises(DataError, match="0 predictions came for 0 records"):
        score("accuracy", [], [])
    with pytest.raises(DataError, match="without target"):
        score("accuracy", ["a"], records([""]))
    with pytest.raises(DataError, match="needs two labels and there are 3"):
        score("f1", ["a"], records(["a"]), ("a", "b", "c"))
    assert len(METRICS) == 8
