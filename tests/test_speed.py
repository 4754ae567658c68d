"""The speed benchmark: every contestant gives the same readouts, and the ideal is what a hand count says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from conftest import build_pair
from weightpatch import Component, ContrastPrompts, ModelPair
from weightpatch.cli import main
from weightpatch.component import components
from weightpatch.errors import ComponentError, PromptError
from weightpatch.localization import localize
from weightpatch.residuals import evaluating
from weightpatch.speed import Row, Speed, SpeedSettings, measure_speed
from weightpatch.speed.bench import default_layers
from weightpatch.speed.contestants import CONTESTANTS, LOOPS, open_loop
from weightpatch.speed.memory import with_peak_memory
from weightpatch.speed.operations import PrefixTree, Tokens, operations
from weightpatch.speed.race import TOLERANCE, _Entry
from weightpatch.speed.sampling import deal, sample
from weightpatch.speed.turns import loop_turn, readout
from weightpatch.speed.work import Work, choose_prompts, same_weights

OURS = ("loop", "swap", "suffix")


@pytest.fixture(scope="module", autouse=True)
def _short_products() -> Iterator[None]:
    """The machine's rate needs a second or two to be measured well, and here it does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightpatch.speed.machine.SECONDS", 0.0)
        patch.setattr("weightpatch.speed.machine.SQUARE", 64)
        yield


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def prompts(pair: ModelPair) -> ContrastPrompts:
    return choose_prompts(pair, ContrastPrompts.load("instructions"), n_prompts=4, seed=0)


@pytest.fixture(scope="module")
def measured(pair: ModelPair, prompts: ContrastPrompts) -> Speed:
    before = {name: parameter.clone() for name, parameter in pair.base.named_parameters()}
    settings = SpeedSettings(layers=(2,), engines=OURS, n_prompts=4, sample=4, repeats=2, n_rounds=2)
    found = measure_speed(pair, prompts, settings)
    assert all(torch.equal(parameter, before[name]) for name, parameter in pair.base.named_parameters())
    assert all(parameter.requires_grad for parameter in pair.base.parameters())
    return found


def test_every_contestant_has_a_row_with_every_value(measured: Speed) -> None:
    assert [row.engine for row in measured.rows] == list(OURS)
    for row in measured.rows:
        assert row.note == ""
        empty = [one.name for one in fields(Row) if getattr(row, one.name) is None and one.name != "peak_memory"]
        assert empty == []
        assert row.seconds_low is not None
        assert row.seconds is not None
        assert row.seconds_high is not None
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high
        assert row.max_difference is not None
        assert row.max_difference < 1e-5
        assert (row.peak_memory is None) == (sys.platform != "linux")
    loop, swap, suffix = measured.rows
    assert (loop.ratio, loop.n_measured, swap.n_measured) == (1, 4, 4)
    assert suffix.n_measured == suffix.n_components == loop.n_components


def test_the_ratio_and_the_share_of_the_ideal_belong_to_the_seconds(measured: Speed) -> None:
    loop = measured.rows[0]
    for row in measured.rows:
        assert row.ratio == pytest.approx((loop.seconds or 0) / (row.seconds or 1))
        assert (row.share_of_ideal or 0) * (row.seconds or 0) == pytest.approx(
            (loop.share_of_ideal or 0) * (loop.seconds or 0)
        )
    assert measured.machine.matrix_product_rate_gflops > 0
    assert measured.machine.n_prompts == 4
    assert 0 < measured.machine.n_tokens_tree < measured.machine.n_tokens_padded
    assert {"torch", "transformers", "weightpatch"} <= measured.machine.versions.keys()


def _loop_effects(name: str, work: Work, members: tuple[Component, ...]) -> torch.Tensor:
    model = work.pair.base
    with evaluating(model), open_loop(name)(model, work.batch, work.anchor.layer) as read:
        found = loop_turn(read, work, members, readout(read, work)).effects
    return torch.stack([found[component] for component in members])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("layer", [3, 8])
def test_a_loop_gives_the_readouts_of_real_swaps(
    name: str, layer: int, pair: ModelPair, prompts: ContrastPrompts
) -> None:
    if (package := LOOPS[name]) and not find_spec(package):
        pytest.skip(f"{name} is not installed: pip install 'weightpatch[bench]'")
    work = Work.of(pair, prompts, layer=layer, units="L0.H1,L0.KV0,L1.attn,L2.mlp,L2.N3")
    before = {key: parameter.clone() for key, parameter in pair.base.named_parameters()}
    forwards = [type(module).forward for module in pair.base.modules()]
    hooks = [len(module._forward_hooks) for module in pair.base.modules()]
    truth = localize(pair, prompts, work.anchor, units=work.components, engine="swap")
    found = _loop_effects(name, work, work.components)
    torch.testing.assert_close(found, truth.per_prompt, rtol=0, atol=1e-5 * float(truth.gap.abs().mean()))
    assert float(found.abs().min(dim=1).values.max()) > 0
    assert all(torch.equal(parameter, before[key]) for key, parameter in pair.base.named_parameters())
    assert all(parameter.requires_grad for parameter in pair.base.parameters())
    assert [type(module).forward for module in pair.base.modules()] == forwards
    assert [len(module._forward_hooks) for module in pair.base.modules()] == hooks


