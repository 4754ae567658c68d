"""Total effects and direct edges against hooks on whole models, and against what must hold for any weights."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import flow_oracle
import hook_oracle
from conftest import CORE, EVERY_SHAPE, SHAPES, build_model, some_of_every_unit
from flow_cases import mean_gap, pair_of
from flow_oracle import Case
from weightpatch import Anchor, ContrastPrompts, ModelPair, localize
from weightpatch.component import Component, components
from weightpatch.errors import WeightpatchError
from weightpatch.paths import direct_effects

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
DIRECTION = torch.randn(24, generator=torch.Generator().manual_seed(9))
ANCHOR = Anchor(layer=2, direction=DIRECTION, positions=(-1, 1))
LATE = Anchor(layer=3, direction=DIRECTION, positions=(-1, 1))
TOKEN_IDS = [[7, 3, 55, 2, 2, 30, 11, 60, 5], [7, 3, 55, 2]]
"""The second is the start of the first: its last token is read, the same token of the first is not."""
PROMPTS = ContrastPrompts.from_token_ids(
    with_instruction=TOKEN_IDS, without_instruction=[[4, 9, 22, 8, 1, 2, 3], [7, 3, 9]]
)
METHODS = {"exact": "weights", "activation": "activation"}
"""The engine's word and the oracle's."""
PARALLEL = "gpt-neox"
SOME_FAMILIES = ["llama-gqa", "gemma2", "gpt2", PARALLEL, "qwen3-moe"]


@cache
def case_of(shape: str, dtype: torch.dtype = torch.float64, layer: int = ANCHOR.layer) -> Case:
    pair = pair_of(shape, dtype)
    where = {"layer": layer, "positions": ANCHOR.positions, "direction": ANCHOR.direction}
    return Case(base=pair.base, specialized=pair.specialized, token_ids=TOKEN_IDS, **where)


def named(cases: list[tuple[str, torch.dtype, str]]) -> list[Any]:
    """Cases with a name; those of shapes beyond the core are slow."""
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{str(case[1]).removeprefix('torch.')}-{case[2]}",
            marks=() if case[0] in CORE else pytest.mark.slow,
        )
        for case in cases
    ]


def one_of_every_unit(shape: str, *, method: str, below: int = ANCHOR.layer) -> list[str]:
    """Of every unit that the method knows, one component of every layer; other ones for other families."""
    drawn: dict[tuple[str, int | None], list[Component]] = {}
    for one in some_of_every_unit(pair_of(shape), below=below):
        if method != "activation" or one.unit not in ("norms", "rests"):
            drawn.setdefault((one.unit, one.layer), []).append(one)
    generator = random.Random(shape)
    return [str(generator.choice(group)) for group in drawn.values()]


def suppliers_of(shape: str, *, method: str) -> list[str]:
    """One component of every unit that the method knows, of one layer or another below the anchor."""
    drawn = one_of_every_unit(shape, method=method)
    random.Random(f"{shape} {method}").shuffle(drawn)
    return list({Component.parse(address).unit: address for address in drawn}.values())


def sets_of(shape: str) -> list[str]:
    neuron = "L0.E1.N2" if pair_of(shape).architecture.n_experts_of(0) else "L0.N2"
    return [f"{{L0.H1,{neuron}}}", "{L0.H2.o,L0.KV0,L1.mlp}", "{embed,L1.attn}", "{L0,L1.H1}"]


def every_target(shape: str, *, below: int) -> list[str]:
    """Targets whose contributions make up the stream that enters a layer: an MLP's own rest is in the MLP."""
    named = [one for one in components(pair_of(shape).architecture, "embed,heads,mlps") if (one.layer or 0) < below]
    return [*map(str, named), *(rest for rest in rests_of(shape, below=below) if rest.endswith(".attn.rest"))]


def rests_of(shape: str, *, below: int) -> list[str]:
    try:
        rests = components(pair_of(shape).architecture, "rests")
    except WeightpatchError:  # it has none
        return []
    return [str(one) for one in rests if one.layer is not None and one.layer < below]


def neurons_of(shape: str, *, below: int) -> list[str]:
    """One of every layer with a plain MLP."""
    architecture = pair_of(shape).architecture
    return [f"L{layer}.N3" for layer in range(below) if not architecture.n_experts_of(layer)]


