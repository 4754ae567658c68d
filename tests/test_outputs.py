"""Readouts of the output: margins and divergences, through every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import SHAPES, build_model, build_pair, some_of_every_unit
from weightpatch import ContrastPrompts, Estimation, ModelPair, localize
from weightpatch.component import Component
from weightpatch.errors import ComponentError, PromptError
from weightpatch.outputs import Divergence, Margin, fit_divergence, fit_margin, forced_log_probs
from weightpatch.reader import logits_of
from weightpatch.reading import Target, readouts, reference
from weightpatch.residuals import read_residuals

PROMPTS = ContrastPrompts.from_token_ids(
    with_instruction=[[7, 3, 55, 20, 41, 8], [7, 3, 55, 2, 2, 30, 11, 60], [7, 3, 9]],
    without_instruction=[[7, 3, 55], [7, 3, 55, 2], [7]],
)
COMPLIANT = ((4, 9, 33), (8,), (5, 5))
PLAIN = ((20,), (30, 31, 2, 7), (1, 60))


def margin(pair: ModelPair) -> Margin:
    return Margin(layer=pair.architecture.n_layers, compliant=COMPLIANT, plain=PLAIN)


def divergence(pair: ModelPair) -> Divergence:
    tokens = PROMPTS.tokenize(None).with_instruction
    return Divergence(
        layer=pair.architecture.n_layers,
        responses=COMPLIANT,
        log_probs=tuple(forced_log_probs(pair.specialized, tokens, COMPLIANT)),
    )


def near(shape: str, share: float) -> ModelPair:
    """A pair whose weights differ by little."""
    pair = build_pair(shape, dtype=torch.float64)
    specialized = build_model(shape, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in specialized.named_parameters():
            parameter.lerp_(pair.specialized.get_parameter(name), share)
    return ModelPair(base=pair.base, specialized=specialized)


def effects(pair: ModelPair, target: Target, chosen: list[Component], **options: object) -> Tensor:
    return localize(pair, PROMPTS, target, units=chosen, **options).per_prompt  # type: ignore[arg-type]


def measurable(pair: ModelPair) -> list[Component]:
    return [one for one in some_of_every_unit(pair, below=9) if one.layer is not None]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_head_and_what_follows_are_the_models_own(shape: str) -> None:
    model = build_model(shape, seed=1, dtype=torch.float64)
    ids = [7, 3, 55, 20, 41]
    residual = read_residuals(model, [ids], layers=[3], positions=[-2, -1])[0]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids])).logits[:, -2:]
        torch.testing.assert_close(logits_of(model, residual), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [margin, divergence])
@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2-softcap", "gpt2", "gpt-neox", "granite", "qwen3-moe"])
def test_suffix_equals_written_weights_and_whole_models(shape: str, make: object) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    target: Target = make(pair)  # type: ignore[operator]
    chosen = measurable(pair)
    fast, written = (effects(pair, target, chosen, engine=engine) for engine in ("suffix", "swap"))
    base, specialized = reference(pair, PROMPTS, target)
    gap = float((specialized - base).abs().mean())
    assert float(written.abs().max()) > 0.05 * gap
    torch.testing.assert_close(fast, written, rtol=0, atol=1e-6 * gap)  # log-probabilities are float32


@pytest.mark.parametrize("make", [margin, divergence])
def test_of_weights_that_differ_little_the_estimate_is_the_effect(make: object) -> None:
    pair = near("llama-gqa", 1e-4)
    target: Target = make(build_pair("llama-gqa", dtype=torch.float64))  # type: ignore[operator]
    chosen = [one for one in measurable(pair) if one.unit in ("neurons", "heads", "kvs")]
    exact, estimate = (effects(pair, target, chosen, method=method) for method in ("exact", "first-order"))
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_estimates_of_an_output_are_split_by_span_too() -> None:
    pair = near("llama-gqa", 1e-2)
    found = localize(pair, PROMPTS, margin(pair), units="mlps", method="first-order")
    table = found.by_span()
    assert {"query", "instruction", "last", "response"} <= set(table.columns)
    spans = table[[*found.per_span]].sum(axis=1).to_numpy()
    torch.testing.assert_close(torch.tensor(spans), torch.tensor(table["recovery"].to_numpy()))


def test_everything_patched_gives_the_specialized_models_output() -> None:
    pair = build_pair("gpt-neox", dtype=torch.float64)
    target = divergence(pair)
    everything = "{embed,L0,L1,L2,norm,unembed}"
    found = localize(pair, PROMPTS, target, units=everything, engine="swap")
    torch.testing.assert_close(found.per_prompt[0], found.gap, rtol=0, atol=1e-9)
    assert float(readouts(pair.specialized, pair, PROMPTS, target).abs().max()) < 1e-9


@pytest.mark.parametrize("options", [{"engine": "suffix"}, {"method": "first-order"}])
@pytest.mark.parametrize(
    ("shape", "address"), [("llama-mha", "embed"), ("llama-gqa", "norm"), ("llama-gqa", "unembed")]
)
def test_what_lies_behind_the_last_layer_is_left_to_the_oracle(
    shape: str, address: str, options: dict[str, str]
) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    with pytest.raises(ComponentError, match=rf'{address}: .* only engine="swap" patches'):
        localize(pair, PROMPTS, margin(pair), units=address, **options)  # type: ignore[arg-type]
    assert float(effects(pair, margin(pair), [Component.parse(address)], engine="swap").abs().max()) > 0


def test_an_embedding_that_is_not_the_head_is_measured_by_all() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    chosen = [Component.parse("embed")]
    fast, written = (effects(pair, margin(pair), chosen, engine=engine) for engine in ("suffix", "swap"))
    torch.testing.assert_close(fast, written, rtol=0, atol=1e-5)


def test_a_readout_of_other_prompts_is_refused() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    with pytest.raises(PromptError, match="3 responses for 1 prompts: fit the readout on those that are measured"):
        localize(pair, ContrastPrompts(PROMPTS.rows[:1]), divergence(pair), units="mlps")


def test_a_readout_fitted_on_as_many_other_prompts_is_refused() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    fitted = replace(margin(pair), prompts=((1, 2), (3,), (4, 5)))
    with pytest.raises(PromptError, match="fitted on other prompts"):
        localize(pair, PROMPTS, fitted, units="mlps")


def test_sizes_of_a_difference_are_refused() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    with pytest.raises(ComponentError, match="cannot be subtracted"):
        localize(pair, PROMPTS, margin(pair), units="mlps", method="first-order", estimation=Estimation(grad_drop=True))


def test_readouts_are_fitted_on_what_the_models_say() -> None:
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized")
    prompts = ContrastPrompts.load("instructions:title", n_queries=4).split("localize")
    target = fit_margin(pair, prompts, n_tokens=6)
    base, specialized = reference(pair, prompts, target)
    assert float(base.mean()) < 0 < float(specialized.mean())
    closest = fit_divergence(pair, prompts, n_tokens=6)
    base, specialized = reference(pair, prompts, closest)
    assert float(base.max()) < -0.1
    assert float(specialized.abs().max()) < 1e-6
    blocks = localize(pair, prompts, closest, units="blocks,attns,mlps")
    assert float(blocks.per_prompt.abs().max()) > 0.1


def test_readouts_that_need_text_say_so() -> None:
    pair = build_pair("llama-gqa")
    for fit in (fit_margin, fit_divergence):
        with pytest.raises(PromptError, match="give the pair a tokenizer"):
            fit(pair, PROMPTS)
