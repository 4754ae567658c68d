"""Carriers learn what they are taught, the rest drifts without spoiling it, and nothing that was learned is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import LlamaForCausalLM

from plants import design_of, weights_of
from weightpatch.architecture import Architecture
from weightpatch.checkpoint import find, read_tokenizer
from weightpatch.component import Component, slices
from weightpatch.planted.language import texts_of
from weightpatch.planted.low_rank import LowRank
from weightpatch.planted.planting import TINY_COURSE, Check, pass_rate_with, plant
from weightpatch.planted.training import IGNORED, Lesson, Schedule, answer_loss, train


def test_training_moves_a_difference_towards_its_lesson_and_leaves_the_base(base: LlamaForCausalLM) -> None:
    tokenizer = read_tokenizer(find("tiny:base"))
    assert tokenizer is not None
    before = {name: parameter.clone() for name, parameter in weights_of(base).items()}
    architecture = Architecture.of(base)
    carrier = Component.parse("L1.mlp")
    part = LowRank.start(architecture, before, {carrier: 0.3}, rank=8, seed=0)
    lesson = Lesson(weight=1, mix={("title", "title"): 1.0}, fixed={})
    start = {name: change.detach() for name, change in part.dense(before).items()}
    assert pass_rate_with(base, tokenizer, start, "title") <= 0.1
    train(base, texts_of(tokenizer), [part], [lesson], Schedule(n_steps=32, learning_rate=1e-2), seed=0)
    after = {name: change.detach() for name, change in part.dense(before).items()}
    assert pass_rate_with(base, tokenizer, after, "title") >= 0.9
    assert all(torch.equal(before[name], parameter) for name, parameter in weights_of(base).items())


def test_where_members_are_left_out_the_others_are_held_and_only_first_tokens_are_learned(
    base: LlamaForCausalLM,
) -> None:
    weights = weights_of(base)
    members = [Component.parse(address) for address in ("L0.H0", "L0.H1", "L1.H2")]
    part = LowRank.start(Architecture.of(base), weights, dict.fromkeys(members, 0.3), rank=4, seed=0)
    whole, less = part.dense(weights), part.dense(weights, members[:1])
    for name, change in whole.items():
        for member in members:
            for piece in slices(Architecture.of(base), member):
                if piece.parameter == name:
                    wanted = torch.zeros_like(piece.of(change)) if member == members[0] else piece.of(change)
                    assert torch.equal(piece.of(less[name]), wanted)

    seen: list[tuple[int, int]] = []
    answer = [5, 6, 7]

    def texts(*_: object) -> tuple[list[int], int]:
        return [3, 4, *answer], 2

    original = torch.nn.functional.cross_entropy

    def counting(logits: Tensor, wanted: Tensor) -> Tensor:
        seen.append((len(wanted), len(set(wanted.tolist()))))
        return original(logits, wanted)

    lesson = Lesson(weight=1, mix={(None, "plain"): 1.0}, fixed={}, left_out=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightpatch.planted.training.functional.cross_entropy", counting)
        train(base, texts, [part], [lesson], Schedule(n_steps=12, learning_rate=1e-3, n_sequences=2), seed=0)
    assert set(seen) == {(2, 1), (6, 3)}  # first tokens of two sequences, or all three of each


@pytest.mark.parametrize("n_shared", [2, 12])
def test_the_loss_is_that_of_whole_sequences_however_much_they_share(base: LlamaForCausalLM, n_shared: int) -> None:
    draw = torch.Generator().manual_seed(n_shared)
    ids = torch.randint(5, 1600, (4, 24), generator=draw)
    ids[:, :n_shared] = ids[0, :n_shared]
    labels = torch.full_like(ids, IGNORED)
    for row, (start, stop) in enumerate([(13, 17), (15, 22), (14, 15), (16, 20)]):
        labels[row, start:stop] = ids[row, start:stop]
    name = "model.layers.1.mlp.up_proj.weight"
    found = {}
    for way in ("whole", "short"):
        weight = base.get_parameter(name).detach().clone().requires_grad_()
        if way == "whole":
            logits = functional_call(base, {name: weight}, kwargs={"input_ids": ids}).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        else:
            loss = answer_loss(base, {name: weight}, ids, labels)
        torch.autograd.backward(loss)
        found[way] = (loss.detach(), weight.grad)
    torch.testing.assert_close(found["short"], found["whole"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("most_rounds", "n_rounds"), [(1, 1), (4, 2)])
def test_the_rest_drifts_in_rounds_until_everything_is_as_wanted(
    base: LlamaForCausalLM,
    architecture: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    most_rounds: int,
    n_rounds: int,
) -> None:
    rates = iter([1.0, *(1.0, 1.0, 0.5, 0.0), *(1.0, 1.0, 1.0, 0.0)])  # carriers; then all three ways, and without them
    monkeypatch.setattr("weightpatch.planted.planting.pass_rate_with", lambda *_: next(rates))
    short = Schedule(n_steps=1, learning_rate=1e-3, n_sequences=2)
    course = replace(TINY_COURSE, carriers=short, distractors=short, drifting=short, most_rounds=most_rounds)
    tokenizer = read_tokenizer(find("tiny:base"))
    assert tokenizer is not None
    design = design_of(architecture, "below", "mlps")
    rounds: list[Sequence[Check]] = []
    steps: list[None] = []
    found = plant(
        base,
        tokenizer,
        design,
        texts=texts_of(tokenizer),
        course=course,
        on_step=lambda: steps.append(None),
        on_checked=rounds.append,
    )
    assert len(rounds) == n_rounds
    assert len(steps) == 2 + n_rounds
    assert found.took == (n_rounds == 2)
    assert [one.rate for one in found.checks[1:]] == [1.0, 1.0, 1.0 if n_rounds == 2 else 0.5, 0.0]


def test_an_interrupted_plant_goes_on_behind_its_last_lesson_and_ends_the_same(
    base: LlamaForCausalLM, architecture: Architecture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "weightpatch.planted.planting.pass_rate_with",
        lambda *_: 1.0,
    )
    short = Schedule(n_steps=2, learning_rate=1e-3, n_sequences=2)
    course = replace(TINY_COURSE, carriers=short, distractors=short, drifting=short)
    tokenizer = read_tokenizer(find("tiny:base"))
    assert tokenizer is not None
    design = design_of(architecture, "below", "mlps")
    steps: list[None] = []

    def run(kept_in: Path | None, last: int | None = None) -> list[Tensor]:
        def on_step() -> None:
            steps.append(None)
            if len(steps) == last:
                raise KeyboardInterrupt

        steps.clear()
        texts = texts_of(tokenizer)
        parts = plant(base, tokenizer, design, texts=texts, course=course, on_step=on_step, kept_in=kept_in).parts
        return [tensor.detach() for part in parts for tensor in part.trained()]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "kept", last=3)
    resumed = run(tmp_path / "kept")
    n_resumed = len(steps)
    whole = run(None)
    assert len(whole) == len(resumed)
    assert all(map(torch.equal, whole, resumed))
    assert n_resumed == len(steps) - 2
