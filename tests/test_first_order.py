"""First-order estimates against an oracle of plain autograd, and against what must hold for any weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import first_order_oracle
from conftest import EVERY_SHAPE, build_model, build_pair, slow_unless, some_of_every_unit
from weightpatch import Anchor, ModelPair
from weightpatch.component import Component, components, partition
from weightpatch.engine import first_order, suffix, swap
from weightpatch.errors import ComponentError

ANCHOR = Anchor(layer=2, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)), positions=(-1, 1))
PROMPTS = [[7, 3, 55, 20, 41, 8, 19], [7, 3, 55, 2, 2, 30, 11, 60, 5], [7, 3, 55, 20]]
WHERE = {"layer": ANCHOR.layer, "positions": ANCHOR.positions, "direction": ANCHOR.direction}
BY_PROMPT = [torch.eye(3)[:, [place]].expand(3, len(ids)) for place, ids in enumerate(PROMPTS)]


def estimate(pair: ModelPair, chosen: list[Component], **options: object) -> Tensor:
    settings = {"sums": BY_PROMPT, "batch_tokens": 12, **options}
    return first_order.estimate(pair, PROMPTS, ANCHOR, chosen, **settings)  # type: ignore[arg-type]


def against(oracle: object, pair: ModelPair, chosen: list[Component], **options: object) -> Tensor:
    return torch.stack(
        [oracle(pair.base, pair.specialized, PROMPTS, str(one), **WHERE, **options) for one in chosen]  # type: ignore[operator]
    )


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_estimates_by_outputs_equal_those_of_plain_autograd_for_every_unit(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    truth = against(first_order_oracle.outputs, pair, chosen)
    torch.testing.assert_close(estimate(pair, chosen), truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_estimates_by_weights_equal_those_of_plain_autograd_for_every_unit(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    truth = against(first_order_oracle.weights, pair, chosen)
    found = estimate(pair, chosen, approximation="weights")
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=slow_unless(shape in ("llama-gqa", "qwen3-moe")))
        for shape in ("llama-gqa", "gemma2", "gpt2", "qwen3-moe")
    ],
)
def test_integrated_estimates_equal_those_of_plain_autograd(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    truth = against(first_order_oracle.integrated, pair, chosen, n_steps=3)
    found = estimate(pair, chosen, approximation="ig", n_steps=3)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox", "olmoe"])
def test_grad_drop_leaves_out_one_layer_at_a_time(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    truth = against(first_order_oracle.dropped, pair, chosen)
    found = estimate(pair, chosen, grad_drop=True)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize(  # a mixture jumps from expert to expert
    "shape",
    [pytest.param(shape, marks=slow_unless(shape == "llama-gqa")) for shape in ("llama-gqa", "olmo2", "gpt-neox")],
)
def test_integrated_estimates_of_all_parameters_add_up_to_the_gap(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    parts = partition(pair.architecture, "neurons")
    below = [one for one in parts if one.address == "embed" or (one.layer is not None and one.layer < ANCHOR.layer)]
    found = estimate(pair, below, approximation="ig", n_steps=64).sum(dim=0)
    base, specialized = (
        swap.readouts(model, PROMPTS, ANCHOR, batch_tokens=99) for model in (pair.base, pair.specialized)
    )
    torch.testing.assert_close(
        found, specialized - base, rtol=0.02, atol=0.02 * float((specialized - base).abs().max())
    )


@pytest.mark.parametrize("shape", ["llama-gqa", "phi3", "opt"])
def test_in_the_layer_below_the_anchor_estimates_of_mlps_are_exact(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = [one for one in components(pair.architecture, "mlps,neurons") if one.layer == ANCHOR.layer - 1]
    exact = torch.stack(
        [
            one.readout - one.base
            for one in suffix.sweep(pair, PROMPTS, ANCHOR, chosen, batch_tokens=99, skip=frozenset())
        ]
    )
    torch.testing.assert_close(estimate(pair, chosen), exact, rtol=0, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("approximation", ["outputs", "weights"])
@pytest.mark.parametrize("shape", ["llama-gqa", "gemma3", "qwen3", "olmo2", "smollm3", "olmoe"])
def test_how_prompts_are_dealt_out_to_rows_changes_nothing(shape: str, approximation: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    one_by_one, together = (
        estimate(pair, chosen, batch_tokens=width, approximation=approximation) for width in (1, 1000)
    )
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-6 * float(together.abs().max()))


def test_sums_over_tokens_add_up_to_the_sum_over_the_prompt() -> None:
    pair = build_pair("qwen3", dtype=torch.float64)
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    ids = PROMPTS[1]
    by_token = first_order.estimate(pair, [ids], ANCHOR, chosen, sums=[torch.eye(len(ids))], batch_tokens=99)
    assert float(by_token[:, 0].abs().max()) > 0
    torch.testing.assert_close(by_token.sum(dim=1), estimate(pair, chosen)[:, 1], rtol=0, atol=1e-12)


def test_a_cosine_readout_is_followed_too() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    anchor = Anchor(layer=2, direction=ANCHOR.direction, positions=(-1,), readout="cosine")
    chosen = [one for one in components(pair.architecture, "neurons") if one.layer == 1][:6]
    with torch.no_grad():
        for name, parameter in pair.specialized.named_parameters():
            parameter.copy_(torch.lerp(pair.base.get_parameter(name), parameter, 1e-4))
    found = first_order.estimate(pair, PROMPTS, anchor, chosen, sums=BY_PROMPT, batch_tokens=99)
    exact = torch.stack(
        [one.readout - one.base for one in swap.sweep(pair, PROMPTS, anchor, chosen, batch_tokens=99, skip=frozenset())]
    )
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_the_estimate_of_a_set_is_the_sum_of_its_members() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    members = components(pair.architecture, "L0.N3,L0.H1,L1.mlp")
    found = estimate(pair, [*members, Component.joint(members)])
    torch.testing.assert_close(found[-1], found[:-1].sum(dim=0))


def test_what_lies_behind_the_anchor_adds_nothing_to_a_set() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    alone, behind = components(pair.architecture, "L0.H1"), components(pair.architecture, "L0.H1,norm,L2.mlp")
    found = estimate(pair, [*alone, Component.joint(behind)])
    torch.testing.assert_close(found[0], found[1])


def test_an_unknown_approximation_is_refused() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    with pytest.raises(ComponentError, match=r"unknown approximation 'gradient'\. Choose one of outputs, weights, ig"):
        estimate(pair, [Component.parse("L0")], approximation="gradient")


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "qwen3-moe"])
@pytest.mark.parametrize("approximation", ["outputs", "weights"])
def test_in_bfloat16_estimates_stay_near_those_in_float32(shape: str, approximation: str) -> None:
    models = [build_model(shape, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    pair = ModelPair(base=models[0], specialized=models[1])
    chosen = some_of_every_unit(pair, below=ANCHOR.layer)
    rough = estimate(pair, chosen, approximation=approximation)
    for model in models:
        model.float()
    fine = estimate(pair, chosen, approximation=approximation)
    assert float((rough - fine).abs().mean()) < 0.05 * float(fine.abs().mean())
