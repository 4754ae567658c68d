"""What guides a merge: scores of components, true and false ones, and objectives that coefficients are learned from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Weights, logits_with
from torch import Tensor
from torch.nn import functional

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.difference import weight_differences
from weightpatch.localization import localize
from weightpatch.merging.experts import read_scores
from weightpatch.merging.learning import Blend, Loss, Training, learn
from weightpatch.merging.resolving import read_aims
from weightpatch.merging.restoring import Aim, restoring, restoring_streams
from weightpatch.pair import ModelPair
from weightpatch.residuals import batches, pad

UNIFORM = ", uniform of the same means"

Scores = dict[str, dict[Component, float]]


def scores_of(case: Case, kind: str) -> Scores:
    """Expert -> component -> score.

    `exact`: recovery by weight patching; `shuffled`: the same, dealt out anew within each unit; `random`; `size`: the
    relative norm of the difference; `activation`: recovery by activation patching; `bottom`: exact, turned round.
    """
    if kind in case._cache:
        known: Scores = case._cache[kind]
        return known
    chosen = components(case.inputs.architecture, case.units)
    exact = {expert: read_scores(run, set(chosen)) for expert, run in case.runs().items()}
    draw = random.Random(f"{case.name} {kind}")
    match kind:
        case "shuffled":
            found = {expert: _shuffled(own, draw) for expert, own in exact.items()}
        case "random":
            found = {expert: {one: draw.random() for one in own} for expert, own in exact.items()}
        case "size":
            found = {expert: _sizes(case, expert, own) for expert, own in exact.items()}
        case "activation":
            found = {expert: _activation(case, expert, own) for expert, own in exact.items()}
        case "bottom":
            found = {expert: {one: -score for one, score in own.items()} for expert, own in exact.items()}
        case _:
            found = exact
    case._cache[kind] = found
    return found


def _shuffled(scores: Mapping[Component, float], draw: random.Random) -> dict[Component, float]:
    found: dict[Component, float] = {}
    for unit in dict.fromkeys(one.unit for one in scores):
        members = [one for one in scores if one.unit == unit]
        values = [scores[one] for one in members]
        draw.shuffle(values)
        found |= dict(zip(members, values, strict=True))
    return {one: found[one] for one in scores}


def _sizes(case: Case, expert: str, scores: Mapping[Component, float]) -> dict[Component, float]:
    pair = ModelPair.from_pretrained(case.base, case.experts[expert], any_adapter_base=True)
    norms = {row.component: row.relative_norm for row in weight_differences(pair, case.units)}
    return {one: norms[one] for one in scores}


def _activation(case: Case, expert: str, scores: Mapping[Component, float]) -> dict[Component, float]:
    file = case.folder / f"{expert}-activation.json"
    if not file.is_file():
        run = case.runs()[expert]
        pair = ModelPair.from_pretrained(case.base, case.experts[expert], any_adapter_base=True)
        totals: dict[str, float] = {}
        for task in run.tasks:
            prompts = run.prompts().of_task(task).split("localize")
            effects = localize(pair, prompts, run.anchor(task), units=case.units, method="activation")
            shares = effects.per_prompt.mean(dim=1) / effects.gap.mean()
            for one, share in zip(effects.components, shares.tolist(), strict=True):
                totals[str(one)] = totals.get(str(one), 0.0) + share / len(run.tasks)
        file.write_text(json.dumps(totals))
    known = json.loads(file.read_text())
    return {one: known[str(one)] for one in scores}


def learned(name: str) -> Callable[[Case, dict[str, Any]], Weights]:
    """Coefficients that are learned, by what they are learned from."""

    def build(case: Case, config: dict[str, Any]) -> Weights:
        blend = _blend(case, config["units"])
        start = torch.full((len(case.experts), len(blend.components) + 1), float(config["start"]))
        training = Training(n_steps=config["n_steps"], penalty=config["penalty"])
        if name.endswith(UNIFORM):
            table = learn(blend, _losses(case, name.removesuffix(UNIFORM)), start, training)
            means = table[:, :-1].mean(dim=1, keepdim=True)
            return blend.weights(means.expand_as(table).contiguous())
        return blend.weights(learn(blend, _losses(case, name), start, training))

    return build


def _blend(case: Case, units: str) -> Blend:
    key = f"blend {units}"
    if key not in case._cache:
        case._cache[key] = Blend.of(case.model, case.changes(), components(case.inputs.architecture, units))
    found: Blend = case._cache[key]
    return found


def _losses(case: Case, name: str) -> list[Loss]:
    if f"losses {name}" not in case._cache:
        case._cache[f"losses {name}"] = _new_losses(case, name)
    found: list[Loss] = case._cache[f"losses {name}"]
    return found


def _new_losses(case: Case, name: str) -> list[Loss]:
    aims = _aims(case)
    if name == "anchors":
        return restoring(case.model, aims)
    if name == "anchors, random directions":
        return restoring(case.model, [_turned(case, one, place) for place, one in enumerate(aims)])
    if name == "streams":
        theirs = {
            expert: {key: case.weights[key] + change for key, change in own.items()}
            for expert, own in case.changes().items()
        }
        return restoring_streams(case.model, aims, theirs)
    return [loss for one in aims for loss in _through_outputs(case, one, name)]


def _aims(case: Case) -> list[Aim]:
    if "aims" not in case._cache:
        case._cache["aims"] = read_aims(case.inputs, case.runs())[1]
    found: list[Aim] = case._cache["aims"]
    return found


def _turned(case: Case, one: Aim, seed: int) -> Aim:
    """An aim along a random direction, at the same places and with what both models read there."""
    from weightpatch.reading import readouts

    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(one.anchor.direction), generator=draw, dtype=torch.float64)
    anchor = Anchor(layer=one.anchor.layer, direction=direction, positions=one.anchor.positions)
    run = case.runs()[one.expert]
    prompts = run.prompts().of_task(one.task).split("localize")
    pair = ModelPair.from_pretrained(case.base, case.experts[one.expert], any_adapter_base=True)
    base, specialized = (readouts(model, pair, prompts, anchor) for model in (pair.base, pair.specialized))
    spread = (specialized - base).square().mean().sqrt() * torch.sign((specialized - base).mean())
    return replace(one, anchor=anchor, base=specialized - spread, specialized=specialized)


def _through_outputs(case: Case, one: Aim, name: str) -> list[Loss]:
    """Losses on the next token's distribution at the readout positions of the same prompts."""
    experts = [aim.expert for aim in _aims(case)]
    share = 1 / (len(set(experts)) * experts.count(one.expert) * len(one.token_ids))
    theirs = {key: case.weights[key] + change for key, change in case.changes()[one.expert].items()}
    found: list[Loss] = []
    for chosen in batches(one.token_ids, 2048):
        token_ids = [one.token_ids[place] for place in chosen]
        tokens = pad(token_ids, case.model.device)
        rows = torch.arange(len(chosen))
        last = torch.tensor([len(ids) - 1 for ids in token_ids])
        with torch.no_grad():
            wanted = logits_with(case.model, theirs, tokens)[rows, last].log_softmax(dim=-1)

        def loss(weights: Weights, tokens: Tensor = tokens, last: Tensor = last, wanted: Tensor = wanted) -> Tensor:
            logits = logits_with(case.model, weights, tokens)[torch.arange(len(last)), last].log_softmax(dim=-1)
            if name == "entropy":
                return share * -(logits.exp() * logits).sum()
            return share * functional.kl_div(logits, wanted, log_target=True, reduction="sum")

        found.append(loss)
    return found
