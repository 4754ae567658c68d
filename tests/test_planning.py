"""What `--dry-run` tells: the same components, prompts and bytes that the run then has, and no weight read for it."""

from __future__ import annotations

import pytest

from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.errors import AnchorError, ComponentError, PromptError
from weightpatch.localization import plan
from weightpatch.planning import plan_run
from weightpatch.run import RunConfig

CONFIG = RunConfig(base="tiny:base", specialized="tiny:specialized", prompts="instructions:title", layer=5)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("weightpatch.sources.FileSource.tensor", refuse)


def test_a_plan_is_what_the_run_then_has(request: pytest.FixtureRequest) -> None:
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized")
    request.getfixturevalue("no_weights")
    found = plan_run(CONFIG)
    anchor = Anchor(layer=5, direction=[1.0] * pair.architecture.n_features)
    below, _ = plan(pair, anchor, CONFIG.units)
    assert sum(found.n_components.values()) == len(below)
    assert found.base_bytes == sum(p.numel() * p.element_size() for p in pair.base.parameters())
    assert found.layer_bytes == sum(p.numel() * 4 for p in pair.base.model.layers[0].parameters())
    rows = ContrastPrompts.load("instructions:title").split("localize").tokenize(pair.tokenizer).with_instruction
    task = found.tasks["title"]
    assert (task.n_prompts, task.n_tokens) == (len(rows), sum(map(len, rows)))
    prefixes = {row[: end + 1] for row in rows for end in range(len(row))}
    assert task.n_packed == len(prefixes) < task.n_tokens
    assert task.n_layer_calls == sum(5 - (component.layer or 0) for component in below)
    assert task.seconds is not None
    assert 0 < task.seconds < 60


def test_a_searched_anchor_is_reckoned_at_the_deepest_layer_searched() -> None:
    found = plan_run(CONFIG.model_copy(update={"layer": None}))
    assert found.searched
    assert found.layer == 7
    assert "searched, layer 7 at the deepest" in str(found)


def test_twice_the_dtype_is_twice_the_memory() -> None:
    single, double = (plan_run(CONFIG.model_copy(update={"dtype": dtype})) for dtype in ("float32", "float64"))
    assert (double.base_bytes, double.layer_bytes) == (2 * single.base_bytes, 2 * single.layer_bytes)
    assert abs(double.batch_tokens - single.batch_tokens / 2) <= 1


def test_what_the_run_would_refuse_the_plan_refuses() -> None:
    with pytest.raises(ComponentError, match="unknown units: 'haeds'"):
        plan_run(CONFIG.model_copy(update={"units": "haeds"}))
    with pytest.raises(PromptError):
        plan_run(CONFIG.model_copy(update={"prompts": "instructions:titel"}))
    with pytest.raises(AnchorError, match="at layer 99: this model has 8 layers"):
        plan_run(CONFIG.model_copy(update={"layer": 99}))
    with pytest.raises(AnchorError, match="of heads 0 components lie below"):
        plan_run(CONFIG.model_copy(update={"layer": 0, "units": "heads"}))
    with pytest.raises(ComponentError, match=r"this model has no experts\. Name some of blocks"):
        plan_run(CONFIG.model_copy(update={"units": "experts"}))
