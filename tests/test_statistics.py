from __future__ import annotations

import math

import numpy as np
import pytest

from weightpatch.errors import NoGapError
from weightpatch.statistics import area_under_curve, check_gap, mean_interval, recovery


def test_recovery_is_the_ratio_of_means_and_is_never_clipped() -> None:
    gap = np.array([2.0, 2.5, 3.0])
    found = recovery(np.array([[4.0, 5.0, 6.0], [-2.0, -2.5, -3.0], [0.0, 0.0, 3.0]]), gap)
    np.testing.assert_allclose(found.ratio, [2.0, -1.0, 0.4])
    np.testing.assert_allclose(found.mean_of_ratios, [2.0, -1.0, 1 / 3])
    np.testing.assert_allclose([found.low[0], found.high[0]], 2.0)


def test_the_mean_of_ratios_leaves_out_prompts_without_a_real_gap() -> None:
    gap = np.array([2.0, 2.0, 2.0, 2.0, 2.0, 0.001])
    found = recovery(np.ones((1, 6)), gap)
    np.testing.assert_allclose(found.mean_of_ratios, [0.5])


def test_a_negative_gap_keeps_the_sign_of_recovery() -> None:
    found = recovery(np.array([[-1.0, -1.0]]), np.array([-2.0, -2.0]))
    np.testing.assert_allclose([found.ratio, found.mean_of_ratios], 0.5)


def test_a_gap_that_could_be_zero_is_an_error_and_not_a_number() -> None:
    with pytest.raises(NoGapError, match="do not differ measurably in this readout"):
        recovery(np.ones((1, 4)), np.array([1.0, -1.0, 2.0, -2.0]))
    with pytest.raises(NoGapError):
        check_gap(np.array([0.0]))
    with pytest.raises(NoGapError, match="1 of 3 prompts read NaN"):
        check_gap(np.array([1.0, math.nan, 2.0]))
    assert check_gap(np.array([0.5])).estimate == 0.5


def test_a_single_prompt_has_no_interval() -> None:
    found = recovery(np.array([[1.0]]), np.array([2.0]))
    assert found.ratio[0] == 0.5
    assert np.isnan([found.low[0], found.high[0]]).all()


@pytest.mark.parametrize("n", [3, 6, 24])
def test_a_gap_of_pure_noise_is_taken_for_real_at_most_at_the_stated_rate(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [mean_interval(rng.normal(size=n)) for _ in range(2000)]
    assert 0.035 <= np.mean([not interval.contains_zero for interval in intervals]) <= 0.065


@pytest.mark.parametrize(("n", "floor"), [(6, 0.90), (8, 0.92), (24, 0.93)])
def test_the_interval_of_a_recovery_covers_the_truth_about_at_its_level(n: int, floor: float) -> None:
    rng = np.random.default_rng(n)
    covered = []
    for draw in range(400):
        gap = rng.normal(5.0, 0.5, size=n)
        effects = 0.3 * gap + rng.normal(0.0, 0.5, size=(1, n))
        found = recovery(effects, gap, seed=draw)
        covered.append(found.low[0] <= 0.3 <= found.high[0])
    assert floor <= np.mean(covered) <= 0.99


def test_paraphrases_of_one_query_do_not_count_as_so_many_queries() -> None:
    rng = np.random.default_rng(5)
    queries = [f"q{place}" for place in range(6) for _ in range(4)]
    taken = []
    for _ in range(1000):
        gap = np.repeat(rng.normal(size=6), 4) + 0.01 * rng.normal(size=24)
        taken.append([not mean_interval(gap, groups=groups).contains_zero for groups in (queries, None)])
    with_groups, without = np.mean(taken, axis=0)
    assert with_groups < 0.07
    assert without > 0.3
    gap = 3 + 0.1 * np.repeat(rng.normal(size=6), 4)
    effects = (gap * (1 + np.repeat(rng.normal(size=6), 4)))[None]
    grouped, single = recovery(effects, gap, groups=queries), recovery(effects, gap)
    np.testing.assert_allclose(grouped.ratio, single.ratio)
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_intervals_depend_on_the_seed_alone() -> None:
    values = np.random.default_rng(1).normal(size=(3, 16))
    first, again, other = (recovery(values, np.full(16, 2.0), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.low, again.low)
    assert not np.array_equal(first.low, other.low)


def test_auc_counts_ties_half() -> None:
    assert area_under_curve(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert area_under_curve(np.array([1.0]), np.array([1.0])) == 0.5
    assert area_under_curve(np.array([0.0]), np.array([1.0])) == 0.0
