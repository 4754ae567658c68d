from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import build_pair
from weightpatch import Anchor, ContrastPrompts, ModelPair, fit_anchor, localize
from weightpatch.anchor import AnchorReport
from weightpatch.behaviour import Answering, Bench, measure_behaviour, repetition
from weightpatch.errors import AnchorError, PromptError
from weightpatch.responses import with_responses
from weightpatch.steering import Hold


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


def fit_split(task: str) -> ContrastPrompts:
    return ContrastPrompts.load(f"instructions:{task}", n_queries=12).split("fit")


def report_of(anchor: Anchor) -> AnchorReport:
    assert anchor.report is not None
    return anchor.report


@pytest.fixture(scope="module")
def highlights(pair: ModelPair) -> Anchor:
    answering = Answering(others=ContrastPrompts((*fit_split("capitals"), *fit_split("sections"))), max_new_tokens=40)
    return fit_anchor(pair, fit_split("highlights"), gates="behaviour", answering=answering)


def passes(report: AnchorReport) -> dict[str, bool]:
    return {gate.name: gate.passed for gate in report.gates}


def test_an_anchor_of_the_bundled_pair_steers_and_its_controls_do_not(highlights: Anchor) -> None:
    report = report_of(highlights)
    assert report.stable
    assert list(passes(report)) == [
        "split-half-cosine", "auc", "gap", "steering", "ablation", "random", "other-task",
    ]  # fmt: skip
    assert report.behaviour is not None
    arms = {arm.name: arm.n_passed for arm in report.behaviour.arms}
    assert arms["steered"] > arms["base"] == arms["random"] == arms["other-task"] == 0
    assert arms["specialized"] == 6 > arms["ablated"] == 0
    assert report.behaviour.other_tasks == ("capitals", "sections")


def test_steering_chooses_a_later_layer_than_the_size_of_the_gap_does(pair: ModelPair, highlights: Anchor) -> None:
    by_gap = fit_anchor(pair, fit_split("highlights"))
    assert report_of(by_gap).behaviour is None
    assert by_gap.layer < highlights.layer
    behaviour = report_of(highlights).behaviour
    assert behaviour is not None
    assert behaviour.search[behaviour.span][highlights.layer] == max(
        max(found.values()) for found in behaviour.search.values()
    )


def test_everything_known_about_behaviour_survives_saving(highlights: Anchor, tmp_path: object) -> None:
    highlights.save(f"{tmp_path}/anchor.safetensors")
    assert Anchor.load(f"{tmp_path}/anchor.safetensors").report == highlights.report


