from __future__ import annotations

import numpy as np
import pytest

from weightpatch.errors import NoGapError
from weightpatch.statistics import area_under_curve, check_gap, mean_interval, recovery


def test_recovery_is_the_ratio_of_means_and_is_never_clipped() -> None:
    gap = np.array([1.0, 2.0, 3.0])
    found = recovery(np.array([[2.0, 4.0, 6.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 3.0]]), gap)
    np.testing.assert_allclose(found.ratio, [2.0, -1.0, 0.5])
    np.testing.assert_allclose(found.mean_of_ratios, [2.0, -1.0, 1 / 3])
    np.testing.assert_allclose([found.low[0], found.high[0]], 2.0)


def test_the_mean_of_ratios_leaves_out_prompts_without_a_real_gap() -> None:
    gap = np.array([2.0, 2.0, 2.0, 0.001])
    found = recovery(np.array([[1.0, 1.0, 1.0, 1.0]]), gap)
    np.testing.assert_allclose(found.mean_of_ratios, [0.5])


def test_a_negative_gap_keeps_the_sign_of_recovery() -> None:
    found = recovery(np.array([[-1.0, -1.0]]), np.array([-2.0, -2.0]))
    np.testing.assert_allclose([found.ratio, found.mean_of_ratios], 0.5)


def test_a_gap_that_could_be_zero_is_an_error_and_not_a_number() -> None:
    with pytest.raises(NoGapError, match="do not differ measurably in this readout"):
        recovery(np.ones((1, 4)), np.array([1.0, -1.0, 2.0, -2.0]))
    with pytest.raises(NoGapError):
        check_gap(np.array([0.0]))
    assert check_gap(np.array([0.5])).estimate == 0.5


def test_a_single_prompt_has_no_interval() -> None:
    found = recovery(np.array([[1.0]]), np.array([2.0]))
    assert found.ratio[0] == 0.5
    assert np.isnan([found.low[0], found.high[0]]).all()


def test_the_interval_of_the_mean_covers_the_truth_at_its_level() -> None:
    rng = np.random.default_rng(0)
    covered = [
        (interval := mean_interval(rng.normal(1.0, 1.0, size=24), seed=draw)).low <= 1.0 <= interval.high
        for draw in range(400)
    ]
    assert 0.90 <= np.mean(covered) <= 0.97


def test_intervals_depend_on_the_seed_alone() -> None:
    values = np.random.default_rng(1).normal(size=(3, 16))
    first, again, other = (recovery(values, np.full(16, 2.0), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.low, again.low)
    assert not np.array_equal(first.low, other.low)


def test_auc_counts_ties_half() -> None:
    assert area_under_curve(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert area_under_curve(np.array([1.0]), np.array([1.0])) == 0.5
    assert area_under_curve(np.array([0.0]), np.array([1.0])) == 0.0
