from __future__ import annotations

import math
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import spearmanr

from weightpatch.stability import Areas, Stability, across, areas, between, overlaps, split_halves
from weightpatch.statistics import Floats

RNG = np.random.default_rng(0)
EFFECTS = RNG.normal(size=(60, 12)) + 2 * RNG.normal(size=(60, 1))
QUERIES = [f"q{place // 2}" for place in range(12)]


def names(n: int) -> list[str]:
    return [f"c{place}" for place in range(n)]


def figures(found: Stability) -> list[float]:
    return [found.spearman, found.spearman_low, found.spearman_high]


def jaccard(one: Floats, other: Floats, k: int) -> float:
    first, second = (set(np.argsort(values)[-k:].tolist()) for values in (one, other))
    return len(first & second) / len(first | second)


def curve(found: Areas) -> list[float]:
    return [found.cpr, found.cmd]


@cache
def chance(n: int, k: int, least: int) -> float:
    """Share of the sets of k out of n that have at least so many in common with the first k, by counting them."""
    sets = list(combinations(range(n), k))
    return sum(len(set(one) & set(range(k))) >= least for one in sets) / len(sets)


def test_the_chance_of_an_overlap_is_that_of_all_sets_of_its_size() -> None:
    one = names(6)
    for other in permutations(one):
        for found in overlaps(one, other, at=(1, 2, 3, 4, 5)):
            assert found.n_common == len(set(one[: found.k]) & set(other[: found.k]))
            np.testing.assert_allclose(found.p, chance(6, found.k, found.n_common), rtol=1e-12)
            assert found.p <= 1


def test_over_all_orders_the_overlap_is_the_expected_one_and_p_is_at_most_its_level() -> None:
    found = [overlaps(names(6), other, at=(3,))[0] for other in permutations(names(6))]
    np.testing.assert_allclose(np.mean([one.n_common for one in found]), found[0].expected, rtol=1e-12)
    assert found[0].expected == 1.5
    p = np.array([one.p for one in found])
    for level in np.unique(p):
        np.testing.assert_allclose((p <= level).mean(), level, rtol=1e-12)


def test_equal_rankings_have_everything_in_common_and_opposite_ones_nothing_below_the_middle() -> None:
    one = names(500)
    for found in overlaps(one, one):
        assert (found.n, found.n_common) == (500, found.k)
        np.testing.assert_allclose(math.log(found.p), -math.log(math.comb(500, found.k)), rtol=1e-9)
    for found in overlaps(one, one[::-1]):
        assert (found.n_common, found.p) == (0, 1.0)


def test_every_k_below_the_number_of_items_is_there_and_no_other() -> None:
    for n, expected in ((20, []), (21, [20]), (100, [20, 50]), (201, [20, 50, 100, 200])):
        assert [found.k for found in overlaps(names(n), names(n))] == expected
    assert overlaps([], []) == ()


def test_overlap_is_the_same_either_way_and_whatever_the_order_within_the_leading() -> None:
    rng = np.random.default_rng(1)
    one, other = names(300), [f"c{place}" for place in rng.permutation(300)]
    assert overlaps(one, other) == overlaps(other, one)
    turned = one[:50][::-1] + one[50:][::-1]
    assert overlaps(turned, other, at=(50,)) == overlaps(one, other, at=(50,))


def test_rankings_of_different_or_repeated_items_are_an_error_that_names_one() -> None:
    with pytest.raises(ValueError, match=r"rankings of different items \(c\): rank the same items, each once"):
        overlaps(["a", "b", "c"], ["b", "a"])
    with pytest.raises(ValueError, match=r"different items \(one that is there twice\)"):
        overlaps(["a", "b", "b"], ["a", "b", "b"])
    with pytest.raises(ValueError, match="the 0 leading items: at needs numbers of at least 1"):
        overlaps(["a", "b", "c"], ["a", "b", "c"], at=(2, 0))


