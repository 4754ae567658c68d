"""What merged models are to restore is the formula of docs/merging.md, however the prompts are dealt out to passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from conftest import SHAPES, build_model
from weightpatch import Anchor
from weightpatch.errors import MergeError
from weightpatch.merging.restoring import Aim, Spot, Weighing, restoring, restoring_states, streams, together

DRAW = torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Base, two experts, and a merge of them."""
    return {name: build_model("llama-gqa", seed=seed) for seed, name in enumerate(("base", "one", "two", "merge"))}


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def make_aim(expert: str, task: str, anchor: Anchor, lengths: tuple[int, ...]) -> Aim:
    n = len(lengths) // 2 if anchor.is_difference else len(lengths)
    return Aim(
        expert=expert,
        task=task,
        anchor=anchor,
        token_ids=tuple(tuple(torch.randint(0, 61, (length,), generator=DRAW).tolist()) for length in lengths),
        base=torch.zeros(n, dtype=torch.float64),
        specialized=torch.rand(n, generator=DRAW, dtype=torch.float64) + 1,
    )


@pytest.fixture(scope="module")
def aims() -> list[Aim]:
    """Three tasks of two experts: other layers, positions, readouts, and prompts of other lengths."""
    direction = torch.randn(24, generator=DRAW)
    return [
        make_aim("one", "a", Anchor(layer=1, direction=direction), (4, 9, 6)),
        make_aim("one", "b", Anchor(layer=2, direction=direction, positions=(-1, -3)), (5, 7)),
        make_aim("two", "c", Anchor(layer=3, direction=direction, readout="contrast"), (6, 8, 4, 5)),
    ]