def kinds_of_targets(shape: str) -> list[str]:
    named = ["embed", "L0", "L0.H1", "L0.attn", "L0.mlp", "L1", "L1.H0", "L1.H3", "L1.attn", "L1.mlp"]
    return [*named, *neurons_of(shape, below=2), *rests_of(shape, below=2)]


# ---------------------------------------------------------------------------------------------------------------------
# The oracle by itself.


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox", "granite", "qwen3-moe"])
def test_in_the_oracle_an_edge_to_the_anchor_and_later_changes_make_the_total_effect(shape: str, method: str) -> None:
    case = case_of(shape)
    for supplier, later in (("L0.mlp", ["L1.attn", "L1.mlp"]), ("L0.H1", ["L0.mlp", "L1.attn", "L1.mlp"])):
        direct = flow_oracle.direct_edges(case, supplier, "anchor", method=method)
        changes = flow_oracle.total_effects(case, supplier, later, method=method).sum(dim=0)
        total = flow_oracle.patched_readouts(case, supplier, method=method) - flow_oracle.readouts(case)
        torch.testing.assert_close(direct + changes, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt-neox-serial", "granite", "olmo2", "olmoe", "opt"])
def test_in_the_oracle_an_edge_to_the_next_sublayer_is_the_total_effect(shape: str, method: str) -> None:
    case = case_of(shape)
    for supplier, targets in (("L0.H2", ["L0.mlp"]), ("L0.mlp", ["L1.attn", "L1.H3"])):
        total = flow_oracle.total_effects(case, supplier, targets, method=method)
        direct = [flow_oracle.direct_edges(case, supplier, target, method=method) for target in targets]
        torch.testing.assert_close(torch.stack(direct), total, rtol=0, atol=1e-12)


def test_in_the_oracle_uniform_attention_is_supplied_through_its_values_alone() -> None:
    base = build_model("llama-mha", seed=1, dtype=torch.float64)
    for projection in (base.base_model.layers[1].self_attn.q_proj, base.base_model.layers[1].self_attn.k_proj):
        torch.nn.init.zeros_(projection.weight)
    specialized, where = pair_of("llama-mha").specialized, {"layer": 2, "positions": (-1,), "direction": DIRECTION}
    case = Case(base=base, specialized=specialized, token_ids=TOKEN_IDS, **where)
    through = {
        receives: flow_oracle.direct_edges(case, "L0.mlp", "L1.H2", receives=receives, method="weights")
        for receives in ("all", "q", "k", "v")
    }
    torch.testing.assert_close(through["v"], through["all"], rtol=0, atol=1e-12)
    assert float(through["q"].abs().max() + through["k"].abs().max()) < 1e-12
    assert float(through["v"].abs().min()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Total effects.


@DTYPES
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_changes_of_all_contributions_add_up_to_the_effect(shape: str, dtype: torch.dtype) -> None:
    targets = every_target(shape, below=ANCHOR.layer)
    for method in ("exact", "activation", "necessity") if dtype == torch.float64 else ("exact",):
        suppliers = [*suppliers_of(shape, method=method), *sets_of(shape)]
        effects = localize(
            pair_of(shape, dtype), PROMPTS, ANCHOR, units=",".join(suppliers), targets=",".join(targets), method=method
        )
        assert {str(one) for one in effects.components} == set(suppliers)
        assert sorted(map(str, effects.targets)) == sorted(targets)
        assert effects.per_target.shape == (len(suppliers), len(targets), len(TOKEN_IDS))
        assert effects.per_target.dtype == torch.float64
        gap = float(effects.gap.abs().mean())
        added = effects.per_target.sum(dim=1)
        torch.testing.assert_close(added, effects.per_prompt, rtol=0, atol=TOLERANCE[dtype] * gap)


TOTAL_CASES = [
    *[(shape, torch.float64, method) for shape in SHAPES for method in METHODS],
    *[(shape, torch.float64, "necessity") for shape in SOME_FAMILIES],
    *[(shape, torch.float32, "exact") for shape in SOME_FAMILIES],
]


@pytest.mark.parametrize(("shape", "dtype", "method"), named(TOTAL_CASES))
def test_total_effects_equal_those_of_hooks_on_whole_models(shape: str, dtype: torch.dtype, method: str) -> None:
    case, targets = case_of(shape, dtype), kinds_of_targets(shape)
    suppliers = [*suppliers_of(shape, method=method)[:6], *sets_of(shape)[:: 2 if method == "exact" else 1]]
    effects = localize(
        pair_of(shape, dtype), PROMPTS, ANCHOR, units=",".join(suppliers), targets=",".join(targets), method=method
    )
    named = [str(target) for target in effects.targets]
    assert sorted(named) == sorted(targets)
    layers = [-1 if target.layer is None else target.layer for target in effects.targets]
    assert layers == sorted(layers)
    given, sign = (case.exchanged(), -1.0) if method == "necessity" else (case, 1.0)
    word = METHODS.get(method, "weights")
    truth = [sign * flow_oracle.total_effects(given, str(one), named, method=word) for one in effects.components]
    gap = mean_gap(case)
    assert float(torch.stack(truth).abs().max()) > 0.05 * gap
    torch.testing.assert_close(effects.per_target, torch.stack(truth), rtol=0, atol=TOLERANCE[dtype] * gap)


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "mixtral"])
def test_total_effects_of_outputs_clamped_at_the_readouts_equal_those_of_hooks(shape: str) -> None:
    case = case_of(shape)
    units = ",".join([*one_of_every_unit(shape, method="activation"), *sets_of(shape)])
    options = {"targets": ",".join(kinds_of_targets(shape)), "method": "activation", "at": "readouts"}
    effects = localize(pair_of(shape), PROMPTS, ANCHOR, units=units, **options)
    named = [str(target) for target in effects.targets]
    where = {"method": "activation", "at": "readouts"}
    truth = [flow_oracle.total_effects(case, str(one), named, **where) for one in effects.components]
    torch.testing.assert_close(effects.per_target, torch.stack(truth), rtol=0, atol=1e-10 * mean_gap(case))


