"""Values in company are those of games solved by hand, and patches of sets equal patches written one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from conftest import EVERY_SHAPE, build_pair
from weightpatch import Anchor, ContrastPrompts, ModelPair, localize
from weightpatch.coalitions import Measure, addition, removal, shapley
from weightpatch.component import Component
from weightpatch.engine.walking import walking
from weightpatch.errors import ComponentError
from weightpatch.patch import patched
from weightpatch.reading import inputs, reference

LAYER = 2


def game(worth: dict[frozenset[int], float]) -> Measure:
    """A game of two prompts, the second of which doubles everything."""

    def measure(sets: Sequence[frozenset[int]]) -> Tensor:
        assert all(sets)
        return torch.tensor([[worth[own], 2 * worth[own]] for own in sets], dtype=torch.float64)

    return measure


def every_set(n: int) -> list[frozenset[int]]:
    return [frozenset(place for place in range(n) if bits >> place & 1) for bits in range(1, 2**n)]


# 0 and 1 are worth something together only, either of 2 and 3 suffices, 4 is idle, 5 works against it.
HARD = game(
    {
        own: 4.0 * ({0, 1} <= own) + 2.0 * bool({2, 3} & own) - 1.0 * (5 in own) + 0.0 * (4 in own)
        for own in every_set(6)
    }
)


def test_shapley_values_of_a_small_game_are_the_mean_over_all_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    worth = {own: float(torch.randn((), generator=generator)) for own in every_set(4)}
    by_hand = torch.zeros(4, dtype=torch.float64)
    for order in permutations(range(4)):
        for place, player in enumerate(order):
            before = worth[frozenset(order[:place])] if place else 0.0
            by_hand[player] += (worth[frozenset(order[: place + 1])] - before) / 24
    found = shapley(game(worth), 4, budget=60_000, seed=1)
    assert torch.allclose(found[:, 0], by_hand, atol=0.03)
    assert torch.allclose(found[:, 1], 2 * found[:, 0])


@pytest.mark.parametrize("budget", [11, 50, 333])
def test_shapley_values_add_up_to_the_whole_and_cost_no_more_than_the_budget(budget: int) -> None:
    asked: list[frozenset[int]] = []

    def counted(sets: Sequence[frozenset[int]]) -> Tensor:
        asked.extend(sets)
        return HARD(sets)

    found = shapley(counted, 6, budget=budget)
    assert found.sum(dim=0).tolist() == pytest.approx([5.0, 10.0])
    assert budget - 10 <= len(asked) <= budget


def test_shapley_divides_what_two_bring_together_and_what_either_would_bring() -> None:
    found = shapley(HARD, 6, budget=11)[:, 0]
    # An order and its reverse suffice for sums of games of pairs.
    assert found.tolist() == pytest.approx([2, 2, 1, 1, 0, -1])


def test_addition_takes_the_best_first_and_sees_what_is_left_of_the_others() -> None:
    found = addition(HARD, 6, budget=200)[:, 0].tolist()
    assert sorted(found[2:4]) == [0, 2]  # one of the two that suffice, and what the other adds on top
    assert found[4:] == [0, -1]
    assert found[:2] == [0, 0]  # neither moves anything alone: greedy addition cannot find the pair


def test_removal_keeps_pairs_that_work_together_and_one_of_those_that_suffice() -> None:
    found = removal(HARD, 6, budget=200)[:, 0].tolist()
    assert sorted(found[:2]) == [0, 4]  # the last one's worth, when its partner has left, is 0
    assert sorted(found[2:4]) == [0, 2]
    assert found[4:] == [0, -1]
    short = removal(HARD, 6, budget=13)[:, 0].tolist()
    assert short == [4, 4, 0, 0, 0, -1]


def test_a_game_that_restores_downwards_is_searched_downwards() -> None:
    def mirrored(sets: Sequence[frozenset[int]]) -> Tensor:
        return -HARD(sets)

    for search in (addition, removal):
        assert torch.equal(search(mirrored, 6, budget=100, sign=-1), -search(HARD, 6, budget=100))


@pytest.mark.parametrize("search", [shapley, addition, removal])
def test_a_budget_too_small_says_how_much_it_takes(search: object) -> None:
    assert callable(search)
    with pytest.raises(ComponentError, match=r"budget of 5 sets is too small .* 6 components"):
        search(HARD, 6, budget=5)


def test_values_of_one_player_are_its_worth() -> None:
    alone = game({frozenset([0]): 3.0})
    for found in (shapley(alone, 1, budget=1), addition(alone, 1, budget=3), removal(alone, 1, budget=3)):
        assert found.tolist() == [[3.0, 6.0]]


def anchor_of(pair: ModelPair) -> Anchor:
    torch.manual_seed(5)
    width = pair.base.get_input_embeddings().weight.shape[1]
    return Anchor(layer=LAYER, direction=torch.randn(width), positions=(-1,))


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_walking_reads_what_the_whole_model_gives_with_each_set_alone_and_restores_every_bit(
    shape: str, token_prompts: ContrastPrompts
) -> None:
    pair = build_pair(shape)
    anchor = replace(anchor_of(pair), layer=3)
    chosen = [Component.parse(address) for address in ("L0.H1", "L0.mlp", "L1.attn", "L1.mlp", "L2.H0")]
    chosen.append(Component.joint([Component.parse("L2.H2"), Component.parse("embed")]))
    before = {name: parameter.clone() for name, parameter in pair.base.named_parameters()}
    sets: list[set[int]] = [{0}, {0, 1}, {4}, {0, 1, 5}, {2, 3, 4}, set(), {4}, {3, 4}, {5}, set(range(6)), {1}, {1}]
    token_ids = inputs(pair, token_prompts, anchor)
    found = []
    with walking(pair, token_ids, anchor, chosen, batch_tokens=512) as read:
        found = [read(frozenset(wanted)) for wanted in sets]
    assert all(torch.equal(before[name], parameter) for name, parameter in pair.base.named_parameters())
    gap = reference(pair, token_prompts, anchor)
    for wanted, readouts in zip(sets, found, strict=True):
        members = [one for place in sorted(wanted) for one in (chosen[place].members or (chosen[place],))]
        with patched(pair, members) as model:
            whole = reference(pair.with_models(model, pair.specialized), token_prompts, anchor)[0]
        assert torch.allclose(readouts, whole, atol=2e-5 * float((gap[1] - gap[0]).abs().max()))


def test_weights_that_two_components_own_are_refused_in_company(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa")
    token_ids = inputs(pair, token_prompts, anchor_of(pair))
    for first, second in (("L1.attn", "L1.H0"), ("L0.N3", "L0.mlp")):
        chosen = [Component.parse(first), Component.parse(second)]
        refused = pytest.raises(ComponentError, match=f"{first} and {second} share weights|{second} and {first} share")
        with refused, walking(pair, token_ids, anchor_of(pair), chosen, batch_tokens=512):
            pass


def test_values_of_a_pair_add_up_to_what_all_its_components_restore(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa")
    anchor = anchor_of(pair)
    found = localize(pair, token_prompts, anchor, units="attns,mlps", method="shapley", budget=40, seed=3)
    with patched(pair, [str(one) for one in found.components]) as model:
        together = reference(pair.with_models(model, pair.specialized), token_prompts, anchor)[0]
    assert torch.allclose(found.per_prompt.sum(dim=0), together - found.base, atol=1e-5)
    other = localize(pair, token_prompts, anchor, units="attns,mlps", method="shapley", budget=40, seed=4)
    assert not torch.equal(found.per_prompt, other.per_prompt)


def test_first_gains_and_first_losses_are_the_exact_effects(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("gpt2")
    anchor = anchor_of(pair)
    exact = localize(pair, token_prompts, anchor, units="attns,mlps")
    n = len(exact.components)
    # With no budget for a step, addition measures everything alone, and removal what each leaves behind.
    gains = localize(pair, token_prompts, anchor, units="attns,mlps", method="addition", budget=2 * n + 1)
    assert torch.allclose(gains.per_prompt, exact.per_prompt, atol=1e-4)
    losses = localize(pair, token_prompts, anchor, units="attns,mlps", method="removal", budget=2 * n + 1)
    for place, component in enumerate(exact.components):
        rest = [one for one in exact.components if one != component]
        both = [
            localize(pair, token_prompts, anchor, units=[Component.joint(own)]).per_prompt[0]
            for own in (exact.components, rest)
        ]
        assert torch.allclose(losses.per_prompt[place], both[0] - both[1], atol=1e-4)
