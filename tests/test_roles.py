from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest

from weightpatch.roles import (
    LEVEL_OF_ROLES,
    ROLES,
    SOURCE_SHARE,
    Role,
    adjusted,
    assign_roles,
    depth_by_role,
    executors_among,
    p_above,
)
from weightpatch.statistics import Floats, Recovery

NULL = np.random.default_rng(0).normal(scale=0.01, size=400)


def some_recovery(ratio: Sequence[float], *, half: float = 0.01) -> Recovery:
    values = np.array(ratio, dtype=float)
    return Recovery(ratio=values, low=values - half, high=values + half, mean_of_ratios=values)


def roles_of(weights: Sequence[float], activation: Sequence[float], **given: float) -> tuple[Role, ...]:
    return assign_roles(
        some_recovery(weights),
        some_recovery(activation),
        units=["mlp"] * len(weights),
        weights_null={"mlp": NULL},
        activation_null={"mlp": NULL},
        **given,
    ).roles


def q_by_definition(p: Floats) -> list[float]:
    """The smallest level at which Benjamini and Hochberg's step-up rule rejects each hypothesis."""
    levels = sorted({min(1.0, value * len(p) / rank) for value in p for rank in range(1, len(p) + 1)} | {1.0})
    found = []
    for value in p:
        for level in levels:
            passed = [k for k in range(1, len(p) + 1) if np.sort(p)[k - 1] <= level * k / len(p) * (1 + 1e-12)]
            if passed and value <= np.sort(p)[max(passed) - 1]:
                found.append(level)
                break
        else:
            found.append(1.0)
    return found


def test_a_role_needs_an_effect_beyond_that_on_queries_without_the_instruction() -> None:
    # A source and a router, each three times: beyond, within, and not measured.
    weights, acts = some_recovery([0.5] * 3 + [0.1] * 3), some_recovery([0.5] * 6)
    nulls = {"mlp": NULL}
    given = {"units": ["mlp"] * 6, "weights_null": nulls, "activation_null": nulls}
    judged = assign_roles(
        weights, acts, **given, excess=(np.array([0.1, -0.1, np.nan] * 2), np.array([0.1, 0, np.nan] * 2))
    )
    assert judged.roles == ("source", "none", "none", "router", "none", "none")
    assert assign_roles(weights, acts, **given).roles == ("source",) * 3 + ("router",) * 3


@pytest.mark.parametrize("seed", range(5))
def test_within_the_range_of_the_null_p_is_the_share_that_reaches_the_value_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    null = rng.integers(8, size=30).astype(float)
    low = rng.uniform(null.min() - 3, null.max(), size=50).round(1)
    counted = [(1 + sum(value >= one for value in null)) / 31 for one in low]
    np.testing.assert_allclose(p_above(low, null), counted, rtol=1e-12)
    assert p_above(np.array([null.min() - 1]), null)[0] == 1


def test_beyond_the_null_p_is_never_larger_than_by_ranks_and_falls_with_the_square_of_the_distance() -> None:
    null = np.array([-1.0, 1.0] * 20)
    variance = 40 / 39
    found = p_above(np.array([1.1, 4.0, 10.0, 1000.0]), null)
    np.testing.assert_allclose(found[:2], 1 / 41, rtol=1e-12)  # ranks say more than the distance
    np.testing.assert_allclose(found[2:], [1 / (1 + z * z / variance) for z in (10, 1000)], rtol=1e-12)


@pytest.mark.parametrize("null", [np.array([-1.0, 1.0] * 14), np.zeros(500)], ids=["few values", "no spread"])
def test_beyond_a_null_that_tells_no_spread_p_is_by_ranks_alone(null: Floats) -> None:
    np.testing.assert_allclose(p_above(np.array([10.0, 1000.0]), null), 1 / (1 + len(null)), rtol=1e-12)


def test_a_value_that_the_null_reaches_is_judged_by_ranks_alone_however_rare_it_is() -> None:
    null = np.append(np.zeros(99), 10.0)
    np.testing.assert_allclose(p_above(np.array([9.9, 10.0]), null), 2 / 101, rtol=1e-12)


