from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weightpatch import ContrastPrompts, ModelPair, fit_anchor, localize, patched
from weightpatch.behaviour import Answering
from weightpatch.component import Component, components, encloses
from weightpatch.curves import CurveSettings, validate
from weightpatch.errors import PromptError, RunError
from weightpatch.run import Run, RunConfig
from weightpatch.stages import fit_anchors, measure_effects, start
from weightpatch.validation import (
    References,
    forced_log_probs,
    measure_patch,
    random_like,
    rank,
    read_references,
)

EVERYTHING = "blocks,ends"


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.fixture(scope="module")
def prompts() -> ContrastPrompts:
    return ContrastPrompts.load("instructions:sections", n_queries=6)


@pytest.fixture(scope="module")
def references(pair: ModelPair, prompts: ContrastPrompts) -> References:
    anchor = fit_anchor(pair, prompts.split("fit"), layer=6)
    return read_references(pair, prompts.split("validate"), anchor, n_response_tokens=12)


@pytest.mark.parametrize("recipient", ["base", "specialized"])
def test_patching_everything_gives_the_other_model_and_nothing_changes_nothing(
    pair: ModelPair, references: References, recipient: str
) -> None:
    answering = Answering(max_new_tokens=40)
    nothing, everything = (
        measure_patch(pair, references, patch, recipient=recipient, answering=answering)  # type: ignore[arg-type]
        for patch in ((), EVERYTHING)
    )
    like_base, like_specialized = (nothing, everything) if recipient == "base" else (everything, nothing)
    assert like_base.recovery.estimate == pytest.approx(0, abs=1e-12)
    assert like_specialized.recovery.estimate == pytest.approx(1, abs=1e-12)
    assert like_base.kl_recovery == pytest.approx(0, abs=1e-12)
    assert like_specialized.kl.estimate == 0
    assert (like_base.n_passed, like_specialized.n_passed) == (0, 6)


def test_a_joint_patch_over_many_layers_recovers_more_than_its_best_member(
    pair: ModelPair, references: References
) -> None:
    members = ["L0", "L1", "L2", "L3"]
    single = [measure_patch(pair, references, [member]).recovery.estimate for member in members]
    joint = measure_patch(pair, references, members)
    assert joint.recovery.low > max(single)
    assert joint.kl_recovery > 0.5
    assert joint.passed is None
    assert joint.patch == tuple(members)


def test_forced_log_probs_are_those_of_one_prompt_at_a_time(pair: ModelPair, references: References) -> None:
    together = list(forced_log_probs(pair.base, references.token_ids, references.responses))
    for ids, response, found in zip(references.token_ids, references.responses, together, strict=True):
        with torch.no_grad():
            logits = pair.base(input_ids=torch.tensor([[*ids, *response]])).logits[0]
        expected = torch.log_softmax(logits[len(ids) - 1 : len(ids) - 1 + len(response)], dim=-1)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_kl_is_the_textbooks(pair: ModelPair, references: References) -> None:
    found = measure_patch(pair, references, "L0,L1")
    with patched(pair, "L0,L1") as model:
        other = list(forced_log_probs(model, references.token_ids, references.responses))
    by_prompt = [
        torch.nn.functional.kl_div(theirs.double(), own.double(), log_target=True, reduction="none").sum(-1).mean()
        for own, theirs in zip(references.log_probs, other, strict=True)
    ]
    assert found.kl.estimate == pytest.approx(float(torch.stack(by_prompt).mean()))
    assert found.kl.low < found.kl.estimate < found.kl.high


def test_an_empty_response_is_compared_at_the_first_token(pair: ModelPair, references: References) -> None:
    (found,) = forced_log_probs(pair.base, references.token_ids[:1], [()])
    assert found.shape == (1, pair.base.config.vocab_size)


def test_without_a_tokenizer_there_are_no_responses(pair: ModelPair, prompts: ContrastPrompts) -> None:
    mute = ModelPair(base=pair.base, specialized=pair.specialized)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=6)
    with pytest.raises(PromptError, match="give the pair a tokenizer"):
        read_references(mute, prompts, anchor)


def test_the_ranking_is_by_effect_and_leaves_out_what_encloses_another_unit(
    pair: ModelPair, prompts: ContrastPrompts, references: References
) -> None:
    effects = localize(pair, prompts.split("localize"), references.anchor, units="blocks,mlps,kvs,heads")
    ranked = rank(effects)
    assert {member.unit for member in ranked} == {"mlps", "kvs", "heads"}
    means = dict(zip(effects.components, effects.per_prompt.mean(dim=1).tolist(), strict=True))
    assert [means[member] for member in ranked] == sorted((means[member] for member in ranked), reverse=True)
    assert encloses("blocks", "heads.q")
    assert not encloses("mlps", "heads")
    assert not encloses("heads", "heads")


def test_random_sets_have_as_many_components_of_every_unit(pair: ModelPair) -> None:
    pool = components(pair.architecture, "mlps,heads")
    chosen = [Component.parse("L0.mlp"), Component.parse("L1.mlp"), Component.parse("L3.H1")]
    drawn = random_like(chosen, pool, seed=0)
    assert [member.unit for member in drawn] == ["mlps", "mlps", "heads"]
    assert len(set(drawn)) == 3
    assert drawn != random_like(chosen, pool, seed=1)


def test_a_validation_goes_on_where_it_stopped_and_refuses_other_settings(pair: ModelPair, tmp_path: Path) -> None:
    prompts = ContrastPrompts.load("instructions:sections", n_queries=6)
    config = RunConfig(base="tiny:base", specialized="tiny:specialized", units="mlps,heads", layer=4, gates="readout")
    run = start(config, pair, prompts, tmp_path / "run")
    for stage in (fit_anchors, measure_effects):
        for _ in stage(run, pair):
            pass
    settings = CurveSettings(shares=(0.1, 0.5, 1.0), n_prompts=4, recipients=("base", "specialized"), max_new_tokens=24)
    steps = list(validate(run, pair, settings))
    file = run.folder("sections") / "validation.json"
    whole = file.read_bytes()
    points = run.validation("sections")["points"]
    assert steps[-1].done == steps[-1].total == len(points) == 12
    assert [(point["arm"], point["k"]) for point in points[:6]] == [
        ("top", 0), ("top", 4), ("random 1", 4), ("top", 18), ("random 1", 18), ("top", 36),
    ]  # fmt: skip
    record = json.loads(whole)
    record["points"] = record["points"][:5]
    file.write_text(json.dumps(record))
    assert [step.done for step in validate(run, pair, settings)] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert file.read_bytes() == whole
    with pytest.raises(RunError, match="other settings"):
        list(validate(Run.open(run.path), pair, CurveSettings(n_prompts=4)))
