"""Drill-down: parts are disjoint and complete, effects exact, the budget kept; and the sets that it patches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import build_model
from test_screening import anchor_on, close_pair
from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.architecture import Architecture
from weightpatch.component import Component, components, slices
from weightpatch.drilling import DrillDown, drill, short, steps
from weightpatch.effects import ComponentEffect, Effects
from weightpatch.errors import ComponentError, NoGapError
from weightpatch.localization import localize

LAYER = 2
DENSE, MIXTURE = "llama-gqa", "qwen3-moe"
SCALES = {DENSE: 0.02, MIXTURE: 0.03, "gpt2": 0.02}


@pytest.fixture(scope="module")
def pairs() -> dict[str, ModelPair]:
    return {shape: close_pair(shape, scale=scale) for shape, scale in SCALES.items()}


@pytest.fixture(scope="module")
def anchors(pairs: dict[str, ModelPair], token_prompts: ContrastPrompts) -> dict[str, Anchor]:
    return {shape: anchor_on(pair, token_prompts, layer=LAYER) for shape, pair in pairs.items()}


@pytest.fixture(scope="module")
def whole(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> dict[str, DrillDown]:
    """Everything opened, down to single neurons."""
    return {shape: drill(pairs[shape], token_prompts, anchors[shape], budget=1000, n_groups=3) for shape in SCALES}


def owners(pair: ModelPair, members: tuple[Component, ...]) -> dict[str, torch.Tensor]:
    """How many times each number of each parameter is owned."""
    counts = {name: torch.zeros(parameter.shape) for name, parameter in pair.base.named_parameters()}
    for member in members:
        for piece in slices(pair.architecture, member):
            piece.of(counts[piece.parameter]).add_(1)
    return counts


def by_component(effects: Effects) -> dict[Component, torch.Tensor]:
    return dict(zip(effects.components, effects.per_prompt, strict=True))


def walk(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    known: dict[Component, torch.Tensor],
    *,
    budget: int = 40,
    told: list[ComponentEffect],
) -> DrillDown:
    """Take all steps, and keep what they tell."""
    found = steps(pair, prompts, anchor, budget=budget, n_groups=3, engine="suffix", batch_tokens=None, known=known)
    while True:
        try:
            told.append(next(found))
        except StopIteration as end:
            tree: DrillDown = end.value
            return tree


@pytest.mark.parametrize("shape", SCALES)
def test_parts_are_disjoint_and_together_own_what_the_whole_owns(
    shape: str, pairs: dict[str, ModelPair], whole: dict[str, DrillDown]
) -> None:
    for one in whole[shape].opened:
        expected, found = owners(pairs[shape], (one.whole,)), owners(pairs[shape], one.parts)
        wrong = [name for name, count in expected.items() if not torch.equal(count, found[name])]
        assert not wrong, one.whole
        assert max(float(count.max()) for count in found.values()) == 1


@pytest.mark.parametrize("shape", SCALES)
def test_with_budget_enough_everything_that_has_parts_is_opened(
    shape: str, pairs: dict[str, ModelPair], whole: dict[str, DrillDown]
) -> None:
    found = whole[shape]
    opened = {one.whole.unit for one in found.opened}
    assert opened == {"blocks", "attns", "mlps", "sets"} | ({"experts"} if shape == MIXTURE else set())
    wanted = components(pairs[shape].architecture, "blocks,attns,mlps,heads,kvs,norms")
    measured = set(found.effects.components)
    assert [one for one in wanted if (one.layer or 0) < LAYER and one not in measured] == []
    assert {one.layer for one in measured} == set(range(LAYER))
    smallest = measured - {one.whole for one in found.opened}
    assert all(len(one.members) <= 1 for one in smallest)


@pytest.mark.parametrize("shape", [DENSE, MIXTURE, "gpt2"])
def test_at_last_come_single_neurons(shape: str, pairs: dict[str, ModelPair], whole: dict[str, DrillDown]) -> None:
    measured = set(whole[shape].effects.components)
    neurons = [one for one in components(pairs[shape].architecture, "neurons") if (one.layer or 0) < LAYER]
    assert [one for one in neurons if one not in measured] == []


@pytest.mark.parametrize("shape", [DENSE, MIXTURE])
def test_every_effect_is_that_of_an_exact_sweep(
    shape: str,
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    whole: dict[str, DrillDown],
    token_prompts: ContrastPrompts,
) -> None:
    found = whole[shape].effects
    truth = localize(pairs[shape], token_prompts, anchors[shape], units=found.components, engine="swap")
    expected = torch.stack([by_component(truth)[one] for one in found.components])
    torch.testing.assert_close(found.per_prompt, expected, rtol=0, atol=1e-12)
    assert any(one.unit == "sets" for one in found.components)
    assert (found.method, found.engine) == ("exact", "suffix")
    assert [one.layer for one in found.components] == sorted(one.layer or 0 for one in found.components)
    assert [str(one) for one in found.past_anchor] == ["L2"]


@pytest.mark.parametrize("budget", [2, 5, 6, 10, 23, 60])
@pytest.mark.parametrize("shape", [DENSE, MIXTURE])
def test_the_budget_is_never_exceeded_and_spent_where_something_fits(
    shape: str,
    budget: int,
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    token_prompts: ContrastPrompts,
) -> None:
    told: list[ComponentEffect] = []
    found = drill(pairs[shape], token_prompts, anchors[shape], budget=budget, n_groups=3, on_effect=told.append)
    assert len(told) == len(set(found.effects.components)) <= budget
    assert {one.component for one in told} == set(found.effects.components)
    assert len(told) == 2 + sum(len(one.parts) for one in found.opened)
    assert budget - len(told) < 10


def test_the_largest_effect_is_opened_first(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> None:
    for shape in SCALES:
        found = drill(pairs[shape], token_prompts, anchors[shape], budget=2 + 4, n_groups=3)
        effects = {one: abs(float(own.mean())) for one, own in by_component(found.effects).items()}
        blocks = sorted((one for one in effects if one.unit == "blocks"), key=lambda one: -effects[one])
        assert [one.whole for one in found.opened] == blocks[:1]
        deeper = drill(pairs[shape], token_prompts, anchors[shape], budget=30, n_groups=3)
        assert [one.whole for one in deeper.opened][:2] == blocks


def test_what_was_opened_had_a_larger_effect_than_what_was_known_by_then_and_left_shut(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> None:
    found = drill(pairs[DENSE], token_prompts, anchors[DENSE], budget=50, n_groups=3)
    effects = {one: abs(float(own.mean())) for one, own in by_component(found.effects).items()}
    order = [one.whole for one in found.opened]
    inside = {part: one.whole for one in found.opened for part in one.parts}
    # Groups of more than three neurons open into three parts each, so that all of them cost the same.
    shut = [one for one in effects if len(one.members) > 3 and one not in order]
    compared = 0
    for one in shut:
        # Components are opened four at a time, and what a round finds competes from the next one on.
        later = [other for other in order[order.index(inside[one]) + 4 :] if other.members]
        compared += len(later)
        assert all(effects[one] <= effects[other] for other in later)
    assert compared, "nothing was left shut that could have been opened: choose another budget"


def test_groups_hold_neurons_of_similar_estimates_the_highest_first(
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    whole: dict[str, DrillDown],
    token_prompts: ContrastPrompts,
) -> None:
    estimates = localize(pairs[DENSE], token_prompts, anchors[DENSE], units="neurons", method="first-order")
    sizes = {one: float(own.mean()) for one, own in by_component(estimates).items()}
    for one in whole[DENSE].opened:
        groups = [part for part in one.parts if part.unit in ("sets", "neurons")]
        members = [group.members or (group,) for group in groups]
        for higher, lower in pairwise(members):
            assert min(sizes[neuron] for neuron in higher) >= max(sizes[neuron] for neuron in lower)
        if one.whole.unit == "mlps":
            assert sorted(len(group) for group in members) == [6, 7, 7]
        if one.whole.unit == "sets":
            assert len(groups) == min(3, len(one.whole.members))


@pytest.fixture(scope="module")
def uninterrupted(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> tuple[list[ComponentEffect], DrillDown]:
    told: list[ComponentEffect] = []
    return told, walk(pairs[MIXTURE], token_prompts, anchors[MIXTURE], {}, told=told)


@pytest.mark.parametrize("n_known", [0, 1, 2, 3, 11, 25, "all"])
def test_an_interrupted_drill_down_goes_on_with_what_is_missing_and_ends_the_same(
    n_known: int | str,
    uninterrupted: tuple[list[ComponentEffect], DrillDown],
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    token_prompts: ContrastPrompts,
) -> None:
    told, tree = uninterrupted
    n = len(told) if n_known == "all" else int(n_known)
    known = {one.component: one.per_prompt for one in told[:n]}
    again: list[ComponentEffect] = []
    found = walk(pairs[MIXTURE], token_prompts, anchors[MIXTURE], known, told=again)
    assert [one.component for one in again] == [one.component for one in told[n:]]
    assert found.effects.components == tree.effects.components
    assert torch.equal(found.effects.per_prompt, tree.effects.per_prompt)
    assert [(one.whole, one.parts) for one in found.opened] == [(one.whole, one.parts) for one in tree.opened]
    assert str(found) == str(tree)


def test_a_known_effect_is_taken_as_it_is(
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    token_prompts: ContrastPrompts,
) -> None:
    block = Component.parse("L1")
    known = {block: torch.full((len(token_prompts),), 1e6, dtype=torch.float64)}
    told: list[ComponentEffect] = []
    found = walk(pairs[DENSE], token_prompts, anchors[DENSE], known, budget=6, told=told)
    assert block not in {one.component for one in told}
    assert [one.whole for one in found.opened] == [block]
    assert float(by_component(found.effects)[block][0]) == 1e6


def test_the_table_says_what_is_inside_what_and_what_its_parts_add_up_to(whole: dict[str, DrillDown]) -> None:
    for found in whole.values():
        table = found.table().set_index("component")
        assert list(table.columns)[-3:] == ["inside", "n_parts", "parts"]
        assert len(table) == len(found.effects.components)
        opened = {str(one.whole): [str(part) for part in one.parts] for one in found.opened}
        for name, row in table.iterrows():
            assert row["n_parts"] == len(opened.get(str(name), ()))
            if name in opened:
                assert row["parts"] == pytest.approx(sum(table.loc[part, "recovery"] for part in opened[str(name)]))
                assert set(table.index[table["inside"] == name]) == set(opened[str(name)])
            else:
                assert np.isnan(row["parts"])
        assert set(table.index[table["inside"] == ""]) == {"L0", "L1"}


def test_the_tree_in_words_lists_everything_once_under_what_it_is_in_the_largest_first(
    whole: dict[str, DrillDown],
) -> None:
    found = whole[DENSE]
    lines = str(found).splitlines()
    assert len(lines) == len(found.effects.components)
    table = found.table().set_index("component")
    blocks = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert blocks == sorted(("L0", "L1"), key=lambda name: -abs(table.loc[name, "recovery"]))
    first = table.loc[blocks[0]]
    assert lines[0] == f"{blocks[0]} {first['recovery']:.4f}, its 4 parts {first['parts']:.4f}"
    depths = [(len(line) - len(line.lstrip())) // 2 for line in lines]
    assert all(later <= before + 1 for before, later in pairwise(depths))
    sizes = [
        abs(float(line.split(",")[0].split()[-1])) for line, depth in zip(lines, depths, strict=True) if depth == 0
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_long_sets_are_told_by_their_size() -> None:
    assert short("{L5.N1,L5.N2,L5.N3,L5.N9}") == "4 of L5"
    assert short("{L5.N1,L5.N2,L5.N3}") == "{L5.N1,L5.N2,L5.N3}"
    assert short("L5.H3") == "L5.H3"


@pytest.mark.parametrize(("budget", "n_groups"), [(1, 8), (0, 8), (40, 1), (40, 0)])
def test_a_budget_below_the_number_of_blocks_or_one_group_is_refused(
    budget: int,
    n_groups: int,
    pairs: dict[str, ModelPair],
    anchors: dict[str, Anchor],
    token_prompts: ContrastPrompts,
) -> None:
    message = rf"a budget of {budget} in {n_groups} groups cannot open anything: 2 blocks .* Give at least 2"
    with pytest.raises(ComponentError, match=message):
        drill(pairs[DENSE], token_prompts, anchors[DENSE], budget=budget, n_groups=n_groups)


def test_without_a_gap_nothing_is_drilled(pairs: dict[str, ModelPair], token_prompts: ContrastPrompts) -> None:
    nowhere = Anchor(layer=LAYER, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(NoGapError, match="do not differ measurably"):
        drill(pairs[MIXTURE], token_prompts, nowhere, budget=20)


def sets_of(architecture: Architecture) -> Iterator[Component]:
    members = components(architecture, "blocks,heads,kvs,mlps,neurons,embed")
    for seed in range(40):
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
        yield Component.joint(members[place] for place in order[: 1 + seed % 5])


@pytest.mark.parametrize("shape", [DENSE, MIXTURE])
def test_the_address_of_every_set_reads_back_as_the_same_set(shape: str) -> None:
    architecture = Architecture.of(build_model(shape, seed=1))
    for one in sets_of(architecture):
        again = Component.parse(str(one))
        assert again == one
        assert hash(again) == hash(one)
        assert str(again) == str(one)
        (named,) = components(architecture, str(one))
        assert named == one


def test_the_order_of_a_set_is_that_of_layers_and_what_is_named_twice_counts_once() -> None:
    orders = [
        "{L7.mlp,L5.H3,embed,L5.N12,L5.N2,L5.E3.N0}",
        "{L5.N12, L5.H3, L5.H3, L7.mlp, L5.E3.N0, embed ,L5.N2,L7.mlp}",
    ]
    found = {Component.parse(order) for order in orders}
    (one,) = found
    assert str(one) == "{embed,L5.H3,L5.N2,L5.N12,L5.E3.N0,L7.mlp}"
    assert (one.unit, one.layer, len(one.members)) == ("sets", None, 6)
    assert Component.parse("{L7.mlp,L5.H3}").layer == 5
    assert Component.joint(Component.parse(name) for name in ("L7.mlp", "L5.H3")) == Component.parse("{L7.mlp,L5.H3}")


@pytest.mark.parametrize("names", ["L0.norm.attn,L0.norm.mlp", "L0.attn.rest,L0.mlp.rest", "embed,norm,unembed"])
def test_the_order_of_a_set_of_norms_rests_or_ends_does_not_matter_either(names: str) -> None:
    backwards = ",".join(reversed(names.split(",")))
    assert Component.parse(f"{{{names}}}") == Component.parse(f"{{{backwards}}}")


@pytest.mark.parametrize("text", ["{{L0.H0},L1.H1}", "{L0.H0,{L1.H1,L2.H2}}", "{}", "{L0.H0,}", "{heads}", "{L0.H0"])
def test_what_is_no_set_of_components_is_refused(text: str) -> None:
    with pytest.raises(ComponentError, match=r"\{L5\.H3,L7\.mlp\}"):
        Component.parse(text)
    with pytest.raises(ComponentError):
        components(Architecture.of(build_model(DENSE, seed=1)), text)


def test_sets_of_sets_and_of_nothing_cannot_be_made() -> None:
    inner = Component.joint([Component.parse("L0.H0")])
    for members in ([], [inner], [Component.parse("L1.H0"), inner]):
        with pytest.raises(ComponentError, match="a set holds at least one component, and no sets"):
            Component.joint(members)


def test_a_member_that_the_model_does_not_have_is_named() -> None:
    architecture = Architecture.of(build_model(DENSE, seed=1))
    with pytest.raises(ComponentError, match=r"L9\.H0: this model has layers L0 to L2"):
        components(architecture, "{L0.H0,L9.H0},heads")


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ("{L0.N1,L1.H0},L2.mlp", ["{L0.N1,L1.H0}", "L2.mlp"]),
        ("L2.mlp , {L1.H0, L0.N1}", ["{L0.N1,L1.H0}", "L2.mlp"]),
        ("{L0.N1},{L0.N1,L1.H0},{L1.H0,L0.N1}", ["{L0.N1}", "{L0.N1,L1.H0}"]),
    ],
)
def test_sets_are_told_from_what_stands_beside_them(units: str, expected: list[str]) -> None:
    found = components(Architecture.of(build_model(DENSE, seed=1)), units)
    assert [str(one) for one in found] == expected


def test_sets_and_units_are_localized_side_by_side(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> None:
    found = localize(pairs[DENSE], token_prompts, anchors[DENSE], units="{L0.N1,L1.H0},heads")
    names = [f"L{layer}.H{index}" for layer in range(LAYER) for index in range(4)]
    assert sorted(map(str, found.components)) == sorted(["{L0.N1,L1.H0}", *names])
    assert [str(one) for one in found.past_anchor] == [f"L2.H{index}" for index in range(4)]
    truth = localize(pairs[DENSE], token_prompts, anchors[DENSE], units=found.components, engine="swap")
    torch.testing.assert_close(found.per_prompt, truth.per_prompt, rtol=0, atol=1e-12)


def test_a_set_that_reaches_past_the_anchor_has_the_effect_of_what_lies_below_it(
    pairs: dict[str, ModelPair], anchors: dict[str, Anchor], token_prompts: ContrastPrompts
) -> None:
    for method in ("exact", "first-order"):
        found = localize(
            pairs[DENSE],
            token_prompts,
            anchors[DENSE],
            units="{L0.H0,L2.mlp},L0.H0,{L2.mlp,L2.H0}",
            method=method,  # type: ignore[arg-type]
        )
        effects = {str(one): own for one, own in by_component(found).items()}
        torch.testing.assert_close(effects["{L0.H0,L2.mlp}"], effects["L0.H0"], rtol=1e-9, atol=0)
        assert [str(one) for one in found.past_anchor] == ["{L2.mlp,L2.H0}"]


@pytest.mark.parametrize("shape", [DENSE, MIXTURE])
def test_a_set_owns_what_its_members_own(shape: str, pairs: dict[str, ModelPair]) -> None:
    for one in sets_of(pairs[shape].architecture):
        together, single = owners(pairs[shape], (one,)), owners(pairs[shape], one.members)
        wrong = [name for name, count in single.items() if not torch.equal(count > 0, together[name] > 0)]
        assert not wrong, one