def test_a_higher_value_never_has_a_higher_p() -> None:
    for seed in range(20):
        null = np.random.default_rng(seed).standard_t(2, size=25)
        p = p_above(np.linspace(null.min() - 1, 10 * null.max() + 1, 500), null)
        assert (np.diff(p) <= 0).all()
        assert 0 < p.min() <= p.max() == 1


def test_p_depends_neither_on_the_unit_of_the_values_nor_on_the_order_of_the_null() -> None:
    low = np.linspace(-0.05, 0.2, 60)
    expected = p_above(low, NULL)
    np.testing.assert_array_equal(p_above(2.0**-60 * low, 2.0**-60 * NULL), expected)
    np.testing.assert_allclose(p_above(low, NULL[::-1].copy()), expected, rtol=1e-9)


def test_an_unknown_interval_is_never_above_the_null() -> None:
    np.testing.assert_array_equal(p_above(np.array([np.nan, np.nan]), NULL), [1, 1])
    assert p_above(np.zeros(0), NULL).shape == (0,)


@pytest.mark.parametrize("size", [0, 1])
def test_a_null_too_small_to_have_a_spread_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"a null of {size} values: draw more of it"):
        p_above(np.ones(3), np.zeros(size))


def test_the_arrays_of_the_caller_are_left_as_they_are() -> None:
    low, null = np.array([3.0, -1.0, 2.0]), np.array([2.0, -2.0, 1.0, 0.0])
    low.flags.writeable = null.flags.writeable = False
    p = p_above(low, null)
    p.flags.writeable = False
    assert (adjusted(p) >= p).all()
    np.testing.assert_array_equal(low, [3, -1, 2])
    np.testing.assert_array_equal(null, [2, -2, 1, 0])


