"""The engines against each other, against hooks written by hand, and against truths that hold for any weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import SHAPES, build_model, build_pair, some_of_every_unit
from weightpatch import Anchor, ContrastPrompts, ModelPair, fit_anchor, localize, patched
from weightpatch.component import LEVELS, UNITS, Component, components, partition
from weightpatch.engine import suffix, swap
from weightpatch.errors import AnchorError, ArchitectureError, ComponentError
from weightpatch.localization import plan, sweep
from weightpatch.residuals import evaluating

FAMILIES = sorted(SHAPES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_anchor(layer: int, **fields: object) -> Anchor:
    generator = torch.Generator().manual_seed(layer)
    return Anchor(layer=layer, direction=torch.randn(24, generator=generator), **fields)  # type: ignore[arg-type]


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed


@pytest.mark.parametrize("readout", ["cosine", "contrast"])
def test_engines_agree_on_other_readouts(readout: str, token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    anchor = make_anchor(2, readout=readout)
    fast, slow = (localize(pair, token_prompts, anchor, units="heads,kvs,mlps", engine=e) for e in ("suffix", "swap"))
    torch.testing.assert_close(fast.per_prompt, slow.per_prompt, rtol=0, atol=1e-12)
    plain = localize(pair, token_prompts, make_anchor(2), units="heads,kvs,mlps")
    assert not torch.allclose(fast.per_prompt, plain.per_prompt)


def test_a_head_patched_by_hand_with_hooks_gives_the_engines_effect(token_prompts: ContrastPrompts) -> None:
    """A third opinion that uses nothing of this package: slices written out, one prompt at a time."""
    pair = build_pair("llama-gqa", dtype=torch.float64)
    anchor = make_anchor(3)
    effects = localize(pair, token_prompts, anchor, units="L1.H2")
    unit_direction = anchor.direction

    def read(ids: tuple[int, ...]) -> float:
        caught: list[Tensor] = []
        handle = pair.base.model.norm.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
        with torch.no_grad():
            pair.base(input_ids=torch.tensor([ids]))
        handle.remove()
        return float(caught[0][0, -1] @ unit_direction)

    ours, theirs = (model.model.layers[1].self_attn for model in (pair.base, pair.specialized))
    before = state(pair.base)
    by_hand = []
    for row in token_prompts:
        plain = read(row.with_instruction)
        with torch.no_grad():
            ours.q_proj.weight[12:18] = theirs.q_proj.weight[12:18]
            ours.q_proj.bias[12:18] = theirs.q_proj.bias[12:18]
            ours.o_proj.weight[:, 12:18] = theirs.o_proj.weight[:, 12:18]
        by_hand.append(read(row.with_instruction) - plain)
        pair.base.load_state_dict(before)
    torch.testing.assert_close(effects.per_prompt[0], torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", FAMILIES)
def test_patching_a_whole_partition_gives_the_specialized_logits_bit_for_bit(shape: str, level: str) -> None:
    pair = build_pair(shape)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    before = state(pair.base)
    with torch.no_grad():
        expected, base = (model(input_ids=tokens).logits for model in (pair.specialized, pair.base))
        with patched(pair, partition(pair.architecture, level)) as model:
            assert torch.equal(model(input_ids=tokens).logits, expected)
        assert torch.equal(pair.base(input_ids=tokens).logits, base)
    assert not torch.equal(base, expected)
    assert_unchanged(pair.base, before)


def test_patching_nothing_is_the_base_and_both_directions_meet() -> None:
    pair = build_pair("llama-gqa")
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        base = pair.base(input_ids=tokens).logits
        with patched(pair, []) as model:
            assert torch.equal(model(input_ids=tokens).logits, base)
        with patched(pair, partition(pair.architecture, "heads"), recipient="specialized") as model:
            assert model is pair.specialized
            assert torch.equal(model(input_ids=tokens).logits, base)


def test_weights_come_back_bit_for_bit_when_the_body_raises() -> None:
    pair = build_pair("gpt2")
    before = state(pair.base)
    with pytest.raises(KeyError), patched(pair, "heads,blocks,L0.H1,embed"):
        raise KeyError
    assert_unchanged(pair.base, before)


def test_an_unknown_recipient_is_refused_instead_of_patching_the_other_model() -> None:
    with (
        pytest.raises(ComponentError, match="unknown recipient 'bsae'"),
        patched(build_pair("gpt2"), "L0", recipient="bsae"),  # type: ignore[arg-type]
    ):
        pytest.fail("it was patched")


def test_a_sweep_left_half_way_leaves_the_callers_modes_alone(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("gpt2")
    pair.base.train()
    anchor = make_anchor(2)
    steps = sweep(pair, token_prompts, anchor, plan(pair, anchor, "heads")[0])
    next(steps)
    assert pair.base.training
    assert torch.is_grad_enabled()
    with torch.no_grad():
        del steps
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_hooks_on_whole_layers_act_in_both_engines(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    plain = localize(pair, token_prompts, make_anchor(2), units="heads")
    handle = pair.base.model.layers[0].register_forward_hook(lambda _module, _args, output: output * 1.5)
    hooked = [localize(pair, token_prompts, make_anchor(2), units="heads", engine=e) for e in ("suffix", "swap")]
    handle.remove()
    torch.testing.assert_close(hooked[0].per_prompt, hooked[1].per_prompt, rtol=0, atol=1e-12)
    assert not torch.allclose(hooked[0].per_prompt, plain.per_prompt)


def test_attention_that_takes_no_mask_of_ours_is_refused(token_prompts: ContrastPrompts) -> None:
    models = [build_model("llama-gqa", seed=seed) for seed in (1, 2)]
    models[0].config._attn_implementation = "flash_attention_2"
    pair = ModelPair(base=models[0], specialized=models[1])
    with pytest.raises(ArchitectureError, match=r"eager and sdpa.*loaded with flash_attention_2.*engine=\"swap\""):
        localize(pair, token_prompts, make_anchor(2), units="heads")


def test_localize_leaves_both_models_as_they_were(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("gpt2")
    pair.base.train()
    before, specialized = state(pair.base), state(pair.specialized)
    first, second = (localize(pair, token_prompts, make_anchor(2), units="heads", engine=e) for e in ("suffix", "swap"))
    torch.testing.assert_close(first.per_prompt, second.per_prompt, rtol=0, atol=1e-4)
    assert pair.base.training
    assert pair.base.transformer.h[0].attn.attn_dropout.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.base.modules())
    assert_unchanged(pair.base, before)
    assert_unchanged(pair.specialized, specialized)


@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 100_000])
def test_any_batch_size_gives_the_same_numbers(batch_tokens: int, token_prompts: ContrastPrompts) -> None:
    pair = build_pair("mistral-gqa", dtype=torch.float64)
    expected = localize(pair, token_prompts, make_anchor(3), units="heads,kvs,norms,neurons", batch_tokens=64)
    found = localize(pair, token_prompts, make_anchor(3), units="heads,kvs,norms,neurons", batch_tokens=batch_tokens)
    torch.testing.assert_close(found.per_prompt, expected.per_prompt, rtol=0, atol=1e-12)


def test_any_order_of_prompts_and_a_single_prompt_give_the_same_numbers(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("qwen2-gqa", dtype=torch.float64)
    expected = localize(pair, token_prompts, make_anchor(2), units="heads,mlps").per_prompt
    order = [4, 0, 5, 2, 1, 3]
    shuffled = ContrastPrompts(tuple(token_prompts.rows[place] for place in order))
    found = localize(pair, shuffled, make_anchor(2), units="heads,mlps").per_prompt
    torch.testing.assert_close(found, expected[:, order], rtol=0, atol=1e-12)
    for place, row in enumerate(token_prompts):
        alone = localize(pair, ContrastPrompts((row,)), make_anchor(2), units="heads,mlps").per_prompt
        torch.testing.assert_close(alone[:, 0], expected[:, place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [shape for shape in FAMILIES if shape not in ("mistral-gqa", "gemma2-softcap")])
def test_transformers_own_padding_on_either_side_gives_the_same_readouts(
    shape: str, side: str, token_prompts: ContrastPrompts
) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    anchor = make_anchor(3)
    token_ids = [list(row.with_instruction) for row in token_prompts]
    width = max(map(len, token_ids))
    padding = [[0] * (width - len(ids)) for ids in token_ids]
    tokens = [pad + ids if side == "left" else ids + pad for pad, ids in zip(padding, token_ids, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * len(pad)
        for pad, ids in zip(padding, token_ids, strict=True)
    ]
    where = torch.tensor([width - 1 if side == "left" else len(ids) - 1 for ids in token_ids])
    caught: list[Tensor] = []
    norm = pair.base.get_submodule(pair.architecture.family.norm)
    handle = norm.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    attention = torch.tensor(mask)
    with torch.no_grad():
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        pair.base(input_ids=torch.tensor(tokens), attention_mask=attention, position_ids=positions)
    handle.remove()
    padded = caught[0][torch.arange(len(token_ids)), where] @ anchor.direction
    torch.testing.assert_close(localize(pair, token_prompts, anchor, units="L0").base, padded, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        swap.readouts(pair.base, token_ids, anchor, batch_tokens=1000), padded, rtol=0, atol=1e-12
    )


def test_identical_layers_have_no_effect_at_all(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(
            pair.base.model.layers[0].parameters(), pair.specialized.model.layers[0].parameters(), strict=True
        ):
            theirs.copy_(ours)
    effects = localize(pair, token_prompts, make_anchor(3), units="blocks,heads,kvs,neurons")
    untouched = torch.tensor([component.layer == 0 for component in effects.components])
    assert float(effects.per_prompt[untouched].abs().max()) < 1e-12
    assert float(effects.per_prompt[~untouched].abs().min(dim=0).values.max()) > 0


def test_components_at_or_past_the_anchor_are_named_instead_of_measured(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa")
    effects = localize(pair, token_prompts, make_anchor(1), units="blocks,ends")
    assert [str(c) for c in effects.components] == ["embed", "L0"]
    assert [str(c) for c in effects.past_anchor] == ["norm", "unembed", "L1", "L2"]
    with pytest.raises(AnchorError, match="nothing to measure: all 3 components of blocks lie at or past the anchor"):
        localize(pair, token_prompts, make_anchor(0), units="blocks")
    only = localize(pair, token_prompts, make_anchor(0), units="embed")
    torch.testing.assert_close(only.per_prompt[0], only.gap, rtol=0, atol=1e-5)


def test_patching_all_blocks_and_the_embedding_closes_the_whole_gap(token_prompts: ContrastPrompts) -> None:
    pair: ModelPair = build_pair("llama-gqa", dtype=torch.float64)
    effects = localize(pair, token_prompts, make_anchor(1), units="embed,L0")
    with evaluating(pair.base), patched(pair, "embed,L0") as model:
        token_ids = [row.with_instruction for row in token_prompts]
        together = swap.readouts(model, token_ids, make_anchor(1), batch_tokens=1000)
    torch.testing.assert_close(together - effects.base, effects.gap, rtol=0, atol=1e-12)


def test_an_unknown_engine_or_method_is_refused(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa")
    with pytest.raises(ComponentError, match=r"unknown engine 'slow'\. Choose one of suffix, swap"):
        localize(pair, token_prompts, make_anchor(1), engine="slow")  # type: ignore[arg-type]
    with pytest.raises(ComponentError, match="unknown method"):
        localize(pair, token_prompts, make_anchor(1), method="guess")  # type: ignore[arg-type]


def test_the_table_names_every_component_with_its_recovery(token_prompts: ContrastPrompts) -> None:
    pair = build_pair("llama-gqa")
    anchor = make_anchor(3)
    effects = localize(pair, token_prompts, anchor, units="heads")
    sign = 1.0 if float(effects.gap.mean()) > 0 else -1.0
    steady = effects.gap.new_full(effects.gap.shape, 4.0 * sign)
    table = replace(effects, specialized=effects.base + steady).table()
    assert list(table.columns) == [
        "component", "unit", "layer", "effect", "recovery", "ci_low", "ci_high", "mean_of_ratios",
    ]  # fmt: skip
    assert list(table["component"]) == [str(component) for component in effects.components]
    expected = effects.per_prompt.mean(dim=1) / (4.0 * sign)
    torch.testing.assert_close(torch.tensor(table["recovery"].to_numpy()), expected)
    assert bool(((table["ci_low"] <= table["recovery"]) & (table["recovery"] <= table["ci_high"])).all())
    assert Component.parse(table["component"][0]).unit == "heads"


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_on_the_bundled_pair_suffix_equals_swap_and_a_partition_gives_the_specialized_logits(
    dtype: torch.dtype,
) -> None:
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized", dtype=dtype)
    prompts = ContrastPrompts.load("instructions:sections", n_queries=12)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=7)
    measured = ContrastPrompts(prompts.split("localize").rows[:4])
    units = [*some_of_every_unit(pair, below=7), "L0.N0", "L6.N383"]
    fast, slow = (localize(pair, measured, anchor, units=units, engine=e) for e in ("suffix", "swap"))
    assert {component.unit for component in slow.components} == set(UNITS) - {
        "rests",
        "experts",
        "routers",
    }  # no biases
    gap = float(slow.gap.mean())
    assert float(slow.per_prompt.max()) > 0.1 * gap
    torch.testing.assert_close(fast.per_prompt, slow.per_prompt, rtol=0, atol=TOLERANCE[dtype] * gap)
    tokens = torch.tensor([prompts.tokenize(pair.tokenizer).with_instruction[0]])
    with torch.no_grad():
        expected = pair.specialized(input_ids=tokens).logits
        for level in LEVELS:
            with patched(pair, partition(pair.architecture, level)) as model:
                assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox", "qwen3-moe"])
def test_sets_over_several_layers_are_patched_jointly_by_both_engines(shape: str) -> None:
    pair = build_pair(shape, dtype=torch.float64)
    neuron = "L0.E1.N2" if pair.architecture.n_experts_of(0) else "L0.N2"
    named = f"{{{neuron},L0.H1}},{{L1.mlp,L0.KV0}},{{embed,L1.attn,L0.mlp}},{{L0.attn,L1.H0,L2.mlp}},{{L1.H0,L1.mlp}}"
    chosen = components(pair.architecture, named)
    anchor = Anchor(layer=2, direction=torch.randn(24, generator=torch.Generator().manual_seed(9)), positions=(-1, 1))
    prompts = [[7, 3, 55, 20, 41, 8, 19], [7, 3, 55, 2, 2, 30, 11, 60, 5]]
    fast, written = (
        torch.stack([one.readout - one.base for one in found])
        for found in (
            engine.sweep(pair, prompts, anchor, chosen, batch_tokens=40, skip=frozenset()) for engine in (suffix, swap)
        )
    )
    assert float(written.abs().min()) > 0
    torch.testing.assert_close(fast, written, rtol=0, atol=1e-12 * float(written.abs().max()))