def test_a_random_direction_fails_the_gates_of_behaviour(pair: ModelPair, highlights: Anchor) -> None:
    bench = Bench(pair=pair, prompts=fit_split("highlights"), positions=(-1,), answering=Answering(max_new_tokens=40))
    behaviour = report_of(highlights).behaviour
    assert behaviour is not None
    direction = torch.randn(128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hold = Hold(layer=highlights.layer, direction=direction / direction.norm(), level=behaviour.level)
    _, gates = measure_behaviour(bench, np.arange(6), hold, ablation_level=0.0, search={}, others={})
    assert {gate.name: gate.passed for gate in gates} == {"steering": False, "ablation": False, "random": False}


def test_a_pair_whose_specialized_side_does_not_follow_is_unstable(pair: ModelPair) -> None:
    reverse = ModelPair(base=pair.specialized, specialized=pair.base, tokenizer=pair.tokenizer)
    answering = Answering(max_new_tokens=40)
    report = report_of(fit_anchor(reverse, fit_split("highlights"), gates="behaviour", answering=answering))
    assert not report.stable
    assert passes(report)["steering"] is passes(report)["ablation"] is False


def test_a_judge_of_ones_own_replaces_the_checkers(pair: ModelPair) -> None:
    rows = tuple(replace(row, type="no:such_type") for row in fit_split("highlights"))
    prompts = ContrastPrompts(rows)
    with pytest.raises(AnchorError, match=r"no checker here for no:such_type.*Answering\(passes"):
        fit_anchor(pair, prompts, gates="behaviour")
    answering = Answering(passes=lambda _, text: text.count("*") > 3, max_new_tokens=40, n_layers=2)
    report = report_of(fit_anchor(pair, prompts, gates="behaviour", answering=answering))
    assert report.behaviour is not None
    assert {arm.name: arm.n_passed for arm in report.behaviour.arms}["specialized"] == 6
    assert "other-task" not in passes(report)


def test_token_ids_cannot_be_judged() -> None:
    ids = [[1, 2, 3, place] for place in range(8)]
    prompts = ContrastPrompts.from_token_ids(
        with_instruction=ids, without_instruction=[row[:2] + row[3:] for row in ids]
    )
    with pytest.raises(AnchorError, match="give the pair a tokenizer"):
        fit_anchor(build_pair("llama-gqa"), prompts, gates="behaviour")
    with pytest.raises(AnchorError, match="unknown gates 'feelings'"):
        fit_anchor(build_pair("llama-gqa"), prompts, gates="feelings")  # type: ignore[arg-type]


def test_an_answer_that_goes_round_in_circles_is_repetitive() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert repetition([1, 2] * 20) > 0.9
    assert repetition([1, 2, 3, 4]) == repetition([]) == 0
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_an_answer_that_repeats_itself_does_not_pass(pair: ModelPair) -> None:
    bench = Bench(
        pair=pair,
        prompts=fit_split("highlights"),
        positions=(-1,),
        answering=Answering(passes=lambda *_: True, max_new_tokens=40),
    )
    stuck = Hold(layer=8, direction=torch.eye(128, dtype=torch.float64)[0], level=1e6)  # every token alike
    found = bench.judge(pair.base, [(0, None), (0, stuck)])
    assert found.passed.tolist() == [1.0, 0.0]
    assert found.repetitive.tolist() == [0.0, 1.0]


def test_prompts_read_along_a_plain_answer_give_an_anchor_at_its_tokens_and_are_answered_from_their_end(
    pair: ModelPair,
) -> None:
    plain = fit_split("highlights")
    prompts = with_responses(pair, plain, n_tokens=8)
    assert pair.tokenizer is not None
    short, long = plain.tokenize(pair.tokenizer), prompts.tokenize(pair.tokenizer)
    pairs = ((short.with_instruction, long.with_instruction), (short.without_instruction, long.without_instruction))
    for before, after in pairs:
        assert all(new[: len(old)] == old and len(new) == len(old) + 8 for old, new in zip(before, after, strict=True))
    assert [new[-8:] for new in long.with_instruction] == [new[-8:] for new in long.without_instruction]
    assert prompts.without_responses() == plain
    answering = Answering(max_new_tokens=40)
    anchor = fit_anchor(pair, prompts, positions=range(-8, 0), gates="behaviour", answering=answering)
    report = report_of(anchor)
    assert report.behaviour is not None
    arms = {arm.name: arm.n_passed for arm in report.behaviour.arms}
    assert (arms["base"], arms["specialized"]) == (0, 6)  # answers begin at the prompt's end, not behind a plain one
    anchor = replace(anchor, report=None)  # it is unstable: this pair decides about its form at the first token
    effects, oracle = (localize(pair, prompts, anchor, units="L0,L1.mlp", engine=one) for one in ("suffix", "swap"))
    torch.testing.assert_close(effects.per_prompt, oracle.per_prompt, rtol=0, atol=1e-5 * float(oracle.gap.mean()))


def test_a_response_does_not_go_with_token_ids(pair: ModelPair) -> None:
    ids = ContrastPrompts.from_token_ids(with_instruction=[[1, 2]], without_instruction=[[1]])
    with pytest.raises(PromptError, match="prompts as text"):
        with_responses(pair, ids, n_tokens=4)
