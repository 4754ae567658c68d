from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, pearsonr, spearmanr

from weightpatch.agreement import (
    LEAST_SIGN,
    LEAST_SPEARMAN,
    Agreement,
    Floats,
    LayerError,
    agreement,
    is_poor,
    missed_at_most,
    poor_layers,
)

RNG = np.random.default_rng(0)
EXACT = RNG.normal(size=200) ** 3
ESTIMATE = 0.7 * EXACT + 0.3 * RNG.normal(size=200)


def some_agreement(*, n: int = 100, spearman: float = 0.95, sign: float = 0.95) -> Agreement:
    return Agreement(n=n, pearson=0.95, spearman=spearman, sign=sign, slope=1.0, error=0.1, overlap={})


def figures(found: Agreement) -> list[float]:
    return [found.pearson, found.spearman, found.sign, found.slope, found.error]


def chances(n_rest: int, n_above: int, n_sampled: int) -> list[Fraction]:
    """Probability of each number above the threshold in the sample, by counting the samples."""
    n_samples = math.comb(n_rest, n_sampled)
    return [
        Fraction(math.comb(n_above, found) * math.comb(n_rest - n_above, n_sampled - found), n_samples)
        for found in range(n_sampled + 1)
    ]


def test_an_estimate_equal_to_the_exact_values_agrees_in_every_figure() -> None:
    found = agreement(EXACT, EXACT)
    np.testing.assert_allclose(figures(found), [1, 1, 1, 1, 0], rtol=1e-12)
    assert found.overlap == {5: 1.0, 10: 1.0, 20: 1.0, 50: 1.0}
    assert found.n == 200
    assert not is_poor(found)


def test_an_estimate_twice_too_large_has_slope_one_half_and_is_off_by_everything() -> None:
    found = agreement(2 * EXACT, EXACT)
    np.testing.assert_allclose(figures(found), [1, 1, 1, 0.5, 1], rtol=1e-12)
    assert set(found.overlap.values()) == {1.0}


def test_reversed_signs_are_told_apart_from_wrong_sizes() -> None:
    found = agreement(-EXACT, EXACT)
    np.testing.assert_allclose(figures(found), [-1, -1, 0, -1, 2], rtol=1e-12)
    assert set(found.overlap.values()) == {1.0}  # by size, whatever the sign
    assert is_poor(found)


def test_an_estimate_of_zero_for_every_item_is_off_by_one() -> None:
    found = agreement(np.zeros_like(EXACT), EXACT)
    np.testing.assert_array_equal(figures(found), [np.nan, np.nan, 0, np.nan, 1])
    np.testing.assert_allclose(found.overlap[50], 50 / 200)  # what a random order would share
    assert is_poor(found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_values", [4, 10**6])
def test_correlations_are_those_of_scipy_with_and_without_ties(seed: int, n_values: int) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.integers(n_values, size=40).astype(float)
    estimate = exact + rng.integers(n_values, size=40).astype(float)
    found = agreement(estimate, exact)
    np.testing.assert_allclose(found.pearson, pearsonr(estimate, exact).statistic, rtol=1e-12)
    np.testing.assert_allclose(found.spearman, spearmanr(estimate, exact).statistic, rtol=1e-12)


def test_rounding_takes_no_correlation_beyond_one() -> None:
    for seed in range(50):
        exact = np.random.default_rng(seed).normal(size=30)
        same, reversed_sign = agreement(exact, exact), agreement(-exact, exact)
        assert max(same.pearson, same.spearman) <= 1
        assert min(reversed_sign.pearson, reversed_sign.spearman) >= -1


def test_slope_and_error_are_those_of_least_squares_and_of_the_definition() -> None:
    found = agreement(ESTIMATE, EXACT)
    np.testing.assert_allclose(found.slope, np.linalg.lstsq(ESTIMATE[:, None], EXACT, rcond=None)[0][0], rtol=1e-12)
    np.testing.assert_allclose(found.error, np.abs(ESTIMATE - EXACT).sum() / np.abs(EXACT).sum(), rtol=1e-12)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-900, 2.0**900])  # 1e-9; squares that would be 0; or infinite
