from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightpatch import Component, ContrastPrompts, ModelPair, localize
from weightpatch.component import components, slices
from weightpatch.engine.edges import Receives
from weightpatch.executors import find_executors
from weightpatch.patch import patched
from weightpatch.paths import direct_effects
from wired import ANCHOR_LAYER, ANCHORED, ANSWER, HEAD_DIM, N_LAYERS, WIRING, wired_anchor, wired_pair, wired_prompts

PROMPTS = wired_prompts()
WRITERS = "heads,neurons"
SOURCE, ROUTER, EXECUTOR = WIRING.roles
pair_of = cache(wired_pair)
SEEDS = pytest.mark.parametrize("seed", range(2))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a model did on the prompts.

    Attributes:
        readout: Of the anchor, shape `(prompt,)`.
        log_probs: Of the next token, shape `(prompt, token)`.
        writes: Address of a head or neuron -> what it added to the stream, shape `(prompt, token, feature)`.
    """

    readout: Tensor
    log_probs: Tensor
    writes: Mapping[str, Tensor]


def batch(prompts: ContrastPrompts) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, where the causal mask hides the padding, and each prompt's last place."""
    rows = [torch.tensor(row.with_instruction) for row in prompts]
    last = torch.tensor([len(row) - 1 for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), last


@torch.no_grad()
def run(
    model: PreTrainedModel,
    *,
    prompts: ContrastPrompts = PROMPTS,
    fixed: Mapping[str, Tensor] | None = None,
    level: float | None = None,
) -> Run:
    """Run a model by plain hooks, with the writes of some heads and neurons held and the readout steered to a level."""
    tokens, last = batch(prompts)
    rows = torch.arange(len(tokens))
    held = fixed or {}
    writes: dict[str, Tensor] = {}
    read: list[Tensor] = []

    def enter(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = args[0].clone()
        if level is not None:
            stream[rows, last, ANCHORED] = level
        read.append(stream[rows, last, ANCHORED])
        return (stream, *args[1:])

    def write(prefix: str, width: int, projection: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for index, columns in enumerate(projection.weight.split(width, dim=1)):
            address, own = f"{prefix}{index}", args[0][..., index * width : (index + 1) * width] @ columns.T
            writes[address] = held.get(address, own)
            output = output + (writes[address] - own)
        return output

    layers = model.model.layers
    handles = [layers[ANCHOR_LAYER].register_forward_pre_hook(enter)]
    for number, layer in enumerate(layers):
        handles.append(layer.self_attn.o_proj.register_forward_hook(partial(write, f"L{number}.H", HEAD_DIM)))
        handles.append(layer.mlp.down_proj.register_forward_hook(partial(write, f"L{number}.N", 1)))
    try:
        logits = model(input_ids=tokens, use_cache=False).logits[rows, last]
    finally:
        for handle in handles:
            handle.remove()
    return Run(readout=read[0], log_probs=logits.log_softmax(-1), writes=writes)


def recovery(pair: ModelPair, found: Run) -> float:
    base, specialized = run(pair.base).readout, run(pair.specialized).readout
    return float((found.readout - base).mean() / (specialized - base).mean())


def divergence(one: Run, other: Run) -> float:
    """Mean of KL(one || other) over the prompts, in nats."""
    return float((one.log_probs.exp() * (one.log_probs - other.log_probs)).sum(-1).mean())


def by_weights(pair: ModelPair, units: str) -> dict[str, float]:
    table = localize(pair, PROMPTS, wired_anchor(), units=units).table()
    return dict(zip(table.component, table.recovery, strict=True))


def members(pair: ModelPair, units: str) -> list[str]:
    return [str(component) for component in components(pair.architecture, units)]


def test_hooks_that_hold_what_is_there_anyway_change_nothing() -> None:
    pair = pair_of(torch.float64)
    plain = run(pair.base)
    for row, log_probs in zip(PROMPTS, plain.log_probs, strict=True):
        with torch.no_grad():
            logits = pair.base(input_ids=torch.tensor([row.with_instruction])).logits[0, -1]
        torch.testing.assert_close(log_probs, logits.log_softmax(-1))
    assert set(plain.writes) == set(members(pair, WRITERS))
    torch.testing.assert_close(run(pair.base, fixed=plain.writes).log_probs, plain.log_probs)


def test_prompts_have_queries_of_their_own_and_differ_in_one_token_from_those_without_instruction() -> None:
    assert len({row.query for row in PROMPTS}) == len(PROMPTS) == 12
    assert {len(row.with_instruction) for row in PROMPTS} == set(range(5, 11))
    for row in PROMPTS:
        pairs = enumerate(zip(row.with_instruction, row.without_instruction, strict=True))
        assert [place for place, (positive, negative) in pairs if positive != negative] == [1]


def test_every_component_has_a_difference_of_its_own() -> None:
    pair = pair_of()
    parameters = [dict(model.named_parameters()) for model in (pair.base, pair.specialized)]
    for component in components(pair.architecture, "heads,kvs,neurons,norms,ends"):
        for piece in slices(pair.architecture, component):
            ours, theirs = (piece.of(named[piece.parameter]) for named in parameters)
            assert not torch.equal(ours, theirs)


def test_a_role_is_an_address_of_the_pair_and_every_edge_leads_towards_the_output() -> None:
    assert set(WIRING.roles) <= set(members(pair_of(), WRITERS))
    ends = {"anchor": ANCHOR_LAYER - 0.5, "output": N_LAYERS}
    for supplier, target in WIRING.edges:
        below, above = (ends[one] if one in ends else Component.parse(one).layer or 0 for one in (supplier, target))
        assert below < above


@SEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_sources_weights_bring_the_readout_back(seed: int, dtype: torch.dtype) -> None:
    found = by_weights(pair_of(dtype, seed=seed), "heads,kvs,mlps,L0.N5,L0.N3")
    high = {address for address, share in found.items() if share > 0.9}
    assert high == {SOURCE, "L0.mlp"}
    assert max(abs(share) for address, share in found.items() if address not in high) < 0.01


def test_no_other_neuron_and_no_norm_and_no_embedding_has_a_part_in_it() -> None:
    found = by_weights(pair_of(), "neurons,norms,embed")
    assert found.pop(SOURCE) > 0.9
    assert max(map(abs, found.values())) < 0.01


def test_what_is_not_wired_vanishes_with_the_noise() -> None:
    most = []
    for noise in (1e-2, 1e-3, 1e-4):
        found = by_weights(pair_of(torch.float64, noise=noise), "heads,kvs,neurons,norms,embed")
        assert abs(found.pop(SOURCE) - 1) < noise
        most.append(max(map(abs, found.values())))
    assert most[2] < most[1] / 5 < most[0] / 25


@SEEDS
def test_the_specialized_model_without_its_source_reads_as_the_base(seed: int) -> None:
    pair = pair_of(seed=seed)
    with patched(pair, SOURCE, recipient="specialized") as model:
        found = run(model)
    assert abs(recovery(pair, found)) < 0.05


@SEEDS
def test_only_the_outputs_of_source_and_router_bring_the_readout_back(seed: int) -> None:
    pair = pair_of(seed=seed)
    donated = run(pair.specialized).writes
    below = [address for address in members(pair, WRITERS) if Component.parse(address).layer < ANCHOR_LAYER]
    shares = {address: recovery(pair, run(pair.base, fixed={address: donated[address]})) for address in below}
    high = {address for address, share in shares.items() if share > 0.9}
    assert high == {SOURCE, ROUTER}
    assert max(abs(share) for address, share in shares.items() if address not in high) < 0.01


@SEEDS
def test_the_source_reaches_the_anchor_through_the_router_and_through_nothing_else(seed: int) -> None:
    pair = pair_of(seed=seed)
    kept = {address: write for address, write in run(pair.base).writes.items() if address != SOURCE}
    with patched(pair, SOURCE) as model:
        direct = run(model, fixed=kept)
        around = run(model, fixed={ROUTER: kept[ROUTER]})
        through = run(model, fixed={address: write for address, write in kept.items() if address != ROUTER})
    assert abs(recovery(pair, direct)) < 0.01
    assert abs(recovery(pair, around)) < 0.01
    assert recovery(pair, through) > 0.9


def test_the_router_reaches_the_anchor_without_any_other_component() -> None:
    pair = pair_of()
    kept = dict(run(pair.base).writes)
    kept[ROUTER] = run(pair.specialized).writes[ROUTER]
    assert recovery(pair, run(pair.base, fixed=kept)) > 0.9


def test_the_values_that_the_router_mixes_carry_the_bit() -> None:
    pair = pair_of()
    values: list[Tensor] = []

    def hold(_projection: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        values.append(output)
        return torch.cat(
            [output[..., :HEAD_DIM], values[0][..., HEAD_DIM : 2 * HEAD_DIM], output[..., 2 * HEAD_DIM :]], -1
        )

    handles = [
        model.model.layers[2].self_attn.v_proj.register_forward_hook(hold) for model in (pair.specialized, pair.base)
    ]
    try:
        run(pair.specialized)
        held = run(pair.base)
    finally:
        for handle in handles:
            handle.remove()
    assert recovery(pair, held) > 0.9


def test_the_router_looks_at_the_instruction_from_wherever_the_last_token_stands() -> None:
    pair = wired_pair()
    tokens, last = batch(PROMPTS)
    for model in (pair.base, pair.specialized):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attention = model(input_ids=tokens, output_attentions=True).attentions[2][:, 1]  # (prompt, query, key)
        assert float(attention[torch.arange(len(tokens)), last, 1].min()) > 0.99


@SEEDS
def test_the_sources_weights_alone_give_the_specialized_models_answer(seed: int) -> None:
    pair = pair_of(seed=seed)
    base, specialized = run(pair.base), run(pair.specialized)
    assert bool((specialized.log_probs.argmax(-1) == ANSWER).all())
    assert not bool((base.log_probs.argmax(-1) == ANSWER).all())
    with patched(pair, SOURCE) as model:
        assert divergence(specialized, run(model)) < 0.01 * divergence(specialized, base)


@SEEDS
def test_steering_gives_the_answer_and_only_the_executor_can_take_it_back(seed: int) -> None:
    pair = pair_of(seed=seed)
    base, specialized = run(pair.base), run(pair.specialized)
    level = float(specialized.readout.mean())
    apart = divergence(specialized, base)

    def restored(fixed: Mapping[str, Tensor]) -> float:
        return 1 - divergence(specialized, run(pair.base, fixed=fixed, level=level)) / apart

    whole = restored({})
    assert whole > 0.9
    # Steering the last token changes no other, so that holding all tokens is holding the last.
    past = [address for address in members(pair, WRITERS) if Component.parse(address).layer >= ANCHOR_LAYER]
    lost = {address: whole - restored({address: base.writes[address]}) for address in past}
    assert lost.pop(EXECUTOR) > 0.9
    assert max(map(abs, lost.values())) < 0.02


def test_with_the_executors_mlp_held_nothing_of_the_steering_is_left_and_with_any_other_module_nothing_is_lost() -> (
    None
):
    pair = pair_of()
    base, specialized = run(pair.base), run(pair.specialized)
    level = float(specialized.readout.mean())
    apart = divergence(specialized, base)
    for layer in range(ANCHOR_LAYER, N_LAYERS):
        for kind in "HN":
            held = {address: write for address, write in base.writes.items() if address.startswith(f"L{layer}.{kind}")}
            left = divergence(specialized, run(pair.base, fixed=held, level=level)) / apart
            assert left > 0.9 if EXECUTOR in held else left < 0.1


@SEEDS
def test_without_the_instruction_the_two_models_read_alike(seed: int) -> None:
    pair = pair_of(seed=seed)
    bare = ContrastPrompts.from_token_ids(
        with_instruction=[row.without_instruction for row in PROMPTS],
        without_instruction=[row.without_instruction for row in PROMPTS],
    )
    gaps = [
        (run(pair.specialized, prompts=prompts).readout - run(pair.base, prompts=prompts).readout).mean()
        for prompts in (bare, PROMPTS)
    ]
    assert abs(gaps[0]) < 0.05 * gaps[1]


def test_activation_patching_gives_what_plain_hooks_give() -> None:
    pair = pair_of(torch.float64)
    base, donated = run(pair.base), run(pair.specialized).writes
    effects = localize(pair, PROMPTS, wired_anchor(), units=WRITERS, method="activation")
    for component, effect in zip(effects.components, effects.per_prompt, strict=True):
        held = run(pair.base, fixed={str(component): donated[str(component)]})
        torch.testing.assert_close(effect, held.readout - base.readout, rtol=0, atol=1e-12)


def test_losses_past_the_anchor_are_what_plain_hooks_give() -> None:
    pair = pair_of(torch.float64)
    base, specialized = run(pair.base), run(pair.specialized)
    found = find_executors(pair, PROMPTS, wired_anchor(), units=WRITERS)

    def apart(other: Run) -> Tensor:
        return (specialized.log_probs.exp() * (specialized.log_probs - other.log_probs)).sum(-1)

    steered = apart(run(pair.base, level=found.level))
    assert found.level == pytest.approx(float(specialized.readout.mean()), abs=1e-12)
    torch.testing.assert_close(found.base_kl, apart(base), rtol=0, atol=1e-5)  # float32 probabilities
    torch.testing.assert_close(found.steered_kl, steered, rtol=0, atol=1e-5)
    for component, lost in zip(found.components, found.lost, strict=True):
        held = run(pair.base, fixed={str(component): base.writes[str(component)]}, level=found.level)
        torch.testing.assert_close(lost, apart(held) - steered, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("receives", "least", "most"), [("all", 0.9, 1.1), ("v", 0.9, 1.1), ("q", 0, 0.01), ("k", 0, 0.01)]
)
def test_the_one_direct_edge_into_the_router_comes_from_the_source_and_goes_in_by_the_values(
    receives: Receives, least: float, most: float
) -> None:
    found = direct_effects(
        pair_of(), PROMPTS, wired_anchor(), suppliers=WRITERS, target=ROUTER, receives=receives
    ).table()
    shares = dict(zip(found.supplier, found.direct, strict=True))
    assert least <= abs(shares.pop(SOURCE)) <= most
    assert max(map(abs, shares.values())) < 0.01


def test_the_one_direct_edge_into_the_anchor_comes_from_the_router() -> None:
    for method, suppliers in (("activation", {ROUTER}), ("exact", set())):
        found = direct_effects(
            pair_of(), PROMPTS, wired_anchor(), suppliers=WRITERS, target="anchor", method=method
        ).table()
        shares = dict(zip(found.supplier, found.direct, strict=True))
        assert {address for address, share in shares.items() if abs(share) > 0.01} == suppliers


def test_the_trace_of_the_wired_model_is_exactly_its_wiring() -> None:
    from weightpatch.tracing import trace

    effects = localize(pair_of(), PROMPTS, wired_anchor(), units="heads,kvs,mlps,neurons")
    graph = trace(pair_of(), PROMPTS, wired_anchor(), effects)
    assert {(edge.source, edge.target) for edge in graph.edges} == set(WIRING.edges)
    roles = {node.component: node.role for node in graph.nodes if node.role is not None}
    holders = {"L0.mlp": "source", "L4.mlp": "executor", "L2.KV1": "router"}  # the last: the values that L2.H1 mixes
    assert roles == {**WIRING.roles, **holders}
