"""Activation patching against hooks on whole models, and against what must hold for any weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import flow_oracle
import hook_oracle
from conftest import EVERY_SHAPE, build_pair, some_of_every_unit
from flow_cases import mean_gap, pair_of
from flow_oracle import Case
from weightpatch import Anchor, ContrastPrompts, ModelPair, localize
from weightpatch.component import components
from weightpatch.errors import WeightpatchError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ANCHOR = Anchor(layer=2, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)), positions=(-1, 1))
TOKEN_IDS = [[7, 3, 55, 20, 41, 8, 19], [7, 3, 55, 2, 2, 30, 11, 60, 5], [7, 3, 55, 20]]
"""Ragged, with a start that all share, and one that is the start of another: its last token is read there alone."""
PROMPTS = ContrastPrompts.from_token_ids(
    with_instruction=TOKEN_IDS, without_instruction=[ids[:-1] for ids in TOKEN_IDS]
)
WITH_OUTPUTS = "embed,blocks,attns,mlps,heads,heads.q,heads.o,kvs,neurons,experts,routers"


@cache
def case_of(shape: str, dtype: torch.dtype = torch.float64) -> Case:
    pair = pair_of(shape, dtype)
    where = {"layer": ANCHOR.layer, "positions": ANCHOR.positions, "direction": ANCHOR.direction}
    return Case(base=pair.base, specialized=pair.specialized, token_ids=TOKEN_IDS, **where)


def with_outputs(pair: ModelPair) -> list[str]:
    """A component of every unit that has an output, of every layer below the anchor."""
    chosen = {(one.unit, one.layer): str(one) for one in some_of_every_unit(pair, below=ANCHOR.layer)}
    return [address for (unit, _), address in chosen.items() if unit not in ("norms", "rests")]


def sets_of(pair: ModelPair) -> list[str]:
    """Sets within a sublayer, over several, and over several layers."""
    if pair.architecture.n_experts_of(0):
        neurons = ["{L0.E1.N2,L0.E1.N5,L0.E2}", "{L0.router,L0.E0,L1.H0}"]
    else:
        neurons = ["{L0.N2,L0.N7,L1.H3}"]
    return ["{L0.H1,L0.H2}", "{L0.H2.q,L0.H1.o,L0.KV0,L1.mlp}", "{embed,L1.attn}", "{L0,L1.H1,L1.mlp}", *neurons]


def by_oracle(case: Case, addresses: list[str], *, method: str = "activation", at: str = "all") -> Tensor:
    base = flow_oracle.readouts(case)
    found = [flow_oracle.patched_readouts(case, address, method=method, at=at) - base for address in addresses]
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle by itself.


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_in_the_oracle_parts_add_up_to_writes_and_writes_to_the_stream(shape: str) -> None:
    model, one = case_of(shape).base, case_of(shape).base_runs[1]
    for layer in range(3):
        attn, mlp = one[layer, "attn_added"], one[layer, "mlp_added"]
        torch.testing.assert_close(one[layer, "entering"] + attn + mlp, one[layer, "leaving"], rtol=0, atol=1e-12)
        parts = [f"L{layer}.attn.rest", *(f"L{layer}.H{head}" for head in range(4))]
        torch.testing.assert_close(sum_of(model, one, parts), attn, rtol=0, atol=1e-12)
        if (layer, "a") in one:
            parts = [f"L{layer}.mlp.rest", *(f"L{layer}.N{neuron}" for neuron in range(one[layer, "a"].shape[1]))]
        else:
            parts = [f"L{layer}.E{expert}" for expert in range(4)]
        torch.testing.assert_close(sum_of(model, one, parts), mlp, rtol=0, atol=1e-12)


def sum_of(model: torch.nn.Module, one: flow_oracle.Run, parts: list[str]) -> Tensor:
    return torch.stack([flow_oracle.contribution(model, one, part) for part in parts]).sum(dim=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_in_the_oracle_all_outputs_together_give_the_specialized_readout(shape: str) -> None:
    case = case_of(shape)
    together = ["{embed,L0,L1}"]
    if case.base.config.model_type not in flow_oracle.NORMS_BEHIND:  # those norms stay the base's
        together += ["{embed,L0.attn,L0.mlp,L1.attn,L1.mlp}"]
    for address in together:
        found = flow_oracle.patched_readouts(case, address, method="activation")
        torch.testing.assert_close(found, flow_oracle.readouts(case.exchanged()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["qwen3-moe"])
def test_in_the_oracle_weights_written_into_a_copy_act_like_hooks(shape: str) -> None:
    case = case_of(shape)
    where = {"layer": case.layer, "positions": case.positions, "direction": case.direction}
    for component in some_of_every_unit(pair_of(shape), below=ANCHOR.layer):
        hooked = hook_oracle.patched_readouts(case.base, case.specialized, TOKEN_IDS, str(component), **where)
        found = flow_oracle.patched_readouts(case, str(component), method="weights")
        torch.testing.assert_close(found, hooked, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The engine.


@pytest.mark.parametrize(
    ("dtype", "at"),
    [(torch.float64, "all"), (torch.float64, "readouts"), (torch.float32, "all")],
    ids=["float64-all", "float64-readouts", "float32-all"],
)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_activation_patching_equals_hooks_on_whole_models_for_every_unit(
    shape: str, dtype: torch.dtype, at: str
) -> None:
    pair, case = pair_of(shape, dtype), case_of(shape, dtype)
    addresses = with_outputs(pair)[:: 1 if dtype == torch.float64 and at == "all" else 2]
    effects = localize(pair, PROMPTS, ANCHOR, units=",".join(addresses), method="activation", at=at)
    truth = by_oracle(case, [str(one) for one in effects.components], at=at)
    assert {str(one) for one in effects.components} == set(addresses)
    assert effects.per_prompt.dtype == torch.float64
    gap = mean_gap(case)
    assert float(truth.abs().max()) > 0.05 * gap
    torch.testing.assert_close(effects.per_prompt, truth, rtol=0, atol=TOLERANCE[dtype] * gap)


@pytest.mark.parametrize("at", ["all", "readouts"])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_sets_are_clamped_together(shape: str, at: str) -> None:
    pair, case = pair_of(shape), case_of(shape)
    addresses = sets_of(pair)
    effects = localize(pair, PROMPTS, ANCHOR, units=",".join(addresses), method="activation", at=at)
    truth = by_oracle(case, [str(one) for one in effects.components], at=at)
    assert len(truth) == len(addresses)
    torch.testing.assert_close(effects.per_prompt, truth, rtol=0, atol=1e-10 * mean_gap(case))


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "opt", "qwen3-moe"])
def test_where_only_one_component_differs_its_output_is_worth_what_its_weights_are(shape: str) -> None:
    different = pair_of(shape)
    for address in with_outputs(different)[::3]:
        pair = ModelPair(
            base=different.base,
            specialized=flow_oracle.transplanted(different.base, different.specialized, address),
        )
        by_output, by_weights = (
            localize(pair, PROMPTS, ANCHOR, units=address, method=method) for method in ("activation", "exact")
        )
        gap = by_weights.gap
        torch.testing.assert_close(by_output.per_prompt, by_weights.per_prompt, rtol=0, atol=1e-10, msg=address)
        torch.testing.assert_close(by_output.per_prompt[0], gap, rtol=0, atol=1e-10, msg=address)


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox", "opt", "qwen3-moe"])
def test_the_first_sublayers_outputs_are_worth_their_weights_on_an_equal_stream(shape: str) -> None:
    different = pair_of(shape)
    equal = "{embed,L0.norm.attn,L0.norm.mlp}"
    base = flow_oracle.transplanted(different.base, different.specialized, equal)
    pair = ModelPair(base=base, specialized=different.specialized)
    units = "L0.attn,L0.KV0,L0.H1.q" + (",L0.mlp" if shape == "gpt-neox" else "")  # its MLP takes what attention takes
    found = [localize(pair, PROMPTS, ANCHOR, units=units, method=method) for method in ("activation", "exact")]
    torch.testing.assert_close(found[0].per_prompt, found[1].per_prompt, rtol=0, atol=1e-10)
    assert float(found[0].per_prompt.abs().min()) > 0


@pytest.mark.parametrize("at", ["all", "readouts"])
@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox", "mixtral"])
def test_all_outputs_together_close_the_whole_gap(shape: str, at: str) -> None:
    pair = pair_of(shape)
    effects = localize(pair, PROMPTS, ANCHOR, units="{embed,L0,L1}", method="activation", at=at)
    torch.testing.assert_close(effects.per_prompt[0], effects.gap, rtol=0, atol=1e-10)


def test_outputs_that_do_not_differ_change_nothing() -> None:
    different = pair_of("llama-gqa")
    specialized = flow_oracle.transplanted(different.base, different.specialized, "L1.mlp")
    pair = ModelPair(base=different.base, specialized=specialized)
    effects = localize(pair, PROMPTS, ANCHOR, units="embed,attns,mlps,heads,kvs,neurons", method="activation")
    same = torch.tensor([one.layer != 1 or one.unit not in ("mlps", "neurons") for one in effects.components])
    assert float(effects.per_prompt[same].abs().max()) < 1e-12
    assert float(effects.per_prompt[~same].abs().max()) > 1e-3


def test_at_the_last_layer_read_at_one_token_both_places_are_worth_the_same_but_for_keys_and_values() -> None:
    pair = pair_of("qwen2-gqa")
    anchor = Anchor(layer=3, direction=ANCHOR.direction, positions=(-1,))
    units = "L2,L2.attn,L2.mlp,L2.H0,L2.H1.q,L2.H3.o,L2.N4,L2.KV1,L1.H0"
    everywhere, there = (
        localize(pair, PROMPTS, anchor, units=units, method="activation", at=at) for at in ("all", "readouts")
    )
    same = torch.tensor([str(one) not in ("L2.KV1", "L1.H0") for one in there.components])
    torch.testing.assert_close(there.per_prompt[same], everywhere.per_prompt[same], rtol=0, atol=1e-10)
    assert float((there.per_prompt - everywhere.per_prompt)[~same].abs().min()) > 1e-6


@pytest.mark.parametrize("batch_tokens", [1, 30, 100_000])
def test_any_batch_size_and_order_of_prompts_gives_the_same_numbers(batch_tokens: int) -> None:
    pair = pair_of("gemma2")
    options = {"units": "embed,heads,kvs,mlps,L0.N3", "method": "activation", "at": "readouts"}
    expected = localize(pair, PROMPTS, ANCHOR, **options).per_prompt
    found = localize(pair, PROMPTS, ANCHOR, batch_tokens=batch_tokens, **options).per_prompt
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    order = [2, 0, 1]
    shuffled = ContrastPrompts(tuple(PROMPTS.rows[place] for place in order))
    found = localize(pair, shuffled, ANCHOR, batch_tokens=batch_tokens, **options).per_prompt
    torch.testing.assert_close(found, expected[:, order], rtol=0, atol=1e-10)


def test_both_models_stay_as_they_were() -> None:
    pair = build_pair("olmoe")
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models_of(pair)]
    localize(pair, PROMPTS, ANCHOR, units=WITH_OUTPUTS, method="activation")
    for model, kept in zip(models_of(pair), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def models_of(pair: ModelPair) -> tuple[torch.nn.Module, torch.nn.Module]:
    return pair.base, pair.specialized


@pytest.mark.parametrize("unit", ["norms", "rests"])
def test_components_without_an_output_are_refused(unit: str) -> None:
    pair = build_pair("llama-gqa")
    assert components(pair.architecture, unit)
    with pytest.raises(WeightpatchError, match=r"L\d\.|norms|rests"):
        localize(pair, PROMPTS, ANCHOR, units=unit, method="activation")


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(WeightpatchError, match=r"all.*readouts"):
        localize(build_pair("gpt2"), PROMPTS, ANCHOR, units="heads", method="activation", at="last")  # type: ignore[arg-type]