def test_equal_prompts_rank_components_alike_in_whatever_halves() -> None:
    per_prompt = np.repeat(np.random.default_rng(2).normal(size=(60, 1)), 12, axis=1)
    for found in (split_halves(per_prompt, groups=QUERIES), across(per_prompt, QUERIES)):
        np.testing.assert_allclose(figures(found), 1, rtol=1e-12)
        assert found.jaccard == {10: 1.0, 20: 1.0, 50: 1.0}


def test_two_queries_have_one_split_and_stay_whole_in_it() -> None:
    groups = ["a", "b"] * 6
    of_a, of_b = EFFECTS[:, ::2].mean(axis=1), EFFECTS[:, 1::2].mean(axis=1)
    expected = spearmanr(of_a, of_b).statistic
    found = split_halves(EFFECTS, groups=groups, n_splits=20)
    np.testing.assert_allclose(figures(found), expected, rtol=1e-12)
    assert found.n == 20
    assert found.jaccard == pytest.approx({k: jaccard(of_a, of_b, k) for k in (10, 20, 50)})


def test_random_splits_come_close_to_all_splits_in_mean_and_in_range() -> None:
    all_splits = []
    for chosen in combinations(range(6), 3):
        is_first = np.isin(np.arange(12) // 2, chosen)
        all_splits.append(spearmanr(EFFECTS[:, is_first].mean(axis=1), EFFECTS[:, ~is_first].mean(axis=1)).statistic)
    found = split_halves(EFFECTS, groups=QUERIES, n_splits=2000)
    assert abs(found.spearman - np.mean(all_splits)) < 4 * np.std(all_splits) / math.sqrt(2000)
    assert min(all_splits) - 1e-12 <= found.spearman_low < found.spearman < found.spearman_high
    assert found.spearman_high <= max(all_splits) + 1e-12


def test_an_odd_number_of_queries_is_split_as_evenly_as_it_goes() -> None:
    per_prompt = np.random.default_rng(3).normal(size=(30, 3))
    possible = [
        spearmanr(per_prompt[:, alone], np.delete(per_prompt, alone, axis=1).mean(axis=1)).statistic
        for alone in range(3)
    ]
    found = split_halves(per_prompt, groups=["a", "b", "c"], n_splits=200)
    np.testing.assert_allclose([found.spearman_low, found.spearman_high], [min(possible), max(possible)], rtol=1e-12)


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
def test_halves_agree_as_signal_and_noise_say_they_should(noise: float) -> None:
    rng = np.random.default_rng(4)
    per_prompt = rng.normal(size=(4000, 1)) + noise * rng.normal(size=(4000, 16))
    pearson = 1 / (1 + noise**2 / 8)  # of the means of two halves of eight prompts
    spearman = 6 / math.pi * math.asin(pearson / 2)  # of a bivariate normal distribution
    found = split_halves(per_prompt, groups=[str(place) for place in range(16)], n_splits=30)
    assert abs(found.spearman - spearman) < 0.03


def test_paraphrases_of_a_query_in_both_halves_would_look_more_stable_than_queries_are() -> None:
    rng = np.random.default_rng(5)
    per_prompt = np.repeat(rng.normal(size=(400, 6)), 2, axis=1)  # nothing in common between queries
    together = split_halves(per_prompt, groups=QUERIES)
    apart = split_halves(per_prompt, groups=[str(place) for place in range(12)])
    assert abs(together.spearman) < 0.1
    assert apart.spearman > together.spearman + 0.2


def test_splits_depend_on_the_seed_alone_and_leave_the_effects_as_they_are() -> None:
    per_prompt = EFFECTS.copy()
    per_prompt.flags.writeable = False
    first, again, other = (split_halves(per_prompt, groups=QUERIES, n_splits=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.spearman != other.spearman


def test_labels_are_compared_in_all_pairs() -> None:
    labels = ["a", "b", "c", "d"] * 3
    means = [EFFECTS[:, place::4].mean(axis=1) for place in range(4)]
    pairs = list(combinations(means, 2))
    expected = [spearmanr(one, other).statistic for one, other in pairs]
    found = across(EFFECTS, labels)
    assert found.n == 6
    np.testing.assert_allclose(figures(found), [np.mean(expected), *np.quantile(expected, [0.025, 0.975])], rtol=1e-12)
    assert found.jaccard == pytest.approx(
        {k: np.mean([jaccard(one, other, k) for one, other in pairs]) for k in (10, 20, 50)}
    )


def test_names_of_labels_and_order_of_prompts_change_nothing() -> None:
    labels = np.array(["a", "b", "c"] * 4)
    order = np.random.default_rng(6).permutation(12)
    found, shuffled = across(EFFECTS, labels.tolist()), across(EFFECTS[:, order], labels[order].tolist())
    np.testing.assert_allclose(figures(shuffled), figures(found), rtol=1e-12)
    assert shuffled.jaccard == pytest.approx(found.jaccard)


def test_two_measurements_are_one_comparison_without_a_range() -> None:
    one, other = EFFECTS[:, 0], EFFECTS[:, 1]
    found = between(one, other)
    assert found.n == 1
    np.testing.assert_allclose(figures(found), spearmanr(one, other).statistic, rtol=1e-12)
    assert figures(between(other, one)) == figures(found)


def test_only_the_order_of_the_components_counts() -> None:
    one = EFFECTS[:, 0]
    same, reversed_order = between(one, np.exp(one)), between(one, -one)
    np.testing.assert_allclose(figures(same), 1, rtol=1e-12)
    assert set(same.jaccard.values()) == {1.0}
    np.testing.assert_allclose(figures(reversed_order), -1, rtol=1e-12)
    assert reversed_order.jaccard == {10: 0.0, 20: 0.0, 50: 40 / 60}  # the highest, not the largest by size


@pytest.mark.parametrize(("n", "expected"), [(10, set()), (11, {10}), (50, {10, 20}), (51, {10, 20, 50})])
def test_sets_of_the_highest_are_compared_where_they_are_not_all(n: int, expected: set[int]) -> None:
    assert set(between(np.arange(float(n)), np.arange(float(n))).jaccard) == expected


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_components_have_no_correlation(n: int) -> None:
    assert np.isnan(figures(between(np.arange(float(n)), np.arange(float(n))))).all()


def test_a_constant_side_has_no_correlation_and_spoils_no_other_comparison() -> None:
    one = EFFECTS[:, 0]
    assert np.isnan(figures(between(one, np.full(60, 0.1)))).all()
    per_prompt = np.stack([one, one, np.full(60, 0.1)], axis=1)
    found = across(per_prompt, ["a", "b", "c"])
    np.testing.assert_allclose(figures(found), 1, rtol=1e-12)
    assert found.n == 3


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 query cannot be halved: measure more queries"):
        split_halves(EFFECTS, groups=["a"] * 12)
    with pytest.raises(ValueError, match="1 label, nothing to compare: measure prompts of two labels at least"):
        across(EFFECTS, ["a"] * 12)
    with pytest.raises(ValueError, match="0 splits, nothing to compare: split at least once"):
        split_halves(EFFECTS, groups=QUERIES, n_splits=0)
    with pytest.raises(ValueError, match=r"effects of shape \(60, 12\) for 11 prompts"):
        split_halves(EFFECTS, groups=QUERIES[1:])
    with pytest.raises(ValueError, match=r"effects of shape \(60, 12\) for 11 prompts"):
        across(EFFECTS, QUERIES[1:])
    with pytest.raises(ValueError, match=r"shape \(3,\) for exact values of shape \(4,\)"):
        between(np.arange(3.0), np.arange(4.0))


def test_areas_of_curves_that_are_known() -> None:
    shares = np.linspace(0, 1, 11)
    np.testing.assert_allclose(curve(areas(shares, shares)), [1 / 2, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(curve(areas(shares, 0 * shares)), [0, 1], rtol=1e-12)
    np.testing.assert_allclose(curve(areas(shares, 0 * shares + 1)), [1, 0], atol=1e-12)
    np.testing.assert_allclose(curve(areas(shares, 0 * shares + 1.5)), [1.5, 0.5], rtol=1e-12)
    np.testing.assert_allclose(curve(areas(shares, -shares)), [-1 / 2, 3 / 2], rtol=1e-12)
    np.testing.assert_allclose(curve(areas(np.array([1e-9, 1.0]), np.ones(2))), [1, 0], atol=1e-8)


def test_a_line_that_crosses_one_is_off_on_both_sides_of_it() -> None:
    for points in (2, 3, 8, 101):  # 3: a point where it crosses
        shares = np.linspace(0, 1, points)
        np.testing.assert_allclose(curve(areas(shares, 2 * shares)), [1, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(areas(np.array([0.0, 1.0]), np.array([0.5, 3.0])).cmd, (0.25 + 4) / 5, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_areas_are_those_of_the_curve_drawn_finely(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, recoveries = np.append(rng.uniform(size=9), 1.0), rng.normal(1, 1, size=10)
    found = areas(shares, recoveries)
    order = np.argsort(shares)
    middles = (np.arange(400_000) + 0.5) / 400_000
    fine = np.interp(middles, np.append(0, shares[order]), np.append(0, recoveries[order]))
    np.testing.assert_allclose(curve(found), [fine.mean(), np.abs(1 - fine).mean()], atol=1e-5)
    assert found.cmd >= abs(1 - found.cpr) - 1e-12
    np.testing.assert_allclose(curve(areas(shares[order], recoveries[order])), curve(found), rtol=1e-12)


def test_a_point_on_the_line_changes_nothing() -> None:
    shares, recoveries = np.array([0.2, 1.0]), np.array([1.6, 0.4])
    found = curve(areas(shares, recoveries))
    for share in (0.0, 0.1, 0.5, 0.6, 0.9):
        on_it = np.interp(share, [0, 0.2, 1], [0, 1.6, 0.4])
        np.testing.assert_allclose(curve(areas(np.append(shares, share), np.append(recoveries, on_it))), found)


def test_a_curve_that_never_passes_one_has_areas_that_add_up_to_one() -> None:
    rng = np.random.default_rng(7)
    found = areas(np.append(rng.uniform(size=9), 1.0), rng.uniform(-1, 1, size=10))
    np.testing.assert_allclose(found.cpr + found.cmd, 1, rtol=1e-12)


def test_a_curve_begins_at_zero_unless_it_says_otherwise() -> None:
    np.testing.assert_allclose(curve(areas(np.array([1.0]), np.array([1.0]))), [1 / 2, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(curve(areas(np.array([0.0, 1.0]), np.array([0.5, 1.0]))), [3 / 4, 1 / 4], rtol=1e-12)


def test_the_points_of_the_caller_are_left_as_they_are() -> None:
    shares, recoveries = np.array([1.0, 0.5]), np.array([1.0, 0.8])
    shares.flags.writeable = recoveries.flags.writeable = False
    np.testing.assert_allclose(curve(areas(shares, recoveries)), [0.65, 0.35], rtol=1e-12)


def test_points_that_make_no_curve_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 shares up to 0\.5: needs one with all components, 1"):
        areas(np.array([0.1, 0.5]), np.array([0.1, 0.5]))
    with pytest.raises(ValueError, match="0 shares up to 0: needs one with all components, 1"):
        areas(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="2 shares for 1 recoveries: give one of each to a point"):
        areas(np.array([0.5, 1.0]), np.array([1.0]))
    for broken in (100.0, -0.1, float("nan")):  # 100: percent
        with pytest.raises(ValueError, match=f"a share of {broken:g}: needs parts of all components"):
            areas(np.array([1.0, broken]), np.array([0.1, 1.0]))
