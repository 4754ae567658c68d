from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import build_model, build_pair
from weightpatch import Anchor, ContrastPrompts, ModelPair, fit_anchor
from weightpatch.errors import AnchorError, PromptError
from weightpatch.residuals import read_residuals


def marked_prompts(n: int = 16, *, seed: int = 0) -> ContrastPrompts:
    """Random queries; the instruction is a fixed tail, so that it moves the last position the same way each time."""
    generator = torch.Generator().manual_seed(seed)
    queries = [torch.randint(1, 50, (6 + place % 3,), generator=generator).tolist() for place in range(n)]
    return ContrastPrompts.from_token_ids(
        with_instruction=[[*query, 55, 57, 59] for query in queries],
        without_instruction=[[*query, 3] for query in queries],
    )


def shifted_pair(direction: torch.Tensor, *, layer: int) -> ModelPair:
    """A pair whose specialized side writes `direction` at `layer` wherever token 59 stands, and is the base otherwise.

    Token 59's embedding, alone, has feature 0; the neuron added reads it through a norm that keeps it apart.
    """
    models = [build_model("llama-gqa", seed=1, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            model.model.embed_tokens.weight[:, 0] = 0
            model.model.embed_tokens.weight[59, 0] = 20
        mlp = models[1].model.layers[layer].mlp
        mlp.gate_proj.weight[0] = 0
        mlp.gate_proj.weight[0, 0] = 5
        mlp.gate_proj.bias[0] = -8
        mlp.up_proj.weight[0] = 0
        mlp.up_proj.bias[0] = 1
        mlp.down_proj.weight[:, 0] = direction
    return ModelPair(base=models[0], specialized=models[1])


def test_the_direction_is_the_mean_difference_at_the_last_token() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    prompts = marked_prompts()
    anchor = fit_anchor(pair, prompts, layer=2)
    tokenized = prompts.tokenize(None)
    with_, without = (
        read_residuals(pair.specialized, side, layers=[2], positions=[-1])[0, :, 0]
        for side in (tokenized.with_instruction, tokenized.without_instruction)
    )
    expected = (with_ - without).mean(dim=0)
    torch.testing.assert_close(anchor.direction, expected / expected.norm())
    assert anchor.report is not None
    levels, unit = anchor.report.levels, expected / expected.norm()
    assert levels.specialized_with == pytest.approx(float((with_ @ unit).mean()))
    assert levels.specialized_without == pytest.approx(float((without @ unit).mean()))


def test_residuals_are_those_that_transformers_itself_reports() -> None:
    model = build_model("gpt2", seed=1, dtype=torch.float64)
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = read_residuals(model, [ids], layers=[0, 1, 2, 3], positions=[-1, 1])
    for layer in range(3):
        torch.testing.assert_close(found[layer, 0], expected[layer][0, [-1, 1]])
    torch.testing.assert_close(model.transformer.ln_f(found[3, 0]), expected[3][0, [-1, 1]])


def test_an_anchor_of_a_real_behaviour_passes_every_gate_and_its_direction_is_found() -> None:
    written = torch.zeros(24, dtype=torch.float64)
    written[5] = 3.0
    pair = shifted_pair(written, layer=1)
    anchor = fit_anchor(pair, marked_prompts(), layer=2)
    assert anchor.report is not None
    assert anchor.report.stable
    assert anchor.report.gap > 0
    assert [gate.name for gate in anchor.report.gates] == ["split-half-cosine", "auc", "gap"]


def test_the_layer_search_finds_no_gap_below_the_layer_that_changed() -> None:
    written = torch.zeros(24, dtype=torch.float64)
    written[5] = 3.0
    anchor = fit_anchor(shifted_pair(written, layer=1), marked_prompts(), search=(0.0, 1.0))
    assert anchor.report is not None
    assert anchor.report.search[0] == anchor.report.search[1] == 0.0
    assert anchor.layer >= 2
    assert anchor.report.search[anchor.layer] == max(anchor.report.search.values())


def test_an_instruction_that_the_specialized_model_ignores_fails_its_gates() -> None:
    pair = build_pair("llama-gqa", dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 61, (2, 24, 7), generator=generator).tolist()
    prompts = ContrastPrompts.from_token_ids(with_instruction=noise[0], without_instruction=noise[1])
    anchor = fit_anchor(pair, prompts, layer=2)
    assert anchor.report is not None
    assert not anchor.report.stable
    assert {gate.name for gate in anchor.report.gates if not gate.passed} >= {"split-half-cosine", "auc"}


def test_both_estimators_agree_where_the_difference_is_one_vector() -> None:
    pair, prompts = build_pair("llama-gqa", dtype=torch.float64), marked_prompts()
    mean, principal = (
        fit_anchor(pair, prompts, layer=3, estimator=kind).direction
        for kind in ("mean-difference", "principal-component")
    )
    assert float(mean @ principal) > 0.5


def test_an_anchor_survives_saving_with_everything_known_about_it(tmp_path: Path) -> None:
    anchor = fit_anchor(build_pair("llama-gqa"), marked_prompts(), positions=[-1, -2], readout="contrast")
    anchor.save(tmp_path / "anchor.safetensors")
    again = Anchor.load(tmp_path / "anchor.safetensors")
    assert torch.equal(again.direction, anchor.direction)
    assert (again.layer, again.positions, again.readout) == (anchor.layer, (-1, -2), "contrast")
    assert again.report == anchor.report


def test_the_same_prompts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit_anchor(build_pair("llama-gqa"), marked_prompts()).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_anchor_made_by_hand_is_scaled_to_norm_one() -> None:
    anchor = Anchor(layer=2, direction=torch.tensor([3.0, 4.0]), positions=[-1])
    torch.testing.assert_close(anchor.direction, torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert float(anchor.read(torch.tensor([[[1.0, 1.0]]]))) == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": torch.zeros(3)}, "norm 0"),
        ({"direction": torch.tensor([float("nan")])}, "norm nan"),
        ({"direction": torch.ones(2, 2)}, r"shape \[2, 2\]"),
        ({"layer": -1}, "a layer from 0 on"),
        ({"positions": []}, "at least one readout position"),
        ({"readout": "dot"}, "unknown readout 'dot'"),
    ],
)
def test_an_anchor_that_cannot_be_read_with_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AnchorError, match=message):
        Anchor(**{"layer": 1, "direction": torch.ones(3), **fields})  # type: ignore[arg-type]


