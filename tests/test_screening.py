"""Screening: what is patched is exact, what is chosen is what was promised, and the bound on the rest holds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import build_model
from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.component import Component
from weightpatch.difference import weight_differences
from weightpatch.effects import ComponentEffect, Effects
from weightpatch.errors import ComponentError, NoGapError
from weightpatch.estimation import Estimation
from weightpatch.localization import localize, sweep
from weightpatch.screening import Choice, Screening, choose, compare, screen

LAYER = 2
N = {"kvs": 4, "heads": 8, "neurons": 68}
"""Components of the pair below the anchor."""


def close_pair(shape: str, *, scale: float) -> ModelPair:
    """A random base, and the same with a little noise: as a fine-tune would differ from it."""
    base, specialized = (build_model(shape, seed=1, dtype=torch.float64) for _ in range(2))
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in specialized.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return ModelPair(base=base, specialized=specialized)


def anchor_on(pair: ModelPair, prompts: ContrastPrompts, *, layer: int = LAYER) -> Anchor:
    """An anchor along the difference of the two models at the last token, where they have a gap."""
    moved = torch.zeros(pair.architecture.n_features, dtype=torch.float64)
    for ids in prompts.tokenize(None).with_instruction:
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
                for model in (pair.base, pair.specialized)
            )
        moved += theirs - ours
    return Anchor(layer=layer, direction=moved.float())


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return close_pair("qwen3-moe", scale=0.03)


@pytest.fixture(scope="module")
def anchor(pair: ModelPair, token_prompts: ContrastPrompts) -> Anchor:
    return anchor_on(pair, token_prompts)


@pytest.fixture(scope="module")
def estimates(pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor) -> Effects:
    return localize(pair, token_prompts, anchor, units="neurons,heads,kvs", method="first-order")


@pytest.fixture(scope="module")
def exact(pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor) -> Effects:
    """The truth about everything, by the engine that screening does not use."""
    return localize(pair, token_prompts, anchor, units="neurons,heads,kvs", engine="swap")


@pytest.fixture(scope="module")
def screening(pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor) -> Screening:
    return screen(pair, token_prompts, anchor, budget=30)


def of_unit(effects: Effects, unit: str) -> Effects:
    places = [place for place, one in enumerate(effects.components) if one.unit == unit]
    spans = {name: values[places] for name, values in effects.per_span.items()}
    components = tuple(effects.components[place] for place in places)
    return replace(effects, components=components, per_prompt=effects.per_prompt[places], per_span=spans)


def shuffled(effects: Effects, *, seed: int = 0) -> Effects:
    order = torch.randperm(len(effects.components), generator=torch.Generator().manual_seed(seed))
    return replace(effects, per_prompt=effects.per_prompt[order])


def by_component(effects: Effects) -> dict[Component, torch.Tensor]:
    return dict(zip(effects.components, effects.per_prompt, strict=True))


def compared(
    estimates: Effects,
    choices: tuple[Choice, ...],
    truth: dict[Component, torch.Tensor],
    *,
    moved: float = 0.0,
    threshold: float | None = None,
    confidence: float = 0.95,
) -> Screening:
    return compare(estimates, choices, truth, engine="swap", moved=moved, threshold=threshold, confidence=confidence)


def sizes(choices: tuple[Choice, ...]) -> dict[str, tuple[int, int]]:
    return {choice.unit: (len(choice.top), len(choice.random)) for choice in choices}


def test_what_is_patched_has_the_effects_of_an_exact_localization(screening: Screening, exact: Effects) -> None:
    truth = by_component(exact)
    chosen = {one for screened in screening.units.values() for one in (*screened.choice.top, *screened.choice.random)}
    assert set(screening.exact.components) == chosen
    expected = torch.stack([truth[one] for one in screening.exact.components])
    torch.testing.assert_close(screening.exact.per_prompt, expected, rtol=0, atol=1e-12)
    assert (screening.exact.method, screening.exact.engine) == ("exact", "suffix")


def test_what_is_estimated_is_what_localize_estimates(screening: Screening, estimates: Effects) -> None:
    assert screening.estimates.components == estimates.components
    torch.testing.assert_close(screening.estimates.per_prompt, estimates.per_prompt, rtol=0, atol=0)
    assert (screening.estimates.method, screening.estimates.engine) == ("first-order", "outputs")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("budget", [6, 7, 31, 90, 1000])
def test_the_budget_is_kept_and_every_unit_has_a_top_and_a_sample(
    estimates: Effects, budget: int, share: float
) -> None:
    choices = choose(estimates, budget=budget, random_share=share)
    assert sum(len(choice.top) + len(choice.random) for choice in choices) <= budget
    assert {choice.unit: len(choice.members) for choice in choices} == N
    for choice in choices:
        assert choice.top
        assert choice.random
        assert len({*choice.top}) == len(choice.top)
        assert len({*choice.random}) == len(choice.random)
        assert {*choice.top, *choice.random} <= {*choice.members}


@pytest.mark.parametrize("share", [0.8, 0.9, 0.99])
def test_the_budget_is_kept_at_extreme_shares_too(estimates: Effects, share: float) -> None:
    for budget in range(6, 40):
        choices = choose(estimates, budget=budget, random_share=share)
        assert sum(len(choice.top) + len(choice.random) for choice in choices) <= budget


def test_the_budget_is_dealt_out_evenly_and_small_units_leave_the_rest_to_others(estimates: Effects) -> None:
    assert sizes(choose(estimates, budget=24)) == {"kvs": (4, 4), "heads": (4, 4), "neurons": (4, 4)}
    assert sizes(choose(estimates, budget=90)) == {"kvs": (4, 4), "heads": (8, 8), "neurons": (33, 33)}
    assert sizes(choose(estimates, budget=24, random_share=0.25))["neurons"] == (6, 2)
    assert sizes(choose(estimates, budget=10**6)) == {unit: (n, n) for unit, n in N.items()}


def test_as_many_exact_effects_are_reported_as_were_patched(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor
) -> None:
    told: list[ComponentEffect] = []
    found = screen(pair, token_prompts, anchor, units="neurons,heads", budget=9, on_effect=told.append)
    assert [one.component for one in told] == list(found.exact.components)
    assert len(told) <= 9


def test_the_top_are_the_largest_estimates_by_size_largest_first(estimates: Effects) -> None:
    for choice in choose(estimates, budget=30):
        own = of_unit(estimates, choice.unit)
        size = dict(zip(own.components, np.abs(own.per_prompt.numpy().mean(axis=1)), strict=True))
        assert list(choice.top) == sorted(own.components, key=lambda one: -size[one])[: len(choice.top)]
    means = {float(estimates.per_prompt[place].mean()) > 0 for place in range(len(estimates.components))}
    assert means == {True, False}, "sizes would be no harder than effects here"


def test_the_random_sample_depends_on_the_seed_and_on_nothing_else(estimates: Effects) -> None:
    random.seed(1)
    first = choose(estimates, budget=30, seed=7)
    random.seed(2)
    again = choose(shuffled(estimates), budget=30, seed=7)
    other = choose(estimates, budget=30, seed=8)
    assert [choice.random for choice in again] == [choice.random for choice in first]
    assert [choice.top for choice in again] != [choice.top for choice in first]
    assert [choice.random for choice in other] != [choice.random for choice in first]
    assert [choice.top for choice in other] == [choice.top for choice in first]


def test_every_member_is_drawn_equally_often(estimates: Effects) -> None:
    drawn = Counter(
        one for seed in range(600) for choice in choose(estimates, budget=30, seed=seed) for one in choice.random
    )
    for unit, n in N.items():
        counts = np.array([drawn[one] for one in estimates.components if one.unit == unit])
        share = min(1, 5 / n)  # 10 of the budget to a unit, of which the groups need but 8
        spread = (600 * share * (1 - share)) ** 0.5
        assert np.abs(counts - counts.mean()).max() <= 4.5 * spread + 1e-9, unit


def test_a_unit_that_is_wholly_patched_has_nothing_missed(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor
) -> None:
    found = screen(pair, token_prompts, anchor, units="neurons,heads", budget=40, threshold=0.0)
    assert len(found.units["heads"].choice.top) == N["heads"]
    assert found.units["heads"].missed_at_most == 0
    patched = {one for one in found.exact.components if one.unit == "neurons"}
    # With a threshold of 0 every neuron should not have been missed, so the bound is all the others.
    assert found.units["neurons"].missed_at_most == N["neurons"] - len(patched)


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("threshold", ["given", "from the top"])
@pytest.mark.parametrize("hopeless", [False, True])
def test_the_bound_covers_what_was_truly_missed(
    estimates: Effects, exact: Effects, hopeless: bool, threshold: str, confidence: float
) -> None:
    neurons, truth = of_unit(estimates, "neurons"), by_component(of_unit(exact, "neurons"))
    if hopeless:
        neurons = shuffled(neurons)
    gap = float(neurons.gap.mean())
    recoveries = {one: abs(float(effects.mean()) / gap) for one, effects in truth.items()}
    given = sorted(recoveries.values())[-14] if threshold == "given" else None
    covered, bounds, missed = 0, [], []
    for seed in range(200):
        choices = choose(neurons, budget=30, seed=seed)
        screened = compared(neurons, choices, truth, threshold=given, confidence=confidence).units["neurons"]
        choice = screened.choice
        unseen = {*choice.members} - {*choice.top, *choice.random}
        missed.append(sum(recoveries[one] >= screened.threshold for one in unseen))
        bounds.append(screened.missed_at_most)
        covered += missed[-1] <= bounds[-1]
    assert covered >= 200 * confidence
    assert max(bounds) < N["neurons"] - 15, "a bound that never excludes anything says nothing"
    if hopeless:
        assert np.mean(missed) > 2, "nothing was missed that a bound could have failed to cover"


def test_a_good_estimate_is_not_called_poor_and_a_hopeless_one_is_in_words(estimates: Effects, exact: Effects) -> None:
    truth = by_component(exact)
    neurons = of_unit(estimates, "neurons")
    good, hopeless = (compared(own, choose(own, budget=60), truth) for own in (neurons, shuffled(neurons)))
    assert not good.units["neurons"].is_poor
    assert "POOR" not in str(good)
    assert good.units["neurons"].on_random.spearman > 0.95
    assert hopeless.units["neurons"].is_poor
    assert "POOR: do not rank by this estimate. Patch these components exactly" in str(hopeless)
    assert [one.layer for one in hopeless.units["neurons"].poor_layers]
    assert "Off by more than 25% in: L" in str(hopeless)


def test_a_pair_that_moved_farther_than_estimates_are_known_to_be_good_is_told_so(
    screening: Screening, pair: ModelPair, estimates: Effects, exact: Effects
) -> None:
    norms = [one.relative_norm for one in weight_differences(pair, "attns,mlps")]
    (moved,) = {one.moved for one in screening.units.values()}
    assert moved == pytest.approx(float(np.median(norms)))
    choices, truth = choose(estimates, budget=30), by_component(exact)
    for unit, screened in compared(estimates, choices, truth).units.items():
        limit = screened.good_up_to
        at, above = (compared(estimates, choices, truth, moved=moved).units[unit] for moved in (limit, 1.01 * limit))
        assert not at.is_beyond
        assert "BEYOND" not in str(at)
        assert above.is_beyond
        assert f"BEYOND THE KNOWN RANGE: the weights moved by {1.01 * limit:.0%}" in str(above)
        assert above.is_poor == at.is_poor


def test_the_verdict_names_the_counts_the_threshold_and_the_bound(screening: Screening) -> None:
    lines = str(screening).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["kvs", "heads", "neurons"]
    screened = screening.units["neurons"]
    choice = screened.choice
    n_exact, n_top, n_random = len({*choice.top, *choice.random}), len(choice.top), len(choice.random)
    assert f"68 estimated, {n_exact} patched exactly (top {n_top}, random {n_random})" in lines[2]
    assert (
        f"With 95% confidence at most {screened.missed_at_most} of the others reach a recovery of "
        f"{screened.threshold:.4f} in size."
    ) in lines[2]


def test_without_a_threshold_the_tenth_of_the_top_list_is_what_should_not_be_missed(
    estimates: Effects, exact: Effects
) -> None:
    neurons, truth = of_unit(estimates, "neurons"), by_component(exact)
    gap = float(neurons.gap.mean())
    for budget, place in ((60, 10), (8, 4)):
        choices = choose(neurons, budget=budget)
        top = sorted((abs(float(truth[one].mean()) / gap) for one in choices[0].top), reverse=True)
        found = compared(neurons, choices, truth).units["neurons"].threshold
        assert found == pytest.approx(top[place - 1], rel=1e-12)


@pytest.mark.parametrize(("budget", "share"), [(5, 0.5), (0, 0.5), (-3, 0.5), (30, 0.0), (30, 1.0), (30, -0.5)])
def test_a_budget_too_small_or_a_share_that_is_none_is_refused(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor, budget: int, share: float
) -> None:
    message = rf"a budget of {budget} with a random share of {share} cannot serve 3 units: give at least 6"
    with pytest.raises(ComponentError, match=message):
        screen(pair, token_prompts, anchor, budget=budget, random_share=share)


def test_without_a_gap_nothing_is_patched(pair: ModelPair, token_prompts: ContrastPrompts) -> None:
    nowhere = Anchor(layer=LAYER, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)))
    told: list[ComponentEffect] = []
    with pytest.raises(NoGapError, match="do not differ measurably"):
        screen(pair, token_prompts, nowhere, budget=30, on_effect=told.append)
    assert told == []


def test_the_table_has_every_component_with_its_exact_effect_where_it_was_patched(
    screening: Screening, exact: Effects
) -> None:
    table = screening.table()
    columns = list(screening.estimates.table().columns)
    assert list(table.columns) == [*columns, "exact_effect", "exact_recovery", "chosen"]
    pd.testing.assert_frame_equal(table[columns], screening.estimates.table())
    assert len(table) == sum(N.values())
    truth = {str(one): float(effects.mean()) for one, effects in by_component(exact).items()}
    gap = float(exact.gap.mean())
    choices = {screened.choice.unit: screened.choice for screened in screening.units.values()}
    top = {str(one) for choice in choices.values() for one in choice.top}
    drawn = {str(one) for choice in choices.values() for one in choice.random}
    for row in table.itertuples():
        expected = {(True, True): "both", (True, False): "top", (False, True): "random", (False, False): ""}
        assert row.chosen == expected[row.component in top, row.component in drawn]
        if row.chosen:
            assert row.exact_effect == pytest.approx(truth[row.component], abs=1e-12)
            assert row.exact_recovery == pytest.approx(truth[row.component] / gap, rel=1e-9)
        else:
            assert np.isnan(row.exact_effect)
            assert np.isnan(row.exact_recovery)
    assert set(table["chosen"]) == {"both", "top", "random", ""}


def test_sets_are_screened_like_any_unit(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor, exact: Effects
) -> None:
    units = "{L0.H0,L0.H1},{L0.H2,L1.H3},{L0.KV1,L1.N3},L0.H0"
    found = screen(pair, token_prompts, anchor, units=units, budget=20)
    assert {unit: len(one.choice.members) for unit, one in found.units.items()} == {"heads": 1, "sets": 3}
    truth = localize(pair, token_prompts, anchor, units=units, engine="swap")
    torch.testing.assert_close(found.exact.per_prompt, truth.per_prompt, rtol=0, atol=1e-12)
    assert float((truth.per_prompt[0] - by_component(exact)[Component.parse("L0.H0")]).abs().max()) > 1e-9


def test_spans_add_up_to_the_recovery(estimates: Effects) -> None:
    split = estimates.by_span()
    assert list(split.columns) == ["component", "unit", "layer", "query", "instruction", "last", "recovery"]
    parts = split[["query", "instruction", "last"]]
    np.testing.assert_allclose(parts.sum(axis=1), split["recovery"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(split["recovery"], estimates.table()["recovery"], rtol=1e-12)
    assert (parts.abs().max() > 0).all()


def test_in_the_layer_below_the_anchor_neurons_act_where_the_anchor_reads(estimates: Effects) -> None:
    split = estimates.by_span()
    neurons = split[(split["unit"] == "neurons") & (split["layer"] == LAYER - 1)]
    np.testing.assert_allclose(neurons[["query", "instruction"]], 0, atol=1e-15)
    np.testing.assert_allclose(neurons["last"], neurons["recovery"], rtol=1e-6)


@pytest.mark.parametrize("case", ["exact", "contrast", "grad-drop"])
def test_effects_that_are_no_sums_over_tokens_have_no_spans_and_say_what_has(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor, case: str
) -> None:
    found = localize(
        pair,
        token_prompts,
        replace(anchor, readout="contrast") if case == "contrast" else anchor,
        units="heads",
        method="exact" if case == "exact" else "first-order",
        estimation=None if case == "exact" else Estimation(grad_drop=case == "grad-drop"),
    )
    with pytest.raises(
        ComponentError, match=r'no sums over .* Use localize\(\.\.\., method="first-order"\).*grad_drop'
    ):
        found.by_span()


@pytest.mark.parametrize("approximation", ["outputs", "weights", "ig"])
def test_an_estimate_between_nearly_equal_models_is_nearly_exact_and_says_how_it_was_made(
    token_prompts: ContrastPrompts, approximation: str
) -> None:
    near = close_pair("llama-gqa", scale=1e-3)
    anchor, units = anchor_on(near, token_prompts), "neurons,heads,kvs,attns,mlps,blocks,embed"
    how = Estimation(approximation=approximation)  # type: ignore[arg-type]
    found = localize(near, token_prompts, anchor, units=units, method="first-order", estimation=how)
    truth = localize(near, token_prompts, anchor, units=units)
    assert (found.method, found.engine) == ("first-order", approximation)
    assert (found.components, found.past_anchor) == (truth.components, truth.past_anchor)
    assert float((found.base - truth.base).abs().max()) == 0
    off = (found.per_prompt - truth.per_prompt).abs().sum() / truth.per_prompt.abs().sum()
    assert off < 0.05
    with pytest.raises(ComponentError, match="no sums over"):
        truth.by_span()


def test_a_sweep_to_first_order_yields_what_localize_collects(
    pair: ModelPair, token_prompts: ContrastPrompts, anchor: Anchor, estimates: Effects
) -> None:
    swept = list(sweep(pair, token_prompts, anchor, estimates.components, method="first-order"))
    assert tuple(one.component for one in swept) == estimates.components
    torch.testing.assert_close(torch.stack([one.per_prompt for one in swept]), estimates.per_prompt, rtol=0, atol=0)


def test_the_models_are_the_same_afterwards(token_prompts: ContrastPrompts) -> None:
    pair = close_pair("llama-gqa", scale=0.02)
    before = [{name: one.clone() for name, one in m.state_dict().items()} for m in (pair.base, pair.specialized)]
    screen(pair, token_prompts, anchor_on(pair, token_prompts), budget=8, units="neurons,heads")
    for model, states in zip((pair.base, pair.specialized), before, strict=True):
        assert all(torch.equal(one, states[name]) for name, one in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