@pytest.mark.parametrize("shape", ["gpt2", "llama-mqa", "qwen2-gqa"])
def test_the_plain_loop_and_the_count_know_other_families(shape: str, token_prompts: ContrastPrompts) -> None:
    other = build_pair(shape)
    work = Work.of(other, token_prompts, layer=2, units="heads,kvs,attns,mlps")
    truth = localize(other, token_prompts, work.anchor, units=work.components, engine="swap")
    found = _loop_effects("loop", work, work.components)
    torch.testing.assert_close(found, truth.per_prompt, rtol=0, atol=1e-5 * float(truth.gap.abs().mean()))
    tree = PrefixTree.of(work.token_ids)
    counts = [
        operations(other.architecture, tree, anchor_layer=layer, components=work.components[:1]) for layer in (1, 2, 3)
    ]
    assert all(one is not None and other is not None and one < other for one, other in pairwise(counts))


def test_a_contestant_that_disagrees_is_reported_and_not_timed(
    pair: ModelPair, prompts: ContrastPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(name: str) -> object:
        honest = open_loop(name)

        def opened(model: object, batch: object, layer: int) -> object:
            return honest(model, batch, layer - 1)  # type: ignore[arg-type]

        return opened

    monkeypatch.setattr("weightpatch.speed.race.open_loop", off)
    settings = SpeedSettings(layers=(3,), engines=("loop", "swap"), n_prompts=4, sample=1, repeats=1, n_rounds=1)
    wrong, swap = measure_speed(pair, prompts, settings).rows
    assert "differ from swap's by" in wrong.note
    assert (wrong.seconds, wrong.ratio, wrong.n_measured) == (None, None, 0)
    assert wrong.max_difference is not None
    assert wrong.max_difference > 1e-4
    assert (swap.note, swap.ratio) == ("", None)


def test_readouts_that_are_no_numbers_do_not_agree() -> None:
    component = Component.parse("L0.H0")
    entry = _Entry(name="loop", effects={component: torch.tensor([0.0, float("nan")])})
    assert not entry.difference({component: torch.zeros(2)}, 1.0) <= TOLERANCE


def test_a_peer_that_fails_is_reported_and_the_others_go_on(
    pair: ModelPair, prompts: ContrastPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> object:
        if name == "pyvene":
            raise KeyError("no such layer")
        return open_loop(name)

    monkeypatch.setattr("weightpatch.speed.race.open_loop", broken)
    monkeypatch.setattr("weightpatch.speed.bench.missing", lambda _name: None)
    settings = SpeedSettings(layers=(1,), engines=("loop", "pyvene"), n_prompts=4, sample=1, repeats=1, n_rounds=1)
    loop, peer = measure_speed(pair, prompts, settings).rows
    assert (loop.note, peer.note, peer.seconds) == ("", "KeyError: 'no such layer'", None)


def test_a_peer_that_is_not_installed_is_left_out_with_a_note(
    pair: ModelPair, prompts: ContrastPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightpatch.speed.contestants.find_spec", lambda _name: None)
    settings = SpeedSettings(layers=(1,), engines=("nnsight", "loop"), n_prompts=4, sample=1, repeats=1, n_rounds=1)
    found = measure_speed(pair, prompts, settings)
    assert [row.engine for row in found.rows] == ["loop"]
    assert "nnsight" in found.notes[0]
    assert "weightpatch[bench]" in found.notes[0]


def test_an_unknown_engine_is_refused_with_the_known_names(pair: ModelPair, prompts: ContrastPrompts) -> None:
    with pytest.raises(ComponentError, match=r"'warp'.*loop, nnsight, transformer-lens, pyvene, swap, suffix"):
        measure_speed(pair, prompts, SpeedSettings(engines=("loop", "warp")))
    with pytest.raises(ComponentError, match="no operations are counted for norms"):
        measure_speed(pair, prompts, SpeedSettings(units="norms", n_prompts=4))
    with pytest.raises(PromptError, match="cannot draw 5 of 4 prompts"):
        measure_speed(pair, prompts, SpeedSettings(n_prompts=5))


def test_the_sample_has_every_layer_and_the_rounds_have_all_of_it(pair: ModelPair) -> None:
    every = components(pair.architecture, "heads,kvs,attns,mlps")
    drawn = sample(every, 24, seed=1)
    counts = [sum(component.layer == layer for component in drawn) for layer in range(pair.architecture.n_layers)]
    assert counts == [3] * 8
    assert drawn == sample(every, 24, seed=1) != sample(every, 24, seed=2)
    assert {component.layer for component in sample(every, 2, seed=0)} == set(range(8))
    assert sorted(map(str, sample(every, 10**6, seed=0))) == sorted(map(str, every))
    rounds = deal(drawn, 5, seed=0)
    assert sorted(map(len, rounds)) == [4, 5, 5, 5, 5]
    assert sorted(str(one) for members in rounds for one in members) == sorted(map(str, drawn))
    assert len(deal(drawn[:2], 5, seed=0)) == 2


def test_tokens_shared_at_the_start_count_once() -> None:
    tree = PrefixTree.of([(1, 2, 3), (1, 2, 4, 5), (2, 2), (1, 2)])
    # nodes 1, 12, 123, 124, 1245, 2, 22 with 1 + 2 + 3 + 3 + 4 + 1 + 2 pairs; ends 123, 1245, 22, 12
    assert tree.all == Tokens(n_tokens=7, n_pairs=16)
    assert tree.readout == Tokens(n_tokens=4, n_pairs=11)


def test_the_operations_of_a_case_counted_by_hand() -> None:
    architecture = build_pair("llama-gqa").architecture  # 24 features, 4 heads of 6, 2 groups, 20 neurons
    tree = PrefixTree.of([(1, 2, 3), (1, 2, 4)])  # 4 tokens, 1 + 2 + 3 + 3 pairs; 2 of them read, 6 pairs
    q_and_o, k_and_v, mlp, pair = 2 * 2 * 24 * 24, 2 * 2 * 24 * 12, 2 * 3 * 24 * 20, 4 * 6 * 4
    layer = 4 * (q_and_o + k_and_v + mlp) + 9 * pair
    last = 4 * k_and_v + 2 * (q_and_o + mlp) + 6 * pair
    once = 3 * layer + 2 * layer  # a base pass of 3 layers; base and specialized layer of one
    own = {
        "L0.H1": 4 * mlp + 4 * (4 * 6 * 24),
        "L0.KV1": 4 * mlp + 9 * (4 * 6 * 2) + 4 * 2 * (2 * 6 * 24),
        "L0.attn": 4 * mlp,
        "L0.mlp": 4 * mlp,
        "L0.N3": 4 * mlp / 20,
        "L0": 0,
    }
    for address, expected in own.items():
        counted = operations(architecture, tree, anchor_layer=3, components=components(architecture, address))
        assert counted == once + expected + layer + last, address
    assert (
        operations(architecture, tree, anchor_layer=3, components=components(architecture, "L2.H0,L2.mlp"))
        == once + (2 * mlp + 2 * (4 * 6 * 24)) + 2 * mlp
    )


def test_default_anchors_are_at_60_80_and_97_percent() -> None:
    assert default_layers(30) == (18, 24, 29)
    assert default_layers(8) == (5, 6, 8)
    assert default_layers(1) == (1,)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_is_seen_and_given_back() -> None:
    def body() -> int:
        return int(torch.ones(16 * 2**20).sum())  # 64 MiB

    for _ in range(2):
        result, peak = with_peak_memory(body)
        assert result == 16 * 2**20
        assert peak is not None
        assert 56 < peak < 96


def test_wrapping_leaves_the_model_alone_and_shares_its_weights(pair: ModelPair) -> None:
    copied = same_weights(pair.base)
    modules = {id(module) for module in pair.base.modules()}
    assert not modules & {id(module) for module in copied.modules()}
    ours, theirs = dict(pair.base.named_parameters()), dict(copied.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is parameter for name, parameter in ours.items())


def test_the_command_prints_one_object_or_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--layers 1 --units mlps --sample 1 --repeats 1 --n-prompts 2 --engines loop,suffix"
    call = _program(monkeypatch, capsys)
    code, out, _ = call(f"bench speed {options} --json")
    record = json.loads(out)
    assert (code, list(record)) == (0, ["rows", "machine", "notes"])
    assert [row["engine"] for row in record["rows"]] == ["loop", "suffix"]
    assert {"engine", "anchor_layer", "seconds", "ratio", "share_of_ideal", "peak_memory"} <= record["rows"][0].keys()
    code, out, _ = call(f"bench speed {options}")
    assert code == 0
    assert "of the ideal" in out
    code, out, err = call("bench speed --engines warp")
    assert (code, out) == (2, "")
    assert all(name in err for name in CONTESTANTS)


def _program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weightpatch", *line.split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call
