"""Statistics over tasks against published examples, scipy and every permutation written out."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

import study_fakes as fakes
from deltune.errors import StudyError
from deltune.study import statistics as st

# Demsar 2006, table 6: AUC of C4.5, with m, with cf, with both, on fourteen data sets.
DEMSAR = [
    (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967),
    (0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931),
    (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875),
    (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
    (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
]  # fmt: skip


def test_the_published_example_of_ranks_and_the_critical_difference() -> None:
    ranks = st.average_ranks(DEMSAR)
    assert ranks == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert st.critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert st.critical_difference(4, 14, 0.10) == pytest.approx(1.12, abs=5e-3)
    k, n = 4, 14
    plain = 12 * n / (k * (k + 1)) * (sum(r * r for r in ranks) - k * (k + 1) ** 2 / 4)
    assert plain == pytest.approx(9.28, abs=5e-3)
    statistic, p = st.friedman(DEMSAR)
    wanted = stats.friedmanchisquare(*zip(*DEMSAR, strict=True))
    assert (statistic, p) == (wanted.statistic, wanted.pvalue) and statistic > plain


def test_cliques_are_the_largest_groups_within_the_distance() -> None:
    ranks = [3.143, 2.000, 2.893, 1.964]
    assert st.cliques(ranks, 1.25) == [(3, 1, 2, 0)]
    assert st.cliques(ranks, 1.0) == [(3, 1, 2), (2, 0)]
    assert st.cliques([1.0, 2.0, 3.0, 9.0], 1.5) == [(0, 1), (1, 2)]
    assert st.cliques([1.0, 5.0], 1.0) == []


def test_the_permutation_test_is_that_of_all_signs() -> None:
    rng = np.random.default_rng(1)
    mine, theirs = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    d = mine - theirs
    signs = np.array(list(itertools.product((1, -1), repeat=9)))
    means = (signs * d).mean(1)
    wanted = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    found = st.compare([[x] for x in mine], [[x] for x in theirs])
    assert found.p == pytest.approx(wanted) and found.difference == pytest.approx(d.mean())
    assert found.wins == np.mean(d > 0) and found.tasks == 9


def test_nothing_different_has_no_p_and_half_the_wins() -> None:
    same = st.compare([[0.5], [0.7]], [[0.5], [0.7]])
    assert (same.p, same.wins, same.difference) == (1.0, 0.5, 0.0)
    assert st.friedman([(1.0, 1.0, 1.0)] * 4) == (0.0, 1.0)
    assert st.compare([[0.9]], [[0.5]]).p == 1.0


def test_the_interval_covers_tasks_and_seeds() -> None:
    rng = np.random.default_rng(2)
    one = [list(rng.normal(0.6, 0.05, size)) for size in (3, 2, 3, 1, 3, 3, 2, 3, 3, 3)]
    two = [list(rng.normal(0.5, 0.05, 3)) for _ in one]
    found = st.compare(one, two)
    means = []
    for _ in range(4000):  # the same by hand, one draw after another
        tasks = rng.integers(len(one), size=len(one))
        pairs = [[rng.choice(rows[t], len(rows[t])).mean() for t in tasks] for rows in (one, two)]
        means.append(np.mean(pairs[0]) - np.mean(pairs[1]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=3e-3) and found.high == pytest.approx(high, abs=3e-3)
    assert found.low < found.difference < found.high
    with pytest.raises(StudyError, match="1 tasks against 2"):
        st.compare(one[:1], two[:2])


def test_holm_is_the_step_down_rule() -> None:
    # Each value times how many are left, never below an earlier one: by hand.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.6]) == [1.0, 1.0] and st.holm([]) == []


def test_corrected_steps_and_area() -> None:
    assert st.corrected(0.75, 1.0, 0.5, 0.9) == 0.5 and st.corrected(0.4, 0.6, 0.5, 0.6) is None
    curve = [(10, 1.0, 0.5), (20, 2.5, 0.88), (30, 4.0, 0.95), (40, 5.0, 0.9)]
    assert st.steps_to(curve) == (20, 2.5) and st.steps_to(curve, 0.99) == (30, 4.0)
    below = [[10, 1.0, -0.3], [20, 2.0, -0.05], [30, 3.0, -0.1]]
    assert st.steps_to(below) == (20, 2.0)  # a correlation that never rises above 0
    wanted = np.trapezoid([0.5, 0.88, 0.95, 0.9], [10, 20, 30, 40]) / 30
    assert st.area(curve) == pytest.approx(wanted) and st.area(curve[:1]) == 0.5
    with pytest.raises(StudyError, match="expected one for each method"):
        st.average_ranks([(1.0, 2.0), (1.0,)])


def test_what_is_told_from_guessing_is_two_standard_errors_above_it() -> None:
    toy = fakes.make_plan([]).tasks[0]
    share = dataclasses.replace(toy, chance=0.5, test=100)  # sqrt(0.5 * 0.5 / 100) = 0.05
    assert share.floor == pytest.approx(0.6)
    assert dataclasses.replace(share, metric="pearson", chance=0.0).floor == pytest.approx(0.2)


def test_means_that_differ_by_the_order_of_addition_are_equal() -> None:
    """Three seeds of 300 examples each, 747 right of 900 with both methods."""
    one, other = [265 / 300, 249 / 300, 233 / 300], [239 / 300, 259 / 300, 249 / 300]
    assert sum(one) / 3 != sum(other) / 3
    assert st.compare([one, [0.5]], [other, [0.4]]).wins == 0.75
    assert st.average_ranks([[sum(one) / 3, sum(other) / 3]]) == [1.5, 1.5]