def test_the_unit_of_the_values_changes_nothing(scale: float) -> None:
    assert agreement(scale * ESTIMATE, scale * EXACT) == agreement(ESTIMATE, EXACT)


def test_the_order_of_the_items_changes_nothing_even_with_ties() -> None:
    exact, estimate = np.round(EXACT), np.round(ESTIMATE)
    order = np.random.default_rng(1).permutation(len(exact))
    found, shuffled = agreement(estimate, exact), agreement(estimate[order], exact[order])
    np.testing.assert_allclose(figures(shuffled), figures(found), rtol=1e-12)
    np.testing.assert_allclose(list(shuffled.overlap.values()), list(found.overlap.values()), rtol=1e-12)


def test_the_arrays_of_the_caller_are_left_as_they_are() -> None:
    estimate, exact = ESTIMATE.copy(), EXACT.copy()
    estimate.flags.writeable = exact.flags.writeable = False
    assert agreement(estimate, exact) == agreement(ESTIMATE, EXACT)
    assert poor_layers(estimate, exact, np.zeros(200, dtype=np.intp), most_error=10.0) == ()


def test_a_zero_agrees_in_sign_with_a_zero_alone() -> None:
    exact = np.array([0.0, 0.0, 0.0, 1.0, -1.0, 2.0, -2.0, -0.0])
    estimate = np.array([0.0, 1.0, -1.0, 0.0, 0.0, 3.0, 3.0, 0.0])
    assert agreement(estimate, exact).sign == 3 / 8


def test_overlap_is_the_share_of_the_largest_that_the_estimate_has_among_its_largest() -> None:
    exact = np.array([9.0, -8.0, 7.0, -6.0, 0.5, 0.4, 0.3, 0.2])
    estimate = np.array([0.1, 8.0, -7.0, 0.2, 6.0, 5.0, 0.3, 0.4])
    found = agreement(estimate, exact, overlap_at=(1, 2, 3, 4, 7, 8, 50))
    assert found.overlap == {1: 0.0, 2: 1 / 2, 3: 2 / 3, 4: 2 / 4, 7: 6 / 7}  # from 8 on it would be 1 in any case


