"""Scores become coefficients by rank within units, between task arithmetic and one owner for each component."""

from __future__ import annotations

import math
import random

import pytest

from weightpatch.component import Component
from weightpatch.errors import MergeError
from weightpatch.merging.policies import Policy, normalized_ranks, only, overlap, weigh

HEADS = [Component.parse(f"L{layer}.H{head}") for layer in range(3) for head in range(4)]
MLPS = [Component.parse(f"L{layer}.mlp") for layer in range(3)]
EXPERTS = ("instruct", "math", "code")


@pytest.fixture
def scores() -> dict[str, dict[Component, float]]:
    draw = random.Random(0)
    return {expert: {one: draw.gauss(0, 1) for one in (*HEADS, *MLPS)} for expert in EXPERTS}


def test_ranks_run_from_0_to_1_within_a_unit_and_ties_share_theirs() -> None:
    found = normalized_ranks({HEADS[0]: 3.0, HEADS[1]: -1.0, HEADS[2]: 3.0, MLPS[0]: 100.0})
    assert found == {HEADS[0]: 0.75, HEADS[1]: 0.0, HEADS[2]: 0.75, MLPS[0]: 0.5}


def test_only_the_order_of_scores_within_an_expert_counts(scores: dict[str, dict[Component, float]]) -> None:
    stretched = scores | {"math": {one: 7 + 3 * score**3 for one, score in scores["math"].items()}}
    policies: tuple[Policy, ...] = ("soft", "top")
    for policy in policies:
        assert weigh(scores, policy) == weigh(stretched, policy)


def test_where_two_experts_rank_a_component_alike_the_higher_score_decides() -> None:
    scores = {"a": {HEADS[0]: 0.2, HEADS[1]: 0.1}, "b": {HEADS[0]: 0.3, HEADS[1]: 0.05}}
    found = weigh(scores, "owner")
    assert found == {"a": {HEADS[0]: 0.0, HEADS[1]: 1.0}, "b": {HEADS[0]: 1.0, HEADS[1]: 0.0}}


def test_soft_coefficients_lie_between_task_arithmetic_and_one_owner(scores: dict[str, dict[Component, float]]) -> None:
    hot, cold = weigh(scores, "soft", temperature=1e9), weigh(scores, "soft", temperature=1e-6)
    owner = weigh(scores, "owner")
    ranks = {expert: normalized_ranks(own) for expert, own in scores.items()}
    for one in (*HEADS, *MLPS):
        assert all(hot[expert][one] == pytest.approx(1) for expert in EXPERTS)
        assert sum(owner[expert][one] for expert in EXPERTS) == 1
        best = max(ranks[expert][one] for expert in EXPERTS)
        for expert in EXPERTS:
            assert cold[expert][one] == pytest.approx(float(ranks[expert][one] == best))
            if owner[expert][one]:
                assert ranks[expert][one] == best
    warm = weigh(scores, "soft", temperature=0.5)
    assert warm["code"][HEADS[3]] == pytest.approx(
        math.exp((ranks["code"][HEADS[3]] - max(ranks[expert][HEADS[3]] for expert in EXPERTS)) / 0.5)
    )


def test_each_expert_brings_its_top_share_of_every_unit(scores: dict[str, dict[Component, float]]) -> None:
    found = weigh(scores, "top", share=0.25)
    for expert, own in scores.items():
        best = sorted(HEADS, key=lambda one: -own[one])[:3]
        assert {one for one in HEADS if found[expert][one]} == set(best)
        assert [one for one in MLPS if found[expert][one]] == [max(MLPS, key=lambda one: own[one])]


def test_what_one_expert_did_not_score_is_decided_among_the_others(scores: dict[str, dict[Component, float]]) -> None:
    del scores["math"][MLPS[1]]
    found = weigh(scores, "owner")
    assert MLPS[1] not in found["math"]
    assert found["instruct"][MLPS[1]] + found["code"][MLPS[1]] == 1


def test_overlap_counts_what_both_bring() -> None:
    found = only({"a": {HEADS[0], HEADS[1]}, "b": {HEADS[1], HEADS[2]}, "c": set()}, dict.fromkeys("abc", HEADS))
    shares = overlap(found)
    assert shares["a", "b"] == pytest.approx(1 / 3)
    assert shares["a", "a"] == 1
    assert shares["a", "c"] == 0
    assert math.isnan(shares["c", "c"])


def test_settings_that_mean_nothing_are_refused(scores: dict[str, dict[Component, float]]) -> None:
    for settings, message in (
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy": "soft", "temperature": 0.0}, "temperature 0.0 gives no coefficients"),
        ({"policy": "top", "share": 1.5}, "share 1.5 is no part"),
    ):
        with pytest.raises(MergeError, match=message):
            weigh(scores, **settings)  # type: ignore[arg-type]
    scores["code"][HEADS[2]] = math.nan
    with pytest.raises(MergeError, match=r"1 scores are no numbers, the first that of L0\.H2"):
        weigh(scores, "soft")