def test_neurons_of_experts_are_refused_as_targets_and_the_message_says_what_can_be_one() -> None:
    with pytest.raises(WeightpatchError, match=r"L0\.E2\.N1.*neurons of plain MLPs"):
        localize(pair_of("mixtral"), PROMPTS, ANCHOR, units="L0.H1", targets="L0.E2.N1")


@pytest.mark.parametrize("shape", ["llama-gqa", "olmo2"])
def test_total_effects_at_an_anchor_behind_the_last_layer_add_up(shape: str) -> None:
    targets = ",".join(every_target(shape, below=3))
    effects = localize(pair_of(shape), PROMPTS, LATE, units="embed,attns,L2.H1,L1.KV0", targets=targets)
    gap = float(effects.gap.abs().mean())
    torch.testing.assert_close(effects.per_target.sum(dim=1), effects.per_prompt, rtol=0, atol=1e-10 * gap)


@pytest.mark.parametrize("method", ["exact", "activation", "necessity"])
def test_contrasts_are_differences_of_what_the_two_inputs_give(method: str) -> None:
    rows = [TOKEN_IDS, [[4, 9, 22, 8, 1, 2, 3], [7, 3, 9]]]
    options = {"units": "embed,heads,kvs,mlps", "targets": "heads,mlps,embed", "method": method}
    apart = [
        localize(
            pair_of("olmo2"),
            ContrastPrompts.from_token_ids(with_instruction=ids, without_instruction=rows[0]),
            ANCHOR,
            **options,
        )
        for ids in rows
    ]
    contrast = Anchor(layer=2, direction=DIRECTION, positions=(-1, 1), readout="contrast")
    together = localize(pair_of("olmo2"), PROMPTS, contrast, **options)
    for name in ("per_prompt", "per_target"):
        expected = getattr(apart[0], name) - getattr(apart[1], name)
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_any_batch_size_gives_the_same_total_effects(method: str) -> None:
    options = {"units": "embed,heads,kvs,mlps,L0.N3", "targets": "heads,L1.N2,mlps", "method": method}
    expected = localize(pair_of("gemma2"), PROMPTS, ANCHOR, **options).per_target
    for batch_tokens in (1, 30):
        found = localize(pair_of("gemma2"), PROMPTS, ANCHOR, batch_tokens=batch_tokens, **options).per_target
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_targets_change_nothing_in_what_is_measured_without_them() -> None:
    plain, aimed = (
        localize(pair_of("qwen3"), PROMPTS, ANCHOR, units="heads,mlps", targets=targets)
        for targets in ("", "heads,L1.mlp")
    )
    torch.testing.assert_close(aimed.per_prompt, plain.per_prompt, rtol=0, atol=1e-12)
    assert plain.targets == ()