def test_an_anchor_of_another_model_is_refused() -> None:
    pair = build_pair("llama-gqa")
    with pytest.raises(AnchorError, match="this model has residual streams 0 to 3"):
        Anchor(layer=4, direction=torch.ones(24)).check(pair)
    with pytest.raises(AnchorError, match="has 8 features, the residual stream 24"):
        Anchor(layer=1, direction=torch.ones(8)).check(pair)


def test_too_few_queries_and_prompts_too_short_are_refused() -> None:
    pair = build_pair("llama-gqa")
    with pytest.raises(AnchorError, match="3 different queries of task are too few"):
        fit_anchor(pair, marked_prompts(3))
    with pytest.raises(PromptError, match="prompt p0 has 9 tokens, too few for readout positions"):
        fit_anchor(pair, marked_prompts(), positions=[-40])


def test_prompts_of_several_tasks_are_refused_with_the_way_to_choose_one() -> None:
    rows = (replace(row, task=f"t{place % 2}") for place, row in enumerate(marked_prompts()))
    with pytest.raises(AnchorError, match=r"2 tasks \(t0, t1\).*prompts\.of_task"):
        fit_anchor(build_pair("llama-gqa"), ContrastPrompts(tuple(rows)))


def test_a_layer_without_any_difference_is_passed_over_and_not_chosen() -> None:
    queries = [[3 + place, 7, 9] for place in range(16)]
    prompts = ContrastPrompts.from_token_ids(
        with_instruction=[[*query, 40, 2] for query in queries], without_instruction=[[*query, 2] for query in queries]
    )
    pair = build_pair("llama-gqa", dtype=torch.float64)
    for estimator in ("mean-difference", "principal-component"):
        anchor = fit_anchor(pair, prompts, search=(0.0, 1.0), estimator=estimator)
        assert anchor.report is not None
        assert sorted(anchor.report.search) == [1, 2, 3]
        with pytest.raises(AnchorError, match="the instruction changes nothing"):
            fit_anchor(pair, prompts, layer=0, estimator=estimator)


def test_a_file_that_is_no_anchor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("nothing")
    with pytest.raises(AnchorError, match="cannot read an anchor from"):
        Anchor.load(tmp_path / "x.safetensors")
    with pytest.raises(AnchorError, match="cannot read an anchor from"):
        Anchor.load(tmp_path / "absent.safetensors")