def stream(model: PreTrainedModel, ids: tuple[int, ...], layer: int, position: int) -> torch.Tensor:
    """By transformers itself; behind its last layer the norm is undone by a hook that reads before it."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with hook, torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return (seen[0] if layer == model.config.num_hidden_layers else hidden[layer])[0, position]


def share(one: Aim) -> float:
    """What each prompt of a task counts: experts alike, their tasks alike, their prompts alike."""
    return {"a": 1 / 2 / 2 / 3, "b": 1 / 2 / 2 / 2, "c": 1 / 2 / 2}[one.task]


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_anchors_are_restored_by_their_squared_distances_in_gaps(
    models: dict[str, PreTrainedModel], aims: list[Aim], batch_tokens: int
) -> None:
    wanted = 0.0
    for one in aims:
        read = torch.stack(
            [
                torch.stack(
                    [
                        stream(models["merge"], ids, one.anchor.layer, position).double() @ one.anchor.direction
                        for position in one.anchor.positions
                    ]
                ).mean()
                for ids in one.token_ids
            ]
        )
        read = read[:2] - read[2:] if one.anchor.is_difference else read
        gap = (one.specialized - one.base).mean()
        wanted += share(one) * float(((read - one.specialized) / gap).square().sum())
    losses = restoring(models["base"], aims, batch_tokens=batch_tokens)
    found = sum(float(loss(weights_of(models["merge"]))) for loss in losses)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert (len(losses) == 1) == (batch_tokens == 4096)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_streams_are_restored_by_their_squared_distances_in_that_of_base_and_expert(
    models: dict[str, PreTrainedModel], aims: list[Aim], batch_tokens: int
) -> None:
    experts = {name: weights_of(models[name]) for name in ("one", "two")}
    wanted = 0.0
    for one in aims:
        layers = range(one.anchor.layer, 4)
        for layer in layers:
            places = [(ids, position) for ids in one.token_ids for position in one.anchor.positions]
            merged, theirs, ours = (
                torch.stack([stream(models[name], ids, layer, position) for ids, position in places])
                for name in ("merge", one.expert, "base")
            )
            ratio = (merged - theirs).square().sum() / (theirs - ours).square().sum()
            wanted += share(one) * len(one.base) * float(ratio) / len(layers)
    losses = restoring_states(models["base"], aims, experts.__getitem__, Weighing(streams=1), batch_tokens=batch_tokens)
    assert (len(losses) == 1) == (batch_tokens == 4096)
    assert sum(float(loss(weights_of(models["merge"]))) for loss in losses) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_outputs_are_restored_by_the_divergence_from_the_experts_next_token(
    models: dict[str, PreTrainedModel], aims: list[Aim], batch_tokens: int
) -> None:
    experts = {name: weights_of(models[name]) for name in ("one", "two")}
    wanted = 0.0
    for one in aims:
        for ids in one.token_ids:
            with torch.no_grad():
                theirs, merged = (
                    models[name](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                    for name in (one.expert, "merge")
                )
            divergence = (theirs.exp() * (theirs - merged)).sum(-1)
            read = [float(divergence[position]) for position in one.anchor.positions]
            wanted += share(one) * len(one.base) * sum(read) / len(read) / len(one.token_ids)
    losses = restoring_states(models["base"], aims, experts.__getitem__, Weighing(outputs=1), batch_tokens=batch_tokens)
    assert (len(losses) == 1) == (batch_tokens == 4096)
    assert sum(float(loss(weights_of(models["merge"]))) for loss in losses) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_both_are_restored_by_their_weighted_sum(
    models: dict[str, PreTrainedModel], aims: list[Aim], batch_tokens: int
) -> None:
    experts = {name: weights_of(models[name]) for name in ("one", "two")}
    streams, outputs, both = (
        sum(
            float(loss(weights_of(models["merge"])))
            for loss in restoring_states(models["base"], aims, experts.__getitem__, weighing, batch_tokens=batch_tokens)
        )
        for weighing in (Weighing(streams=1), Weighing(outputs=1), Weighing(streams=10, outputs=0.5))
    )
    assert both == pytest.approx(10 * streams + 0.5 * outputs, rel=1e-5)
    assert min(streams, outputs) > 0.1


@pytest.mark.parametrize("weighing", [Weighing(streams=1), Weighing(outputs=1), Weighing(streams=10, outputs=1)])
def test_nothing_is_left_to_restore_in_the_expert_itself(
    models: dict[str, PreTrainedModel],
    aims: list[Aim],
    weighing: Weighing,
) -> None:
    own = [one for one in aims if one.expert == "one"]
    (loss,) = restoring_states(models["base"], own, {"one": weights_of(models["one"])}.__getitem__, weighing)
    left, whole = (float(loss(weights_of(models[name]))) for name in ("one", "base"))
    assert left < 1e-6 * whole  # float32, and other batches than those that were restored from


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_along_answers_states_are_those_behind_which_each_token_of_an_answer_and_its_end_are_written(
    models: dict[str, PreTrainedModel], aims: list[Aim], batch_tokens: int
) -> None:
    answers = ((7, 3, 11, 5), (), (2,))  # (): one that ends at once
    one = replace(aims[0], anchor=replace(aims[0].anchor, layer=2), answers=answers)
    sizes, divergences = [], []
    for ids, answer in zip(one.token_ids, answers, strict=True):
        whole = (*ids, *answer)
        places = range(len(ids) - 1, len(whole))
        read = {
            name: torch.stack([torch.stack([stream(model, whole, layer, at) for at in places]) for layer in (2, 3)])
            for name, model in models.items()
        }
        distances = [(read[name] - read["one"]).square().sum(-1).mean(1) for name in ("merge", "base")]
        sizes.append(torch.stack(distances))
        with torch.no_grad():
            theirs, merged = (
                models[name](input_ids=torch.tensor([whole])).logits[0, list(places)].log_softmax(-1)
                for name in ("one", "merge")
            )
        divergences.append((theirs.exp() * (theirs - merged)).sum(-1).mean())
    ours, gaps = torch.stack(sizes).mean(dim=0)
    wanted = {"streams": (ours / gaps).mean(), "outputs": torch.stack(divergences).mean()}
    for kind, value in wanted.items():
        given, weighing = {"one": weights_of(models["one"])}, Weighing(**{kind: 1.0})
        losses = restoring_states(models["base"], [one], given.__getitem__, weighing, batch_tokens=batch_tokens)
        found = sum(float(loss(weights_of(models["merge"]))) for loss in losses)
        assert found == pytest.approx(float(value), rel=1e-4)


def test_an_anchor_that_the_expert_reads_no_higher_on_cannot_be_restored_but_its_streams_can(
    models: dict[str, PreTrainedModel], aims: list[Aim]
) -> None:
    turned = replace(aims[0], specialized=-aims[0].specialized)
    with pytest.raises(MergeError, match=r"reads no higher than the base on a .* --policy streams"):
        restoring(models["base"], [turned])
    experts = {"one": weights_of(models["one"])}
    losses = [
        restoring_states(models["base"], [one], experts.__getitem__, Weighing(streams=1)) for one in (turned, aims[0])
    ]
    merge = weights_of(models["merge"])
    assert float(losses[0][0](merge)) == float(losses[1][0](merge)) > 0


@pytest.mark.parametrize("shape", list(SHAPES))
def test_what_all_prompts_begin_with_runs_once_and_changes_neither_streams_nor_gradients(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(shape, seed=1, dtype=torch.float64)
    n_layers = model.config.num_hidden_layers
    prompts = tuple((*range(1, 11), *end) for end in ((11,), (12, 13, 14), (15, 16)))
    spots = [
        Spot(token_ids=prompts, positions=(-1,), first=1, last=n_layers),
        Spot(token_ids=prompts[1:], positions=(10, -2), first=0, last=2),
    ]
    n_tokens: list[int] = []
    counting = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: n_tokens.append(given[0].numel())
    )
    found = {}
    for least in (8, 100):
        monkeypatch.setattr("weightpatch.merging.restoring.LEAST_SHARED", least)
        weights = {name: weight.detach().requires_grad_() for name, weight in model.named_parameters()}
        read = streams(model, spots, weights)
        torch.autograd.backward(torch.stack([(one * one.sin()).sum() for one in read]).sum())
        found[least] = [*read, *(weight.grad for weight in weights.values() if weight.grad is not None)]
    counting.remove()
    assert n_tokens == [10, 5 * 3, 5 * 13]
    assert len(found[8]) == len(found[100])
    largest = max(float(one.detach().abs().max()) for one in found[100])
    for one, other in zip(found[8], found[100], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7 * largest)  # transformers has float32 inside


def test_prompts_of_like_length_share_a_pass_and_others_do_not_pad_them() -> None:
    spots = [Spot(token_ids=((1,) * length,) * 4, positions=(-1,), first=0, last=1) for length in (20, 90, 22, 21, 100)]
    model = build_model("llama-gqa", seed=1)
    sizes: list[tuple[int, ...]] = []
    losses = together(model, [(spot, lambda read, _: read.sum()) for spot in spots], batch_tokens=2000)
    counting = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: sizes.append(tuple(given[0].shape))
    )
    for loss in losses:
        loss({})
    counting.remove()
    n_shared = 19
    assert sizes == [(1, n_shared), (12, 22 - n_shared), (1, 89), (8, 11)]
