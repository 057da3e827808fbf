"What a few runs say: tables, closed forms, other libraries, coverage, bad input."

import itertools
import math

import numpy as np
import pytest
import torch

from po_book.intervals import (
    interval,
    median_interval,
    probability_of_improvement,
    student_t,
)

INF = math.inf
TEN = [3.0, 7, 1, 4, 9, 5, 8, 2, 6, 10]


@pytest.mark.parametrize(
    "level, dof, table",
    [
        (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 7, 2.365), (0.95, 9, 2.262),
        (0.95, 19, 2.093), (0.95, 120, 1.980), (0.99, 7, 3.499), (0.99, 2, 9.925),
        (0.5, 1, 1.000), (0.8, 4, 1.533), (0.98, 5, 3.365), (0.999, 30, 3.646),
    ],
)  # fmt: skip
def test_the_printed_table_of_student(level, dof, table):
    assert round(student_t(level, dof), 3) == table


def test_student_as_another_library_has_it():
    stats = pytest.importorskip("scipy.stats")
    for level, dof in itertools.product((0.01, 0.5, 0.9, 0.99, 0.9999), range(1, 60)):
        expected = stats.t.ppf((1 + level) / 2, dof)
        assert student_t(level, dof) == pytest.approx(expected, rel=1e-9)


def test_student_becomes_normal():
    assert student_t(0.95, 100_000) == pytest.approx(1.959964, abs=5e-5)


def test_a_mean_by_hand():
    found = interval([1, 2, 3])
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert found.estimate == 2 and (found.n, found.level, found.comparisons) == (3, 0.95, 1)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_the_interval_of_another_library():
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(0).normal(size=(2, 8))
    ends = stats.ttest_rel(x, y).confidence_interval(1 - 0.05 / 4)
    found = interval(x, y, comparisons=4)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_two_methods_are_compared_run_by_run():
    x, y = np.random.default_rng(1).normal(size=(2, 10))
    assert interval(x, y) == interval(x - y)
    shared = 100 * np.random.default_rng(2).normal(size=10)
    near, far = interval(x, y), interval(x + shared, y + shared)
    assert (far.low, far.high) == pytest.approx((near.low, near.high))
    back = interval(y, x)
    assert (back.low, back.high) == pytest.approx((-near.high, -near.low))


def test_a_mean_moves_and_grows_with_its_runs():
    plain, moved = interval(TEN), interval(3 * np.array(TEN) + 1)
    assert (moved.low, moved.high) == pytest.approx((3 * plain.low + 1, 3 * plain.high + 1))
    assert interval(TEN[::-1]).low == pytest.approx(plain.low)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, np.float32])
def test_kinds_of_runs(kind):
    assert interval(kind(TEN)) == interval(TEN)
    assert median_interval(kind(TEN)) == median_interval(TEN)
    assert probability_of_improvement(kind(TEN), TEN).share == 0.5


def covered(rows, truth, find):
    found = [find(x) for x in rows]
    return np.mean([i.low <= truth <= i.high for i in found])


@pytest.mark.parametrize("n", [2, 3, 8, 10])
def test_the_interval_of_a_mean_keeps_its_promise(n):
    rows = np.random.default_rng(n).normal(5, 3, size=(3000, n))
    for level in 0.8, 0.95:
        share = covered(rows, 5, lambda x: interval(x, level=level))
        assert share == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 3000))


def test_several_comparisons_are_right_together():
    base, others = np.split(np.random.default_rng(0).normal(size=(2000, 5, 8)), [1], axis=1)
    right = [
        all(i.low <= 0 <= i.high for i in (interval(x, b[0], comparisons=4) for x in rows))
        for b, rows in zip(base, others)
    ]
    assert np.mean(right) >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    "n, k, level",
    [(6, 1, 62 / 64), (8, 1, 254 / 256), (9, 2, 492 / 512), (10, 2, 1002 / 1024), (12, 3, 3938 / 4096)],
)
def test_the_ranks_around_a_median(n, k, level):
    x = np.random.default_rng(n).permutation(n) + 1.0
    found = median_interval(x)
    assert (found.low, found.high, found.level) == (k, n + 1 - k, pytest.approx(level))
    assert found.estimate == (n + 1) / 2


def test_a_median_allows_for_comparisons():
    found = median_interval(TEN, comparisons=10)
    assert (found.low, found.high, found.level) == (1, 10, pytest.approx(1 - 10 * 2 / 1024))


def test_runs_that_never_arrive():
    found = median_interval([1, 2, 3, 4, 5, 6, 7, 8, INF, INF])
    assert (found.low, found.estimate, found.high) == (2, 5.5, INF)
    found = median_interval([1, 2, 3] + 7 * [INF])
    assert (found.low, found.estimate, found.high) == (2, INF, INF)
    assert f"{found:.0f}" == "inf (2 to inf; n = 10, 97.9 %)"


def test_a_median_only_asks_for_order():
    x = np.array(TEN)
    plain, bent = median_interval(x), median_interval(np.exp(x))
    assert (bent.low, bent.high) == pytest.approx((np.exp(plain.low), np.exp(plain.high)))


def test_the_interval_of_a_median_keeps_its_promise_for_any_law():
    rng = np.random.default_rng(0)
    for rows, truth in (rng.exponential(size=(3000, 10)), math.log(2)), (
        rng.standard_cauchy(size=(3000, 10)), 0.0
    ):  # fmt: skip
        share = covered(rows, truth, median_interval)
        assert share == pytest.approx(1002 / 1024, abs=4 * math.sqrt(0.0215 / 3000))


