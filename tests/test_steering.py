from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from conftest import SHAPES, build_model
from weightpatch import Anchor, steered
from weightpatch.errors import AnchorError
from weightpatch.residuals import walk
from weightpatch.steering import Hold, holding

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def unit(n: int = 24, *, seed: int = 0) -> torch.Tensor:
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def residual(model: PreTrainedModel, layer: int, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """The stream that enters a layer, as a hook that was registered last sees it."""
    seen: list[torch.Tensor] = []

    def see(at: int, found: torch.Tensor, _args: object, _kwargs: object) -> None:
        if at == layer:
            seen.append(found)

    with torch.no_grad():
        walk(model, tokens, layer, see)
    return seen[0]


@pytest.mark.parametrize("shape", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_steered_model_reads_the_level_at_the_readout_position_and_nothing_else_moved(shape: str, layer: int) -> None:
    model, direction = build_model(shape, seed=1, dtype=torch.float64), unit()
    before = residual(model, layer)
    with steered(model, Anchor(layer=layer, direction=direction), 7.5):
        held = residual(model, layer)
    torch.testing.assert_close(held[:, -1] @ direction, torch.full((2,), 7.5, dtype=torch.float64))
    assert torch.equal(held[:, :-1], before[:, :-1])
    change = held[:, -1] - before[:, -1]
    torch.testing.assert_close(change, (change @ direction)[:, None] * direction)  # along the direction only
    assert torch.equal(residual(model, layer), before)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_holding_what_is_there_anyway_changes_no_answer_beyond_rounding(shape: str) -> None:
    model, direction = build_model(shape, seed=1, dtype=torch.float64), unit()
    level = float(residual(model, 2, TOKENS[:1])[0, -1] @ direction)
    with torch.no_grad():
        plain = model(input_ids=TOKENS[:1]).logits
        with steered(model, Anchor(layer=2, direction=direction), level):
            held = model(input_ids=TOKENS[:1]).logits
        with steered(model, Anchor(layer=2, direction=direction), level + 5):
            pushed = model(input_ids=TOKENS[:1]).logits
    torch.testing.assert_close(held, plain)
    assert float((pushed - plain)[0, -1].abs().max()) > 1e-3


def test_a_single_token_is_taken_for_one_of_the_answer() -> None:
    model, direction = build_model("llama-gqa", seed=1, dtype=torch.float64), unit()
    anchor, one = Anchor(layer=1, direction=direction), TOKENS[:, :1]
    before = residual(model, 1, one)
    with steered(model, anchor, 7.5, span="prompt"):
        assert torch.equal(residual(model, 1, one), before)
    with steered(model, anchor, 7.5, span="answer"):
        torch.testing.assert_close(residual(model, 1, one)[:, -1] @ direction, torch.full((2,), 7.5).double())


def test_an_answer_may_be_held_for_its_first_tokens_only() -> None:
    model, direction = build_model("llama-gqa", seed=1, dtype=torch.float64), unit()
    hold = Hold(layer=1, direction=direction, level=7.5, n_tokens=2)
    held = []
    with holding(model, [hold]) as select:
        select([0, 0])
        for width in (5, 1, 1, 1, 5, 1):  # two generations: a prompt, then token by token
            read = residual(model, 1, TOKENS[:, :width])[:, -1] @ direction
            held.append(bool((read - 7.5).abs().max() < 1e-9))
    assert held == [True, True, True, False, True, True]


def test_every_row_of_a_batch_is_held_in_its_own_way() -> None:
    model, direction = build_model("llama-gqa", seed=1, dtype=torch.float64), unit()
    other = unit(seed=1)
    before = residual(model, 2)
    holds = [None, Hold(layer=2, direction=direction, level=1.0, along=other, positions=(-1, -2)), None]
    with holding(model, holds) as select:
        select([2, 1])
        held = residual(model, 2)
        select([0, 2])
        untouched = residual(model, 2)
    assert torch.equal(untouched, before)
    assert torch.equal(held[0], before[0])
    missing = 1.0 - before[1, -2:] @ direction
    torch.testing.assert_close(held[1, -2:] - before[1, -2:], missing[:, None] * other)


def test_positions_from_the_start_are_refused_and_the_hooks_are_gone() -> None:
    model = build_model("llama-gqa", seed=1)
    with (
        pytest.raises(AnchorError, match="Give negative ones"),
        steered(model, Anchor(layer=0, direction=unit(), positions=(1,)), 1.0),
    ):
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