def test_nothing_in_front_of_a_supplier_changes() -> None:
    effects = localize(
        pair_of("llama-gqa"), PROMPTS, ANCHOR, units="L1.H2,L1.mlp", targets="embed,L0.H0,L0.mlp,L1.attn"
    )
    by_address = {str(one): effects.per_target[place] for place, one in enumerate(effects.components)}
    before = torch.tensor([target.layer in (None, 0) for target in effects.targets])
    assert float(by_address["L1.H2"][before].abs().max()) < 1e-12
    assert float(by_address["L1.mlp"].abs().max()) < 1e-12
    assert float(by_address["L1.H2"][~before].abs().min()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Necessity.


@DTYPES
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_necessity_is_what_the_specialized_readout_loses(shape: str, dtype: torch.dtype) -> None:
    pair = pair_of(shape, dtype)
    units = ",".join(one_of_every_unit(shape, method="necessity"))
    effects = localize(pair, PROMPTS, ANCHOR, units=units, method="necessity")
    where = {"layer": ANCHOR.layer, "positions": ANCHOR.positions, "direction": ANCHOR.direction}
    base, specialized = (hook_oracle.readouts(model, TOKEN_IDS, **where) for model in (pair.base, pair.specialized))
    left = [
        hook_oracle.patched_readouts(pair.specialized, pair.base, TOKEN_IDS, str(one), **where)
        for one in effects.components
    ]
    atol = TOLERANCE[dtype] * float((specialized - base).abs().mean())
    torch.testing.assert_close(effects.per_prompt, specialized - torch.stack(left), rtol=0, atol=atol)
    torch.testing.assert_close(effects.gap, specialized - base, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# Direct edges.

EDGE_CASES = [
    *[(shape, torch.float64, method) for shape in SHAPES for method in METHODS],
    *[(shape, torch.float32, "exact") for shape in SOME_FAMILIES],
]
AIMS = {
    "exact": [("L2.H0", "q"), ("L2.H3", "k"), ("L1.H2", "v"), ("L2.mlp", "all")],
    "activation": [("L2.attn", "all")],
}


@pytest.mark.parametrize(("shape", "dtype", "method"), named(EDGE_CASES))
def test_direct_edges_equal_those_of_hooks_on_whole_models(shape: str, dtype: torch.dtype, method: str) -> None:
    case, suppliers = case_of(shape, dtype, LATE.layer), suppliers_of(shape, method=method)[:5]
    gap = mean_gap(case)
    aims = [*AIMS[method], *((neuron, "all") for neuron in neurons_of(shape, below=LATE.layer)[-1:])]
    for target, receives in aims if dtype == torch.float64 else aims[::2]:
        options = {"target": target, "receives": receives, "method": method}
        edges = direct_effects(pair_of(shape, dtype), PROMPTS, LATE, suppliers=",".join(suppliers), **options)
        named = [str(one) for one in edges.suppliers]
        assert not [one for one in set(suppliers) - set(named) if flow_oracle.is_upstream(case, one, target)]
        where = {"receives": receives, "method": METHODS[method]}
        truth = torch.stack([flow_oracle.direct_edges(case, one, target, **where) for one in named])
        assert float(truth.abs().max()) > 1e-3 * gap
        atol = TOLERANCE[dtype] * gap
        report = f"{shape}, {method}, to {target} by {receives}, of {', '.join(named)}"
        torch.testing.assert_close(
            edges.per_prompt, truth, rtol=0, atol=atol, msg=lambda text, r=report: f"{r}\n{text}"
        )


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "opt"])
def test_only_what_is_upstream_of_a_target_supplies_it(shape: str) -> None:
    suppliers = "embed,blocks,attns,mlps,L0.H1,L1.H0,L1.KV1"
    expected = {
        "L1.H2": {"embed", "L0", "L0.attn", "L0.mlp", "L0.H1"},
        "L1.mlp": {"embed", "L0", "L0.attn", "L0.mlp", "L0.H1", "L1.attn", "L1.H0", "L1.KV1"},
        "L0.mlp": {"embed", "L0.attn", "L0.H1"},
        "anchor": {"embed", "L0", "L1", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp", "L0.H1", "L1.H0", "L1.KV1"},
    }
    for target, upstream in expected.items():
        edges = direct_effects(pair_of(shape), PROMPTS, ANCHOR, suppliers=suppliers, target=target)
        assert {str(one) for one in edges.suppliers} == upstream
        assert edges.per_prompt.shape == (len(upstream), len(TOKEN_IDS))


def test_attention_beside_an_mlp_does_not_supply_it() -> None:
    edges = direct_effects(pair_of(PARALLEL), PROMPTS, ANCHOR, suppliers="heads,L0.mlp", target="L1.mlp")
    beside = torch.tensor([one.layer == 1 for one in edges.suppliers])
    assert not edges.per_prompt[beside].any()
    assert float(edges.per_prompt[~beside].abs().min()) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_an_edge_to_the_next_sublayer_is_the_total_effect(shape: str, method: str) -> None:
    targets = ["L1.attn", "L1.H2"] if shape == PARALLEL else ["L0.mlp"]
    suppliers = "L0,L0.mlp" if shape == PARALLEL else "L0.attn,L0.H2,L0.H1.q,L0.KV0"
    total = localize(pair_of(shape), PROMPTS, ANCHOR, units=suppliers, targets=",".join(targets), method=method)
    gap = float(total.gap.abs().mean())
    for place, target in enumerate(total.targets):
        direct = direct_effects(pair_of(shape), PROMPTS, ANCHOR, suppliers=suppliers, target=str(target), method=method)
        expected = [total.per_target[total.components.index(supplier), place] for supplier in direct.suppliers]
        torch.testing.assert_close(direct.per_prompt, torch.stack(expected), rtol=0, atol=1e-10 * gap)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_an_edge_to_the_anchor_is_the_change_of_the_suppliers_own_module(shape: str, method: str) -> None:
    modules = {"L0.H1": "L0.attn", "L1.KV0": "L1.attn", "L0.attn": "L0.attn", "L1.mlp": "L1.mlp", "embed": "embed"}
    units = ",".join(modules)
    total = localize(pair_of(shape), PROMPTS, ANCHOR, units=units, targets="embed,attns,mlps", method=method)
    edges = direct_effects(pair_of(shape), PROMPTS, ANCHOR, suppliers=units, target="anchor", method=method)
    places = {str(target): place for place, target in enumerate(total.targets)}
    own = [
        total.per_target[total.components.index(supplier), places[modules[str(supplier)]]]
        for supplier in edges.suppliers
    ]
    atol = 1e-10 * float(total.gap.abs().mean())
    torch.testing.assert_close(edges.per_prompt, torch.stack(own), rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_an_attention_is_supplied_with_what_its_heads_are(method: str) -> None:
    whole, *heads = (
        direct_effects(
            pair_of("qwen2-gqa"), PROMPTS, ANCHOR, suppliers="embed,heads,L0.mlp", target=target, method=method
        ).per_prompt
        for target in ("L1.attn", *(f"L1.H{head}" for head in range(4)))
    )
    torch.testing.assert_close(torch.stack(heads).sum(dim=0), whole, rtol=0, atol=1e-10)


def test_suppliers_that_do_not_differ_supply_nothing() -> None:
    different = pair_of("gpt2")
    one = flow_oracle.transplanted(different.base, different.specialized, "L0.H2")
    pair = ModelPair(base=different.base, specialized=one)
    edges = direct_effects(pair, PROMPTS, ANCHOR, suppliers="embed,heads,mlps", target="L1.mlp")
    changed = torch.tensor([str(supplier) == "L0.H2" for supplier in edges.suppliers])
    assert float(edges.per_prompt[~changed].abs().max()) < 1e-12
    assert float(edges.per_prompt[changed].abs().min()) > 0


def test_edges_of_contrasts_are_differences_of_what_the_two_inputs_give() -> None:
    rows = [TOKEN_IDS, [[4, 9, 22, 8, 1, 2, 3], [7, 3, 9]]]
    options = {"suppliers": "embed,heads,mlps", "target": "L1.H2", "receives": "k"}
    apart = [
        direct_effects(
            pair_of("gemma2"),
            ContrastPrompts.from_token_ids(with_instruction=ids, without_instruction=rows[0]),
            ANCHOR,
            **options,
        ).per_prompt
        for ids in rows
    ]
    contrast = Anchor(layer=2, direction=DIRECTION, positions=(-1, 1), readout="contrast")
    together = direct_effects(pair_of("gemma2"), PROMPTS, contrast, **options).per_prompt
    torch.testing.assert_close(together, apart[0] - apart[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", ["gemma2", "qwen3-moe"])
def test_a_streamed_pair_gives_the_same_effects_and_edges(shape: str, tmp_path: Path) -> None:
    models = [build_model(shape, seed=seed) for seed in (1, 2)]
    for name, model in zip(("base", "specialized"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    streamed = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "specialized")
    whole = ModelPair(base=models[0], specialized=models[1])
    gap = mean_gap(case_of(shape, torch.float32))
    for method in ("exact", "activation", "necessity"):
        options = {"units": ",".join(suppliers_of(shape, method=method)), "targets": "heads,mlps", "method": method}
        found, expected = (localize(pair, PROMPTS, ANCHOR, **options) for pair in (streamed, whole))
        torch.testing.assert_close(found.per_prompt, expected.per_prompt, rtol=0, atol=1e-5 * gap)
        torch.testing.assert_close(found.per_target, expected.per_target, rtol=0, atol=1e-5 * gap)
    for method in METHODS:
        options = {"suppliers": "embed,heads,L0.mlp", "target": "L1.H2", "receives": "v", "method": method}
        found, expected = (direct_effects(pair, PROMPTS, ANCHOR, **options) for pair in (streamed, whole))
        torch.testing.assert_close(found.per_prompt, expected.per_prompt, rtol=0, atol=1e-5 * gap)


@pytest.mark.parametrize("method", ["exact", "activation", "necessity"])
def test_models_left_in_training_mode_are_read_without_dropout_and_come_back_as_they_were(method: str) -> None:
    models = [build_model("gpt2", seed=seed, dtype=torch.float64) for seed in (1, 2)]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    pair, found = ModelPair(base=models[0], specialized=models[1]), []
    for training in (False, True):
        for model in models:
            model.train(training)
        total = localize(pair, PROMPTS, ANCHOR, units="heads,mlps", targets="mlps", method=method)
        found.append([total.per_prompt, total.per_target])
        if method in METHODS:
            edges = direct_effects(pair, PROMPTS, ANCHOR, suppliers="embed,heads", target="L1.H2", method=method)
            found[-1].append(edges.per_prompt)
        assert all(module.training == training for model in models for module in model.modules())
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(read, trained) for read, trained in zip(*found, strict=True))


@pytest.mark.parametrize("target", ["L1.norm.mlp", "unembed", "L7.H1", "nonsense", "heads", "L1.H0,L1.H1"])
def test_what_takes_no_edge_is_refused(target: str) -> None:
    with pytest.raises(WeightpatchError):
        direct_effects(pair_of("gpt2"), PROMPTS, ANCHOR, suppliers="embed", target=target)


@pytest.mark.parametrize("method", ["necessity", "first-order", "guess"])
def test_an_edge_by_another_method_is_refused(method: str) -> None:
    with pytest.raises(WeightpatchError, match=method):
        direct_effects(pair_of("gpt2"), PROMPTS, ANCHOR, suppliers="heads", target="L1.H0", method=method)  # type: ignore[arg-type]


def test_a_set_is_refused_as_a_supplier() -> None:
    with pytest.raises(WeightpatchError, match=r"\{L0.H1,L0.H2\}"):
        direct_effects(pair_of("gpt2"), PROMPTS, ANCHOR, suppliers="{L0.H1,L0.H2}", target="L1.mlp")


@pytest.mark.parametrize(("target", "receives"), [("L1.H0", "o"), ("L1.mlp", "q"), ("anchor", "v")])
def test_an_input_that_a_target_does_not_have_is_refused(target: str, receives: str) -> None:
    with pytest.raises(WeightpatchError, match=receives):
        direct_effects(pair_of("gpt2"), PROMPTS, ANCHOR, suppliers="heads", target=target, receives=receives)  # type: ignore[arg-type]
