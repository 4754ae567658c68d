"""Learned coefficients restore what experts compute, go on where they stopped, and follow every setting."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import build_model
from merges import BASE, PLANTS, decide
from weightpatch import ModelPair
from weightpatch.component import components
from weightpatch.errors import MergeError
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.combining import METHODS
from weightpatch.merging.experts import Expert
from weightpatch.merging.learning import Blend, Step, Training, learn
from weightpatch.merging.merge import merge
from weightpatch.merging.resolving import Choice, Resolved, Rule
from weightpatch.merging.writing import LEARNING

FEW = Training(n_steps=6)


@pytest.fixture(scope="module")
def learned(experts: dict[str, Expert]) -> Resolved:
    return decide(experts, rule=Rule(policy="anchors", units="attns,mlps", training=FEW)).resolved


def test_learned_coefficients_restore_held_out_anchors_better_than_equal_ones(learned: Resolved) -> None:
    before = sum((one.before - 1) ** 2 for one in learned.restored)
    after = sum((one.after - 1) ** 2 for one in learned.restored)
    assert [one.task for one in learned.restored] == [*PLANTS.values()]
    assert after < before / 2


@pytest.mark.parametrize(
    "policy", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("streams", "outputs")), "streams+outputs"]
)
def test_restored_streams_and_outputs_restore_held_out_anchors_that_they_were_not_learned_from(
    policy: Choice, experts: dict[str, Expert]
) -> None:
    found = decide(experts, rule=Rule(policy=policy, training=FEW)).resolved.restored
    assert sum((one.after - 1) ** 2 for one in found) < sum((one.before - 1) ** 2 for one in found)


@pytest.mark.parametrize("changed", [{"n_steps": 2}, {"stop_at": 4}, {"learning_rate": 0.01}, {"penalty": 50.0}])
def test_every_setting_of_learning_changes_coefficients(
    experts: dict[str, Expert], learned: Resolved, changed: dict[str, float]
) -> None:
    rule = Rule(policy="anchors", units="attns,mlps", training=replace(FEW, **changed))  # type: ignore[arg-type]
    other = decide(experts, rule=rule).resolved.coefficients
    assert any(
        not torch.equal(one, two)
        for name, every in learned.coefficients.tensors.items()
        for one, two in zip(every, other.tensors[name], strict=True)
    )


def test_states_restored_along_answers_give_other_coefficients_and_restore_anchors_too(
    experts: dict[str, Expert],
) -> None:
    plain = Rule(units="attns,mlps", training=FEW)
    one, along, longer = (
        decide(experts, rule=replace(plain, training=Training(n_steps=2, answer_tokens=n))).resolved for n in (0, 2, 4)
    )
    assert one.weights != along.weights != longer.weights
    assert sum((own.after - 1) ** 2 for own in along.restored) < sum((own.before - 1) ** 2 for own in along.restored)
    with pytest.raises(MergeError, match="not along answers"):
        replace(plain, policy="anchors", training=replace(FEW, answer_tokens=4))


def test_learning_needs_anchors_and_no_effects(experts: dict[str, Expert], tmp_path: Path) -> None:
    bare = {}
    for name, one in experts.items():
        assert one.run
        shutil.copytree(one.run, tmp_path / name)
        for file in (tmp_path / name).rglob("effects.*"):
            file.unlink()
        bare[name] = replace(one, run=tmp_path / name)
    with pytest.raises(MergeError, match="has no effects of any task"):
        decide(bare, rule=Rule(policy="soft"))
    rule = Rule(policy="streams", units="mlps", training=Training(n_steps=1))
    ours, theirs = (decide(every, rule=rule, device_map="cpu").resolved.weights for every in (bare, experts))
    assert ours == theirs


def test_learning_goes_on_behind_its_last_step_ends_with_the_same_bytes_and_is_not_done_twice(
    experts: dict[str, Expert], tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(step: Step) -> None:
        if step.number == 2:
            raise StoppedError

    every = [*experts.values()]
    rule = Rule(policy="streams", units="attns,mlps", training=Training(n_steps=4))
    with pytest.raises(StoppedError):
        merge(BASE, every, tmp_path / "stopped", rule=rule, any_adapter_base=True, on_step=stop)
    assert [file.name for file in (tmp_path / "stopped").iterdir()] == [LEARNING]
    changed = replace(rule, training=Training(n_steps=5))
    for other in (changed, replace(rule, units="mlps,attns")):  # as many components, in another order
        with pytest.raises(MergeError, match="another merge has learned so far"):
            merge(BASE, every, tmp_path / "stopped", rule=other, any_adapter_base=True)
    steps: list[int] = []
    for name in ("stopped", "whole", "whole"):
        merge(
            BASE,
            every,
            tmp_path / name,
            rule=rule,
            any_adapter_base=True,
            on_step=lambda step: steps.append(step.number),
        )
    assert steps == [3, 4, 1, 2, 3, 4]
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("stopped", "whole")
    )
    assert one == other
    with pytest.raises(MergeError, match="another merge has learned so far"):
        merge(BASE, every, tmp_path / "whole", rule=changed, any_adapter_base=True)


def test_what_was_learned_as_a_plain_sum_is_merged_as_one(experts: dict[str, Expert]) -> None:
    for method in (METHODS["ties"], replace(METHODS["task-arithmetic"], scale=0.3)):
        with pytest.raises(MergeError, match="learns coefficients of a plain sum"):
            decide(experts, rule=Rule(policy="streams"), method=method)


def test_given_coefficients_leave_nothing_to_weights(experts: dict[str, Expert], learned: Resolved) -> None:
    weighted = {name: replace(one, weight=0.5) for name, one in experts.items()}
    with pytest.raises(MergeError, match="would change nothing"):
        decide(weighted, coefficients=learned.coefficients)
    turned = learned.coefficients.of([*reversed(learned.coefficients.experts)])
    merged = decide(experts, coefficients=turned).merge
    assert merged.coefficients.experts == tuple(experts)
    for name, every in learned.coefficients.tensors.items():
        assert all(torch.equal(*pair) for pair in zip(every, merged.coefficients.tensors[name], strict=True))


def test_components_that_no_anchor_sees_keep_the_experts_weight(learned: Resolved) -> None:
    for own in learned.weights.values():
        late = [weight for one, weight in own.items() if (one.layer or 0) >= 6]
        assert late == [1.0] * len(late)
        assert len(late) == 4
        assert all(weight != 1.0 for one, weight in own.items() if one.unit == "mlps" and (one.layer or 0) < 6)


@pytest.mark.parametrize("shape", ["llama-gqa", "gpt2", "mixtral"])
def test_a_blend_is_the_merge_of_its_table_and_its_gradient_the_finite_difference(shape: str) -> None:
    models = [build_model(shape, seed=seed, dtype=torch.float64) for seed in range(3)]
    base = models[0]
    names = [name for name, _ in base.named_parameters()]
    changes = {
        f"e{place}": {name: model.get_parameter(name).detach() - base.get_parameter(name).detach() for name in names}
        for place, model in enumerate(models[1:])
    }
    pair = ModelPair(base=base, specialized=models[1])
    blend = Blend.of(base, changes, components(pair.architecture, "heads,kvs,mlps"))
    draw = torch.Generator().manual_seed(0)
    table = torch.rand(2, len(blend.components) + 1, generator=draw, dtype=torch.float64)
    merged = blend.weights(table)
    rest = dict(zip(changes, table[:, -1].tolist(), strict=True))
    named_weights = blend.by_component(table)
    coefficients = Coefficients.by_component(pair.architecture, named_weights, rest=rest)
    for name in names:
        parts = (c * changes[one][name] for c, one in zip(coefficients.tensors[name], changes, strict=True))
        wanted = base.get_parameter(name).detach() + sum(parts)
        torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=0)

    probe = {name: torch.randn(merged[name].shape, generator=draw, dtype=torch.float64) for name in names}

    def value(at: torch.Tensor) -> torch.Tensor:
        return sum(((probe[name] * own.square()).sum() for name, own in blend.weights(at).items()), torch.zeros(()))

    leaf = table.clone().requires_grad_()
    torch.autograd.backward(value(leaf))
    assert leaf.grad is not None
    step = torch.zeros_like(table)
    step[1, 3] = 1e-6
    slope = (value(table + step) - value(table - step)) / 2e-6
    torch.testing.assert_close(leaf.grad[1, 3], slope, rtol=1e-5, atol=1e-7)


def test_learning_finds_the_coefficients_that_were_used() -> None:
    base = build_model("llama-gqa", seed=0)
    other = build_model("llama-gqa", seed=1)
    names = [name for name, _ in base.named_parameters()]
    change = {name: other.get_parameter(name).detach() - base.get_parameter(name).detach() for name in names}
    pair = ModelPair(base=base, specialized=other)
    blend = Blend.of(base, {"e": change}, components(pair.architecture, "attns,mlps"))
    hidden = torch.rand(1, 7, generator=torch.Generator().manual_seed(1))
    wanted = blend.weights(hidden)

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(((own - wanted[name]).square().sum() for name, own in weights.items()), torch.zeros(()))

    begin = torch.full((1, 7), 0.5)
    begin[:, -1] = hidden[:, -1]
    found = list(learn(blend, [loss], begin, Training(n_steps=200, penalty=0.0)))
    torch.testing.assert_close(found[-1].table, hidden, atol=0.02, rtol=0)
    assert found[0].loss == float(loss(blend.weights(begin))) > found[-1].loss
    early = list(learn(blend, [loss], begin, Training(n_steps=200, stop_at=50, penalty=0.0)))
    assert len(early) == 50
    assert torch.equal(early[-1].table, found[49].table)
    near = list(learn(blend, [loss], begin, Training(n_steps=200, penalty=1e6)))
    torch.testing.assert_close(near[-1].table, begin, atol=0.02, rtol=0)