def brute(x, y):
    "Share, and p from all deals, each share counted anew."
    def share(a, b):
        return np.mean([(u > v) + (u == v) / 2 for u in a for v in b])

    both, n, off = np.concatenate([x, y]), len(x), []
    for mine in itertools.combinations(range(2 * n), n):
        rest = [i for i in range(2 * n) if i not in mine]
        off.append(abs(share(both[list(mine)], both[rest]) - 0.5))
    seen = share(x, y)
    return seen, np.mean([s >= abs(seen - 0.5) - 1e-12 for s in off])


@pytest.mark.parametrize("seed", range(6))
def test_improvement_from_its_definition(seed):
    x, y = np.random.default_rng(seed).integers(0, 5, size=(2, 6)).astype(float)
    x[0], y[1] = INF, -INF
    found = probability_of_improvement(x, y)
    assert (found.share, found.p) == pytest.approx(brute(x, y))


def test_improvement_as_another_library_has_it():
    stats = pytest.importorskip("scipy.stats")
    for seed, n in enumerate((4, 10, 20)):
        x, y = np.random.default_rng(seed).normal(size=(2, n))
        test = stats.mannwhitneyu(x, y, method="exact")
        found = probability_of_improvement(x, y)
        assert found.share == pytest.approx(test.statistic / n**2)
        assert found.p == pytest.approx(test.pvalue)


def test_improvement_one_way_and_the_other():
    x, y = np.random.default_rng(4).normal(size=(2, 10))
    there, back = probability_of_improvement(x, y), probability_of_improvement(y, x)
    assert (back.share, back.p) == pytest.approx((1 - there.share, there.p))
    one, other = (np.random.default_rng(5).permutation(10) for _ in range(2))
    again = probability_of_improvement(np.exp(x[one]), np.exp(y[other]))
    assert (again.share, again.p) == pytest.approx((there.share, there.p))


@pytest.mark.parametrize("n", [1, 3, 10, 40])
def test_all_runs_ahead(n):
    found = probability_of_improvement(np.arange(n) + n, np.arange(n))
    p = 2 / math.comb(2 * n, n)
    assert (found.share, found.p) == (1.0, pytest.approx(p))
    found = probability_of_improvement(np.arange(n) + n, np.arange(n), comparisons=8)
    assert found.p == pytest.approx(min(1, 8 * p))


@pytest.mark.parametrize("k", [1, 4, 6, 10])
def test_failures_are_fishers(k):
    "k of ten fail for the one and none for the other."
    failed = [1.0] * k + [0.0] * (10 - k)
    p = 2 * math.comb(10, k) / math.comb(20, k)
    assert probability_of_improvement(failed, [0.0] * 10).p == pytest.approx(min(p, 1))
    assert probability_of_improvement([0.0] * 10, [0.0] * 10).p == 1


def test_p_is_rarely_small_by_chance():
    "At most as often as it says, and less often if a seed does the same to both."
    draws = np.random.default_rng(0).normal(size=(3000, 2, 8))
    shared = draws + np.random.default_rng(1).normal(size=(3000, 1, 8))
    small, rarer = (
        np.mean([probability_of_improvement(*pair).p <= 0.05 for pair in x])
        for x in (draws, shared)
    )
    assert rarer < small <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 3000)


def test_what_a_sentence_says():
    found = interval([1.3, 2.1, 3.2], [1, 2, 3], comparisons=4)
    assert f"{found:+.2f}" == "+0.20 (-0.31 to +0.71; n = 3, 95 %, for 4 comparisons)"
    assert str(interval([1, 2, 3])) == repr(interval([1, 2, 3])) == (
        "2 (-0.484 to 4.48; n = 3, 95 %)"
    )  # fmt: skip
    found = probability_of_improvement([5, 2], [1, 3])
    assert str(found) == "0.75 (p = 0.67; n = 2)"
    found = probability_of_improvement([5, 6], [1, 3], comparisons=2)
    assert str(found) == "1.00 (p = 0.67; n = 2, for 2 comparisons)"


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: student_t(1.0, 3), "level must be in \\(0, 1\\), got 1.0"),
        (lambda: student_t(0.95, 0), "dof must be at least 1, got 0"),
        (lambda: student_t(0.95, 2.5), "dof must be a whole number, got 2.5"),
        (lambda: interval([1.0]), "runs must be one number for each of at least 2 runs"),
        (lambda: interval([[1.0, 2.0]]), "runs must be one number .* got shape \\(1, 2\\)"),
        (lambda: interval([1.0, math.nan]), "runs must be free of NaN"),
        (lambda: interval([1.0, INF]), "runs and others must be finite"),
        (lambda: interval([1.0, INF], [1.0, INF]), "runs and others must be finite"),
        (lambda: interval([1.0, 2.0], [1.0, 2.0, 3.0]), "others must be of 2 runs as well, got 3"),
        (lambda: interval([1.0, 2.0], level=95), "level must be in"),
        (lambda: interval([1.0, 2.0], comparisons=0), "comparisons must be at least 1"),
        (lambda: interval([1.0, 2.0], comparisons=1.5), "comparisons must be a whole number"),
        (lambda: median_interval(TEN[:5]), "number of runs must be more .* got 5"),
        (lambda: median_interval(TEN, comparisons=26), "more for a level of 0.95 and 26"),
        (lambda: median_interval([]), "runs must be one number"),
        (lambda: median_interval(TEN + [math.nan]), "runs must be free of NaN"),
        (lambda: median_interval(TEN + [-INF]), "runs must be numbers or \\+inf"),
        (lambda: probability_of_improvement(TEN, TEN[:9]), "others must be of 10 runs"),
        (lambda: probability_of_improvement(TEN[:9] + [math.nan], TEN), "runs must be free"),
        (lambda: probability_of_improvement(TEN, TEN, comparisons=-1), "comparisons must be"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