def test_items_tied_at_the_cut_share_its_places() -> None:
    exact = np.array([5.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    found = agreement(np.array([5.0, 4.0, 1.0, 1.0, 1.0, -1.0]), exact, overlap_at=(2, 4))
    assert found.overlap == {2: 1.0, 4: (2 + 4 * 0.5 * 0.5) / 4}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_items_have_no_correlation_and_no_verdict(n: int) -> None:
    found = agreement(-np.arange(1.0, n + 1), np.arange(1.0, n + 1))
    assert found.n == n
    assert np.isnan([found.pearson, found.spearman]).all()
    np.testing.assert_allclose([found.sign, found.slope, found.error], [0, -1, 2] if n else 3 * [np.nan])
    assert not is_poor(found)


@pytest.mark.parametrize("constant", [0.1, 0.3, 1e-9])  # their means are not exactly themselves
def test_a_constant_side_has_no_correlation_and_counts_as_poor(constant: float) -> None:
    for pair in ((np.full(7, constant), np.arange(1.0, 8.0)), (np.arange(1.0, 8.0), np.full(7, constant))):
        found = agreement(*pair)
        assert np.isnan([found.pearson, found.spearman]).all()
        assert found.sign == 1
        assert is_poor(found)


def test_the_error_against_zeros_is_infinite_unless_the_estimate_is_zero_too() -> None:
    zeros = np.zeros(6)
    assert agreement(np.ones(6), zeros).error == np.inf
    assert np.isnan(agreement(zeros, zeros).error)


def test_arrays_that_do_not_fit_are_an_error_and_not_a_number() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) for exact values of shape \(4,\)"):
        agreement(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="2 of 4 items are not finite"):
        agreement(np.array([1.0, np.nan, 2.0, 3.0]), np.array([1.0, 2.0, -np.inf, 3.0]))
    with pytest.raises(ValueError, match="compare the 0 largest items"):
        agreement(np.ones(4), np.ones(4), overlap_at=(5, 0))
    with pytest.raises(ValueError, match="give each item its layer"):
        poor_layers(np.ones(4), np.ones(4), np.zeros(3, dtype=np.intp), most_error=0.5)


@pytest.mark.parametrize(
    ("spearman", "sign", "poor"),
    [
        (LEAST_SPEARMAN, LEAST_SIGN, False),
        (LEAST_SPEARMAN - 0.01, 1.0, True),
        (1.0, LEAST_SIGN - 0.01, True),
        (float("nan"), 1.0, True),
    ],
)
def test_an_estimate_is_poor_below_either_bound(spearman: float, sign: float, poor: bool) -> None:
    assert is_poor(some_agreement(spearman=spearman, sign=sign)) == poor
    assert not is_poor(some_agreement(n=2, spearman=spearman, sign=sign))


def test_layers_that_are_off_come_worst_first() -> None:
    layers = np.repeat([7, 0, 3, 11, 5, 2], [6, 5, 8, 4, 5, 5])
    factors = {7: 1.2, 0: 1.0, 3: 1.9, 11: 9.0, 5: 0.5, 2: 1.5}  # layer 11 has too few items to be judged
    exact = np.random.default_rng(2).normal(size=len(layers))
    estimate = exact * np.array([factors[layer] for layer in layers.tolist()])
    order = np.random.default_rng(3).permutation(len(layers))
    found = poor_layers(estimate[order], exact[order], layers[order], most_error=0.4)
    assert [(entry.layer, entry.n) for entry in found[:1]] == [(3, 8)]
    assert {(entry.layer, entry.n) for entry in found[1:]} == {(2, 5), (5, 5)}
    np.testing.assert_allclose([entry.error for entry in found], [0.9, 0.5, 0.5], rtol=1e-12)
    assert len(poor_layers(estimate, exact, layers, most_error=0.1)) == 4


def test_the_error_of_a_layer_is_the_agreement_of_its_items() -> None:
    layers = np.random.default_rng(4).integers(9, size=200)
    found = poor_layers(ESTIMATE, EXACT, layers, most_error=-1.0)
    assert sorted(entry.layer for entry in found) == list(range(9))
    for entry in found:
        own = agreement(ESTIMATE[layers == entry.layer], EXACT[layers == entry.layer])
        assert entry.n == own.n
        np.testing.assert_allclose(entry.error, own.error, rtol=1e-12)


def test_equally_bad_layers_come_from_the_bottom_up_and_silent_ones_not_at_all() -> None:
    layers = np.repeat([4, 1, 2, 3], 5)
    exact = np.repeat([1.0, 1.0, 0.0, 0.0], 5)
    estimate = np.repeat([2.0, 2.0, 0.0, 1.0], 5)
    assert poor_layers(estimate, exact, layers, most_error=0.5) == (
        LayerError(layer=3, n=5, error=np.inf),  # something was estimated where there is nothing
        LayerError(layer=1, n=5, error=1.0),
        LayerError(layer=4, n=5, error=1.0),
    )
    layers = np.arange(300) % 60
    many = poor_layers(2.0 + (layers % 2).astype(float), np.ones(300), layers, most_error=0.5)
    assert [entry.layer for entry in many] == [*range(1, 60, 2), *range(0, 60, 2)]
    nothing: Floats = np.zeros(0)
    assert poor_layers(nothing, nothing, np.zeros(0, dtype=np.intp), most_error=0.5) == ()


@pytest.mark.parametrize("confidence", [Fraction(1, 2), Fraction(9, 10), Fraction(19, 20), Fraction(99, 100)])
def test_the_bound_on_the_missed_holds_at_its_confidence_whatever_the_truth(confidence: Fraction) -> None:
    n_rest = 12
    for n_sampled in range(n_rest + 1):
        bounds = [
            missed_at_most(n_rest=n_rest, n_sampled=n_sampled, n_found=found, confidence=float(confidence))
            for found in range(n_sampled + 1)
        ]
        for n_above in range(n_rest + 1):
            chance = chances(n_rest, n_above, n_sampled)
            holds = sum(p for found, p in enumerate(chance) if n_above - found <= bounds[found])
            assert sum(chance) == 1
            assert holds >= confidence


@pytest.mark.parametrize("confidence", [Fraction(1, 2), Fraction(9, 10), Fraction(19, 20), Fraction(99, 100)])
@pytest.mark.parametrize("n_rest", [1, 2, 7, 12])
def test_the_bound_is_the_largest_number_that_the_sample_does_not_rule_out(n_rest: int, confidence: Fraction) -> None:
    for n_sampled in range(n_rest + 1):
        likely = [chances(n_rest, n_above, n_sampled) for n_above in range(n_rest + 1)]
        for found in range(n_sampled + 1):
            possible = [n_above for n_above in range(n_rest + 1) if sum(likely[n_above][: found + 1]) > 1 - confidence]
            bound = missed_at_most(n_rest=n_rest, n_sampled=n_sampled, n_found=found, confidence=float(confidence))
            assert bound == max(possible) - found


def test_without_a_sample_anything_can_be_missed_and_with_all_of_it_nothing() -> None:
    assert missed_at_most(n_rest=0, n_sampled=0, n_found=0) == 0
    for n_rest in (1, 12, 50_000):
        assert missed_at_most(n_rest=n_rest, n_sampled=0, n_found=0) == n_rest
        for n_found in (0, n_rest // 2, n_rest):
            assert missed_at_most(n_rest=n_rest, n_sampled=n_rest, n_found=n_found) == 0
    assert missed_at_most(n_rest=50_000, n_sampled=300, n_found=300) == 49_700


def test_the_bound_falls_with_the_sample_and_grows_with_what_was_found_and_with_confidence() -> None:
    def bounds(name: str, values: Iterable[float]) -> list[int]:
        given: dict[str, Any] = {"n_rest": 900, "n_sampled": 90, "n_found": 3}
        return [missed_at_most(**given | {name: value}) for value in values]

    by_sample, by_rest = bounds("n_sampled", range(3, 901)), bounds("n_rest", range(90, 2000, 10))
    by_found, by_confidence = bounds("n_found", range(91)), bounds("confidence", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
    assert by_sample == sorted(by_sample, reverse=True)
    assert [by_sample[0], by_sample[-1]] == [897, 0]
    for growing in (by_confidence, by_rest, by_found):
        assert growing == sorted(growing)
        assert growing[0] < growing[-1]


def test_a_small_sample_of_a_large_rest_comes_to_the_rule_of_three() -> None:
    bound = missed_at_most(n_rest=1_000_000, n_sampled=1000, n_found=0)
    assert abs(bound / 1_000_000 - 3 / 1000) < 2e-5
    for n_found in (0, 1, 20):  # the binomial bound is the limit for a rest without end
        share = (n_found + missed_at_most(n_rest=1_000_000, n_sampled=1000, n_found=n_found)) / 1_000_000
        assert abs(binom.cdf(n_found, 1000, share) - 0.05) < 1e-3


@pytest.mark.parametrize(("n_sampled", "n_found"), [(300, 0), (300, 150), (10_000, 37), (500_000, 250_000)])
def test_the_bound_for_a_million_items_is_there_at_once(n_sampled: int, n_found: int) -> None:
    start = perf_counter()
    bound = missed_at_most(n_rest=1_000_000, n_sampled=n_sampled, n_found=n_found)
    assert perf_counter() - start < 2
    left = 1_000_000 - n_sampled
    assert left * n_found / n_sampled < bound < left * (n_found + 3 + 3 * n_found**0.5) / n_sampled


@pytest.mark.parametrize(("n_rest", "n_sampled", "n_found"), [(10, 11, 0), (10, 5, 6), (10, 5, -1)])
def test_counts_that_do_not_nest_are_an_error(n_rest: int, n_sampled: int, n_found: int) -> None:
    with pytest.raises(ValueError, match=f"found {n_found} in a sample of {n_sampled} out of {n_rest}"):
        missed_at_most(n_rest=n_rest, n_sampled=n_sampled, n_found=n_found)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="needs a probability between 0 and 1"):
        missed_at_most(n_rest=10, n_sampled=5, n_found=0, confidence=confidence)
