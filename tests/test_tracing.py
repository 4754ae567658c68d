"""What a trace is made of: shuffled pairs, flows, estimates of activations and necessity, and the graph's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch

from conftest import build_pair
from weightpatch import Anchor, ContrastPrompts, Effects, Estimation, ModelPair, localize, trace
from weightpatch.component import Component
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.executors import Executors, find_executors
from weightpatch.flows import Flow, along_anchor, layer_calls, toward_specialized
from weightpatch.graph import Graph
from weightpatch.hierarchy import find_roles, find_suspects
from weightpatch.nulls import Plain, draw_null, measure_plain, pooled
from weightpatch.reading import inputs, reference
from weightpatch.shuffling import shuffled
from weightpatch.suppliers import TraceSettings
from wired import wired_anchor, wired_pair, wired_prompts

FAMILIES = ("llama-gqa", "gemma2", "gpt2", "gpt-neox", "olmo2", "granite", "mixtral")
each_family = pytest.mark.parametrize("shape", FAMILIES)


def anchor_at(layer: int) -> Anchor:
    direction = torch.randn(24, generator=torch.Generator().manual_seed(5))
    return Anchor(layer=layer, direction=direction, positions=(-1, -2))


def flow_of(pair: ModelPair, prompts: ContrastPrompts, *addresses: str, toward: str = "anchor") -> Flow:
    token_ids = inputs(pair, prompts, anchor_at(3))
    targets = tuple(map(Component.parse, addresses))
    calls = layer_calls(pair, token_ids, targets[0].layer or 0)
    if toward == "anchor":
        return Flow(pair=pair, targets=targets, toward=along_anchor(anchor_at(3), token_ids), calls=calls)
    return Flow(pair=pair, targets=targets, toward=toward_specialized(pair, token_ids, targets[0], calls), calls=calls)


def test_a_shuffled_pair_differs_by_the_same_numbers_at_other_places_and_always_alike() -> None:
    pair = build_pair("llama-gqa")
    null = shuffled(pair, seed=3)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        ours = pair.base.get_parameter(name).detach()
        true, moved = pair.specialized_weight(name) - ours, null.specialized_weight(name) - ours
        assert not torch.equal(true, moved)
        torch.testing.assert_close(true.flatten().sort().values, moved.flatten().sort().values, rtol=0, atol=1e-6)
        assert torch.equal(null.specialized_weight(name), shuffled(pair, seed=3).specialized_weight(name))
        assert not torch.equal(null.specialized_weight(name), shuffled(pair, seed=4).specialized_weight(name))


def test_what_does_not_differ_stays_the_base_when_the_rest_is_shuffled() -> None:
    pair = wired_pair()
    name = "model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        pair.specialized.get_parameter(name).copy_(pair.base.get_parameter(name))
    assert torch.equal(shuffled(pair).specialized_weight(name), pair.base.get_parameter(name))


@each_family
def test_a_flow_along_the_anchor_reads_what_the_matrix_says_its_targets_deliver(
    shape: str, token_prompts: ContrastPrompts
) -> None:
    pair = build_pair(shape)
    targets = ("L2.H1", "L2.H3")
    flow = flow_of(pair, token_prompts, *targets)
    units = "embed,heads,kvs,L0.mlp,L1"
    found = localize(pair, token_prompts, flow, units=units)
    truth = localize(pair, token_prompts, anchor_at(3), units=list(found.components), targets=list(targets))
    gap = float(truth.gap.abs().mean())
    torch.testing.assert_close(found.per_prompt, truth.per_target.sum(dim=1), rtol=0, atol=1e-5 * gap)
    torch.testing.assert_close(found.gap, (truth.delivered[1] - truth.delivered[0]).sum(dim=0), rtol=0, atol=1e-5 * gap)


@each_family
def test_a_flow_toward_the_specialized_write_is_one_there_and_one_with_everything_patched(
    shape: str, token_prompts: ContrastPrompts
) -> None:
    pair = build_pair(shape)
    flow = flow_of(pair, token_prompts, "L2.attn", toward="specialized")
    base, specialized = reference(pair, token_prompts, flow)
    torch.testing.assert_close(
        specialized - base, torch.ones(len(token_prompts), dtype=torch.float64), rtol=0, atol=1e-5
    )
    lower = [Component.parse(address) for address in ("embed", "L0", "L1")]
    found = localize(pair, token_prompts, flow, units=[Component.joint(lower), *lower])
    # the specialized stream enters the layer; its own weights are still the base's
    entered = localize(pair, token_prompts, flow, units=[Component.joint(lower)], method="activation")
    torch.testing.assert_close(found.per_prompt[:1], entered.per_prompt, rtol=0, atol=1e-5)


def test_a_flow_over_several_layers_is_refused(token_prompts: ContrastPrompts) -> None:
    with pytest.raises(AnchorError, match="targets of one layer"):
        flow_of(build_pair("llama-gqa"), token_prompts, "L1.H0", "L2.H1")


@pytest.mark.parametrize("shape", ["llama-gqa", "gpt2", "gpt-neox", "granite"])
def test_estimated_activations_of_the_last_layer_are_exact_where_no_norm_follows(
    shape: str, token_prompts: ContrastPrompts
) -> None:
    pair, anchor = build_pair(shape), anchor_at(2)
    units = "L1.mlp,L1.N3,L1.N7" if shape != "gpt-neox" else "L1.mlp,L1.N3,L1.H0,L1.KV1,L1.attn"
    exact = localize(pair, token_prompts, anchor, units=units, method="activation")
    estimated = localize(pair, token_prompts, anchor, units=units, method="activation", estimation=Estimation())
    gap = float(exact.gap.abs().mean())
    torch.testing.assert_close(estimated.per_prompt, exact.per_prompt, rtol=0, atol=1e-5 * gap)


def test_estimates_of_small_changes_agree_with_what_patching_gives_for_every_method() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(pair.base.parameters(), pair.specialized.parameters(), strict=True):
            theirs.copy_(ours + 1e-4 * theirs)
    prompts = ContrastPrompts.from_token_ids(
        with_instruction=[[4, 9, 2, 7], [3, 8, 1, 5, 6]], without_instruction=[[4, 9], [3, 8]]
    )
    for method in ("activation", "necessity"):
        units = "embed,blocks,attns,mlps,heads,heads.q,kvs,L0.N3"
        exact = localize(pair, prompts, anchor_at(3), units=units, method=method)
        estimated = localize(pair, prompts, anchor_at(3), units=units, method=method, estimation=Estimation())
        error = (estimated.per_prompt - exact.per_prompt).abs().max() / exact.per_prompt.abs().max()
        assert error < 0.01, method  # norms of transformers work in float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact", "estimation": Estimation()}, "exact effects are not estimated"),
        ({"method": "activation", "engine": "swap"}, 'need engine="suffix"'),
        ({"method": "activation", "estimation": Estimation(approximation="weights")}, "by outputs, not by weights"),
        ({"method": "first-order", "targets": "all"}, "an estimate has no targets"),
        ({"method": "activation", "units": "heads,norms"}, r"L0\.norm\.attn.*no output of their own"),
        ({"targets": "kvs"}, r"L0\.KV0.*cannot be a target"),
    ],
)
def test_what_cannot_be_measured_together_is_refused_with_the_reason(
    options: dict[str, object], message: str, token_prompts: ContrastPrompts
) -> None:
    with pytest.raises(ComponentError, match=message):
        localize(build_pair("llama-gqa"), token_prompts, anchor_at(3), **{"units": "heads", **options})  # type: ignore[arg-type]


def test_a_cosine_has_no_targets_and_no_trace(token_prompts: ContrastPrompts) -> None:
    pair, cosine = build_pair("llama-gqa"), replace(anchor_at(2), readout="cosine")
    with pytest.raises(AnchorError, match="only a projection"):
        localize(pair, token_prompts, cosine, targets="all")
    effects = localize(pair, token_prompts, cosine, units="L0.H0")
    with pytest.raises(AnchorError, match="no cosine"):
        trace(pair, token_prompts, cosine, effects)


@pytest.fixture(scope="module")
def wired_effects() -> Effects:
    return localize(wired_pair(), wired_prompts(), wired_anchor(), units="heads,neurons")


def test_the_null_of_a_shuffle_is_the_same_whether_it_is_drawn_alone_or_among_others(wired_effects: Effects) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    both = list(draw_null(pair, prompts, anchor, wired_effects, seeds=(1, 2)))
    (alone,) = draw_null(pair, prompts, anchor, wired_effects, seeds=(2,))
    np.testing.assert_array_equal(both[1].weights, alone.weights)
    np.testing.assert_array_equal(both[1].activation, alone.activation)
    null = pooled(both, wired_effects.components)
    n_heads = sum(one.unit == "heads" for one in wired_effects.components)
    assert (len(null.weights["heads"]), null.n_shuffles) == (2 * n_heads, 2)


def test_an_estimated_null_is_as_wide_as_a_patched_one(wired_effects: Effects) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    spread = {
        exact: np.stack([d.weights for d in draw_null(pair, prompts, anchor, wired_effects, seeds=(0, 1), exact=exact)])
        for exact in (True, False)
    }
    assert 0.5 < spread[True].std() / spread[False].std() < 2


def test_a_graph_comes_back_from_its_record_and_opens_in_networkx(wired_effects: Effects, tmp_path: Path) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    graph = trace(pair, prompts, anchor, wired_effects, settings=TraceSettings(n_rounds=1))
    assert Graph.from_record(graph.record()) == graph
    graph.save_graphml(tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml")
    assert set(read.edges) == {(edge.source, edge.target) for edge in graph.edges}
    assert read.nodes["L2.H1"]["role"] == "router"
    assert read.edges["L0.N5", "L2.H1"]["total"] == pytest.approx(0.998, abs=0.01)


def test_where_no_candidate_lies_below_the_routers_the_round_says_so(wired_effects: Effects) -> None:
    settings = TraceSettings(candidates="L3.N0")
    graph = trace(wired_pair(), wired_prompts(), wired_anchor(), wired_effects, settings=settings)
    assert [found.stopped for found in graph.rounds] == ["no candidate lies below these targets"]
    assert graph.overlaps == ()


def test_where_steering_restores_nothing_no_component_is_an_executor(wired_effects: Effects) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    executors = find_executors(pair, prompts, anchor, units="heads,neurons")
    activation = localize(pair, prompts, anchor, units="heads,neurons", method="activation")
    null = pooled([*draw_null(pair, prompts, anchor, wired_effects, seeds=(0, 1))], wired_effects.components)
    suspects = find_suspects(wired_effects, activation, null)
    plain = measure_plain(pair, prompts, anchor, weights=suspects.sources, activation=suspects.routers)
    useless = replace(executors, steered_kl=2 * executors.base_kl)
    for found, expected in ((executors, ["L4.N2"]), (useless, [])):
        hierarchy = find_roles(wired_effects, activation, null, plain, executors=found, n_layers=5)
        assert [str(one) for one in hierarchy.of_role("executor")] == expected


def test_who_does_the_same_without_the_instruction_is_neither_source_nor_router(wired_effects: Effects) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    activation = localize(pair, prompts, anchor, units="heads,neurons", method="activation")
    null = pooled([*draw_null(pair, prompts, anchor, wired_effects, seeds=range(8))], wired_effects.components)
    suspects = find_suspects(wired_effects, activation, null)
    assert suspects.sources
    assert suspects.routers
    acting = dict(zip(activation.components, activation.per_prompt, strict=True))
    writing = dict(zip(wired_effects.components, wired_effects.per_prompt, strict=True))
    drifting = Plain(
        weights={one: writing[one] for one in suspects.sources},
        activation={one: acting[one] for one in suspects.routers},
    )
    idle = Plain(
        weights={one: 0 * writing[one] for one in suspects.sources},
        activation={one: 0 * acting[one] for one in suspects.routers},
    )
    measured = measure_plain(pair, prompts, anchor, weights=suspects.sources, activation=suspects.routers)
    for plain, sources, routers in ((drifting, (), ()), (idle, suspects.sources, suspects.routers)):
        found = find_roles(wired_effects, activation, null, plain, n_layers=5)
        assert (set(found.of_role("source")), set(found.of_role("router"))) == (set(sources), set(routers))
    # By hand: the same patches on the queries alone.
    alone = ContrastPrompts.from_token_ids(
        with_instruction=[row.without_instruction for row in prompts],
        without_instruction=[row.without_instruction for row in prompts],
    )
    by_hand = localize(pair, alone, anchor, units=list(suspects.sources))
    for component, values in zip(by_hand.components, by_hand.per_prompt, strict=True):
        assert torch.equal(measured.weights[component], values)
    with pytest.raises(ComponentError, match="not measured without the instruction"):
        find_roles(wired_effects, activation, null, Plain(weights={}, activation={}), n_layers=5)


def test_an_anchor_turned_round_gives_the_same_trace(wired_effects: Effects) -> None:
    pair, prompts, anchor = wired_pair(), wired_prompts(), wired_anchor()
    turned = replace(anchor, direction=-anchor.direction)
    effects = localize(pair, prompts, turned, units="heads,neurons")
    settings = TraceSettings(n_rounds=1, candidates="heads,neurons", n_exact=4)
    graphs = [
        trace(pair, prompts, one, found, settings=settings)
        for one, found in ((anchor, wired_effects), (turned, effects))
    ]
    assert graphs[0].rounds[0].suppliers == graphs[1].rounds[0].suppliers == ("L0.N5",)
    assert [one.n_common for one in graphs[0].overlaps] == [one.n_common for one in graphs[1].overlaps]


def test_divergences_that_vary_much_do_not_end_a_trace() -> None:
    lost = torch.tensor([[0.05, 0.2, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    executors = Executors(
        components=(Component.parse("L4.N2"), Component.parse("L4.N3")),
        lost=lost,
        null=torch.zeros(2, 2, 3, dtype=torch.float64),
        base_kl=torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64),
        steered_kl=torch.zeros(3, dtype=torch.float64),
        level=1.0,
        queries=("a", "b", "c"),
    )
    assert executors.table()["loss"].tolist() == pytest.approx([1.25 / 2.6, 0.0])


@pytest.mark.parametrize("shape", ["llama-gqa", "gemma2", "gpt2", "gpt-neox"])
def test_in_bfloat16_the_stream_still_counts_as_a_sum(shape: str, token_prompts: ContrastPrompts) -> None:
    pair = build_pair(shape, dtype=torch.bfloat16)
    found = localize(pair, token_prompts, anchor_at(3), units="L0.H1,L1.mlp", targets="all")
    gap = float(found.gap.abs().mean())
    torch.testing.assert_close(found.per_target.sum(dim=1), found.per_prompt, rtol=0, atol=0.1 * gap)