@pytest.mark.parametrize("size", [19, 199])
def test_values_like_the_null_have_a_p_below_the_level_about_at_the_level(size: int) -> None:
    rng = np.random.default_rng(size)
    for draw in (rng.standard_normal, rng.standard_exponential):
        p = np.concatenate([p_above(draw(5), draw(size)) for _ in range(2000)])
        for level in (0.05, 0.1, 0.5):
            assert abs((p <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 2000)


@pytest.mark.parametrize("size", [30, 200, 4000])
def test_among_components_like_the_null_any_is_named_in_at_most_the_level_of_the_cases(size: int) -> None:
    rng = np.random.default_rng(size)
    n_cases = 600
    named = [
        (adjusted(p_above(rng.standard_t(4, size=60), rng.standard_t(4, size=size))) <= LEVEL_OF_ROLES).any()
        for _ in range(n_cases)
    ]
    assert np.mean(named) <= LEVEL_OF_ROLES + 3 * math.sqrt(LEVEL_OF_ROLES * (1 - LEVEL_OF_ROLES) / n_cases)


def test_of_the_named_at_most_the_level_is_false_on_average_and_nothing_large_is_missed() -> None:
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(400):
        low = rng.normal(size=60)
        low[:20] += 12
        is_named = adjusted(p_above(low, rng.normal(size=2000))) <= 0.2
        assert is_named[:20].all()
        shares.append(is_named[20:].sum() / is_named.sum())
    assert 0.08 < np.mean(shares) < 0.2 * 40 / 60 + 3 * np.std(shares) / math.sqrt(400)  # not empty, not above


@pytest.mark.parametrize("seed", range(6))
def test_q_is_the_smallest_level_at_which_the_step_up_rule_names_a_component(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=8) ** 3 if seed % 2 else rng.integers(1, 5, size=8) / 20
    np.testing.assert_allclose(adjusted(p), q_by_definition(p), rtol=1e-9)


def test_q_is_never_below_p_and_the_same_for_a_single_component() -> None:
    p = np.random.default_rng(1).uniform(size=300)
    assert (adjusted(p) >= p).all()
    assert adjusted(p).max() <= 1
    np.testing.assert_array_equal(adjusted(p[:1]), p[:1])
    assert adjusted(np.zeros(0)).shape == (0,)


def test_a_source_acts_by_its_own_weights_and_a_router_by_what_it_was_passed() -> None:
    weights = [0.80, 0.40, 0.39, 0.00, 0.80, 0.00, -0.80, 0.30]
    activation = [0.80, 0.80, 0.80, 0.80, 0.00, 0.00, 0.80, -0.80]
    expected = ("source", "source", "router", "router", "source", "none", "router", "none")
    assert roles_of(weights, activation) == expected


def test_the_share_moves_the_line_between_sources_and_routers_alone() -> None:
    weights, activation = [0.1, 0.3, 0.5, 0.7, 0.0], [0.8, 0.8, 0.8, 0.8, 0.0]
    for share, n_sources in ((0.0, 4), (0.2, 3), (0.5, 2), (0.8, 1), (1.0, 0)):
        routers = 4 - n_sources
        expected = ("router",) * routers + ("source",) * n_sources + ("none",)
        assert roles_of(weights, activation, share=share) == expected


def test_at_level_zero_nothing_has_a_role_and_a_higher_level_takes_none_away() -> None:
    rng = np.random.default_rng(2)
    weights, activation = rng.normal(scale=0.05, size=(2, 80)).tolist()
    previous = roles_of(weights, activation, level=0.0)
    assert set(previous) == {"none"}
    for level in (0.01, 0.05, 0.3, 1.0):
        found = roles_of(weights, activation, level=level)
        assert all(now == before for now, before in zip(found, previous, strict=True) if before != "none")
        previous = found
    assert {"source", "router"} <= set(previous)


@pytest.mark.parametrize("seed", range(4))
def test_roles_follow_from_the_stated_q_values_and_recoveries(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = rng.choice(["head", "neuron"], size=60).tolist()
    weights, activation = (some_recovery(rng.normal(scale=0.05, size=60).tolist()) for _ in range(2))
    nulls = {"head": rng.normal(scale=0.03, size=500), "neuron": rng.normal(scale=0.003, size=500)}
    found = assign_roles(weights, activation, units=units, weights_null=nulls, activation_null=nulls)
    for side, p, q in (
        (weights, found.p_weights, found.q_weights),
        (activation, found.p_activation, found.q_activation),
    ):
        scale = {unit: (null.mean(), null.std(ddof=1)) for unit, null in nulls.items()}
        together = np.concatenate([(null - scale[unit][0]) / scale[unit][1] for unit, null in nulls.items()])
        distances = [(low - scale[unit][0]) / scale[unit][1] for low, unit in zip(side.low, units, strict=True)]
        own = [p_above(np.array([distance]), together)[0] for distance in distances]
        np.testing.assert_allclose(p, own, rtol=1e-12)
        np.testing.assert_allclose(q, adjusted(np.array(own)), rtol=1e-12)  # over both units together
    for place, role in enumerate(found.roles):
        w, a = weights.ratio[place], activation.ratio[place]
        source = found.q_weights[place] <= LEVEL_OF_ROLES and w >= SOURCE_SHARE * abs(a)
        router = found.q_activation[place] <= LEVEL_OF_ROLES and w < SOURCE_SHARE * a
        assert not (source and router)
        assert role == ("source" if source else "router" if router else "none")
    assert set(found.roles) == {"source", "router", "none"}


def test_roles_go_with_the_components_whatever_their_order() -> None:
    rng = np.random.default_rng(4)
    weights, activation = rng.normal(scale=0.05, size=(2, 50))
    order = rng.permutation(50)
    found = roles_of(weights.tolist(), activation.tolist())
    assert roles_of(weights[order].tolist(), activation[order].tolist()) == tuple(found[place] for place in order)


def test_each_component_is_judged_by_the_null_of_its_own_unit() -> None:
    small, large = NULL, 100 * NULL
    given = {"weights": some_recovery([0.3, 0.3]), "activation": some_recovery([0.3, 0.3])}
    for first, second, expected in ((small, large, ("source", "none")), (large, small, ("none", "source"))):
        nulls = {"head": first, "mlp": second}
        found = assign_roles(**given, units=["head", "mlp"], weights_null=nulls, activation_null=nulls)
        assert found.roles == expected


def test_the_nulls_of_all_units_together_tell_rarer_events_than_those_of_one_unit() -> None:
    rng = np.random.default_rng(8)
    nulls = {"head": rng.normal(scale=0.001, size=3000), "mlp": rng.normal(scale=0.01, size=40)}
    low = some_recovery([0.06, *[0.0] * 100])
    units = ["mlp", *["head"] * 100]
    found = assign_roles(low, low, units=units, weights_null=nulls, activation_null=nulls)
    alone = p_above(low.low[:1], nulls["mlp"])[0]
    assert found.p_weights[0] < alone / 10
    assert found.roles == ("source", *["none"] * 100)


def test_an_activation_that_works_against_the_behaviour_is_no_router_even_above_a_null_that_does_so_more() -> None:
    found = assign_roles(
        some_recovery([0.0]),
        some_recovery([-0.5]),
        units=["mlp"],
        weights_null={"mlp": NULL},
        activation_null={"mlp": NULL - 1},
    )
    assert found.q_activation[0] <= LEVEL_OF_ROLES
    assert found.roles == ("none",)


def test_a_component_without_an_output_can_be_a_source_and_never_a_router() -> None:
    assert roles_of([0.5, 0.0], [float("nan"), float("nan")]) == ("source", "none")


def test_no_components_have_no_roles() -> None:
    assert roles_of([], []) == ()


def test_a_unit_without_a_null_is_an_error_only_where_something_was_measured() -> None:
    both = some_recovery([0.5, 0.5])
    with pytest.raises(ValueError, match="no null for head; the null has mlp: draw it for head too"):
        assign_roles(
            both, both, units=["mlp", "head"], weights_null={"mlp": NULL}, activation_null={"mlp": NULL, "head": NULL}
        )
    without = some_recovery([0.5, float("nan")])
    nulls = {"mlp": NULL, "rest": NULL}
    found = assign_roles(both, without, units=["mlp", "rest"], weights_null=nulls, activation_null={"mlp": NULL})
    assert found.p_activation[1] == 1


def test_sides_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 recoveries by weights and 2 by activation for 3 units: give one of each"):
        assign_roles(
            some_recovery([0.1] * 3),
            some_recovery([0.1] * 2),
            units=["mlp"] * 3,
            weights_null={"mlp": NULL},
            activation_null={"mlp": NULL},
        )


def test_an_executor_loses_more_than_the_null_ever_does() -> None:
    low = np.array([0.5, 0.001, np.nan, -0.5, 0.4])
    roles, p, q = executors_among(low, NULL)
    assert roles == ("executor", "none", "none", "none", "executor")
    np.testing.assert_array_equal(p, p_above(low, NULL))
    np.testing.assert_array_equal(q, adjusted(p))
    assert executors_among(low, NULL, level=0.0)[0] == ("none",) * 5


def test_executors_are_those_with_a_q_of_at_most_the_level() -> None:
    low = np.random.default_rng(9).normal(scale=0.02, size=100)
    q = executors_among(low, NULL)[2]
    for level in np.unique(q).tolist():
        roles = executors_among(low, NULL, level=level)[0]
        assert roles == tuple("executor" if value <= level else "none" for value in q.tolist())
    assert len(np.unique(q)) > 5


def test_the_permutation_p_is_that_of_all_orders_of_the_labels() -> None:
    labels: list[Role] = ["source", "router", "source", "router", "router", "source"]
    for seed in range(10):
        depths = np.random.default_rng(seed).integers(5, size=6) / 5  # with ties
        found = depth_by_role(labels, depths)

        def difference(order: Sequence[int], depths: Floats = depths) -> float:
            at = {
                role: [depths[place] for place, one in zip(order, labels, strict=True) if one == role] for role in ROLES
            }
            return float(np.mean(at["router"]) - np.mean(at["source"]))

        observed = difference(range(6))
        all_orders = [abs(difference(order)) >= abs(observed) - 1e-9 for order in permutations(range(6))]
        np.testing.assert_allclose([found.difference, found.p], [observed, np.mean(all_orders)], atol=1e-12)
        assert found.n_permutations == 20


def test_three_routers_above_three_sources_are_as_extreme_as_one_in_ten() -> None:
    found = depth_by_role(["source"] * 3 + ["router"] * 3, np.arange(6) / 6)
    assert found.mean == pytest.approx({"source": 1 / 6, "router": 4 / 6})
    assert found.n == {"source": 3, "router": 3}
    np.testing.assert_allclose([found.difference, found.p], [0.5, 2 / 20], rtol=1e-12)


def test_rounding_of_depths_does_not_decide_what_is_as_extreme() -> None:
    roles: list[Role] = ["source", "router"] * 5
    for seed in range(10):
        layers = np.random.default_rng(seed).integers(30, size=10)
        assert depth_by_role(roles, layers / 30).p == depth_by_role(roles, layers.astype(float)).p


def test_roles_at_one_depth_are_no_further_apart_than_any_permutation() -> None:
    for n in (4, 40):
        found = depth_by_role(["source", "router"] * n, np.full(2 * n, 0.3))
        assert found.p == 1
        assert abs(found.difference) < 1e-12


def test_swapping_the_two_roles_turns_the_difference_and_leaves_p() -> None:
    depths = np.random.default_rng(5).uniform(size=11)
    roles: list[Role] = ["source"] * 4 + ["router"] * 7
    swapped: list[Role] = ["router"] * 4 + ["source"] * 7
    one, other = depth_by_role(roles, depths), depth_by_role(swapped, depths)
    np.testing.assert_allclose([one.difference, one.p], [-other.difference, other.p], rtol=1e-12)


def test_other_roles_have_a_mean_depth_and_no_say_in_the_test() -> None:
    depths = np.array([0.0, 0.1, 0.5, 0.6, 0.9, 0.8, 0.2])
    roles: list[Role] = ["source", "source", "router", "router", "executor", "none", "none"]
    found, alone = depth_by_role(roles, depths), depth_by_role(roles[:4], depths[:4])
    assert found.mean == pytest.approx({"source": 0.05, "router": 0.55, "executor": 0.9, "none": 0.5})
    assert found.n == {"source": 2, "router": 2, "executor": 1, "none": 2}
    assert (found.difference, found.p, found.n_permutations) == (alone.difference, alone.p, alone.n_permutations)


@pytest.mark.parametrize("roles", [[], ["source", "source"], ["router"], ["none", "executor", "source"]])
def test_without_both_roles_there_is_nothing_to_test(roles: list[Role]) -> None:
    found = depth_by_role(roles, np.linspace(0, 0.5, len(roles)))
    assert np.isnan([found.difference, found.p]).all()
    assert found.n_permutations == 0
    assert set(found.mean) == set(found.n) == set(roles)


def test_drawn_permutations_come_close_to_all_of_them_and_never_to_zero() -> None:
    roles: list[Role] = ["source"] * 6 + ["router"] * 6
    depths = np.random.default_rng(6).uniform(size=12) + np.repeat([0, 0.25], 6)
    exact = depth_by_role(roles, depths)
    assert exact.n_permutations == 924
    drawn = depth_by_role(roles, depths, n_permutations=923)
    assert drawn.n_permutations == 923
    assert abs(drawn.p - exact.p) < 4 * math.sqrt(exact.p * (1 - exact.p) / 923)
    apart = depth_by_role((["source"] * 20) + ["router"] * 20, np.arange(40) / 40, n_permutations=99)
    assert apart.p == 1 / 100


def test_drawn_permutations_depend_on_the_seed_alone() -> None:
    roles: list[Role] = ["source", "router"] * 15
    depths = np.random.default_rng(7).uniform(size=30)
    first, again, other = (depth_by_role(roles, depths, n_permutations=500, seed=seed).p for seed in (0, 0, 1))
    assert first == again != other


def test_labels_dealt_out_at_random_seem_to_differ_in_depth_at_most_at_the_level() -> None:
    rng = np.random.default_rng(8)
    roles: list[Role] = ["source"] * 5 + ["router"] * 4
    p = np.array([depth_by_role(roles, rng.uniform(size=9)).p for _ in range(1000)])
    for level in (0.05, 0.2):
        assert abs((p <= level).mean() - math.floor(126 * level) / 126) < 4 * math.sqrt(level * (1 - level) / 1000)


def test_roles_and_depths_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 roles for depths of shape \(3,\): give each component one of both"):
        depth_by_role(["source", "router"], np.zeros(3))
