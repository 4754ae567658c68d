"""What guides a merge: scores of components, true and false ones, and objectives that coefficients are learned from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Weights, logits_with
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.difference import weight_differences
from weightpatch.localization import localize
from weightpatch.merging.experts import read_scores
from weightpatch.merging.learning import Blend, Loss, Training, learn
from weightpatch.merging.resolving import STATES, Learned, read_aims
from weightpatch.merging.restoring import Aim, restoring, restoring_states, shares_of
from weightpatch.prompts import tokenize
from weightpatch.residuals import BATCH_TOKENS, batches, evaluating, pad

UNIFORM = ", uniform of the same means"
DAMPED = ", damped by activations"
HIGHER = ", higher starts"
POLICIES: Mapping[str, Learned] = {
    "streams": "streams",
    "streams and KL": "streams+outputs",
    "KL to the experts": "outputs",
    "KL": "outputs",
}
"""What restores whole states -> its policy."""

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
    pair = case.pair(expert)
    norms = {row.component: row.relative_norm for row in weight_differences(pair, case.units)}
    return {one: norms[one] for one in scores}


def _activation(case: Case, expert: str, scores: Mapping[Component, float]) -> dict[Component, float]:
    file = case.shared / f"{expert}-activation.json"
    if not file.is_file():
        run = case.runs()[expert]
        pair = case.pair(expert)
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


def damping(case: Case, omega: float) -> dict[str, Tensor]:
    """Matrix -> what a difference keeps in each column, as activation-informed merging has it (arXiv:2502.02421)."""
    return {name: 1 - size * (1 - omega) for name, size in _activation_sizes(case).items()}


def _activation_sizes(case: Case) -> Mapping[str, Tensor]:
    """Matrix -> mean size of what the base puts into each of its columns over plain texts, over the largest of them."""
    if "activations" in case._cache:
        found: Mapping[str, Tensor] = case._cache["activations"]
        return found
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in case.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def add(_module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + args[0].abs().sum(dim=(0, 1))

            hooks.append(module.register_forward_pre_hook(add))
    texts = [
        (*tokenize(case.tokenizer, prompt), *case.tokenizer.encode(answer, add_special_tokens=False))
        for prompt, answer in case.plain
    ]
    with evaluating(case.model):
        for text in texts:  # one by one: padding is no text
            case.model(input_ids=torch.tensor([text], device=case.model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    case._cache["activations"] = {name: total / total.max() for name, total in sums.items()}
    return case._cache["activations"]


def learned(name: str) -> Callable[[Case, dict[str, Any]], Weights]:
    """Coefficients that are learned, by what they are learned from."""

    def build(case: Case, config: dict[str, Any]) -> Weights:
        table = _learned(case, name.removesuffix(UNIFORM).removesuffix(HIGHER), config)
        if name.endswith(UNIFORM):
            table = torch.cat([table[:, :-1].mean(dim=1, keepdim=True).expand_as(table[:, :-1]), table[:, -1:]], dim=1)
        return _blend(case, config["units"], config.get("omega", 1.0)).weights(table)

    return build


def _learned(case: Case, name: str, config: dict[str, Any]) -> Tensor:
    """A table of coefficients; learned once for all steps to stop at, and for the control of the same means."""
    settings = {"name": name} | {key: value for key, value in config.items() if key != "stop_at"}
    key = json.dumps(settings, sort_keys=True)
    if key not in case._cache:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        file = case.folder / "learned" / f"{digest}.safetensors"  # hours on a slow machine, so they outlive a process
        if not file.is_file():
            blend = _blend(case, config["units"], config.get("omega", 1.0))
            start = torch.full((len(case.experts), len(blend.components) + 1), float(config["start"]))
            losses = _losses(case, name, config["n_prompts"], config.get("answer_tokens", 0))
            steps = learn(blend, losses, start, Training(n_steps=config["n_steps"]))
            tables = {str(step.number): step.table for step in steps}
            file.parent.mkdir(exist_ok=True)
            save_file(tables, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
        case._cache[key] = load_file(file)
    found: Tensor = case._cache[key][str(config["stop_at"])]
    return found


def _blend(case: Case, units: str, omega: float) -> Blend:
    """Models between which is learned, their differences damped as activation-informed merging does, 1: not at all."""
    key = f"blend {units} {omega}"
    if key not in case._cache:
        changes = case.changes()
        if omega != 1:
            kept = damping(case, omega)
            changes = {
                expert: {name: change * kept.get(name, 1.0) for name, change in own.items()}
                for expert, own in changes.items()
            }
        case._cache[key] = Blend.of(case.model, changes, components(case.inputs.architecture, units))
    found: Blend = case._cache[key]
    return found


def _losses(case: Case, name: str, n_prompts: int, answer_tokens: int) -> list[Loss]:
    key = f"losses {name} {n_prompts} {answer_tokens}"
    if key not in case._cache:
        case._cache[key] = _new_losses(case, name, _aims(case, n_prompts, answer_tokens))
    found: list[Loss] = case._cache[key]
    return found


def _new_losses(case: Case, name: str, aims: list[Aim]) -> list[Loss]:
    if name == "anchors":
        return restoring(case.model, aims)
    if name == "anchors, random directions":
        return restoring(case.model, [_turned(case, one, place) for place, one in enumerate(aims)])
    if name == "entropy":
        return _entropies(case, aims)
    return restoring_states(
        case.model,
        aims,
        lambda expert: {key: case.weights[key] + change for key, change in case.changes()[expert].items()},
        STATES[POLICIES[name.removesuffix(" along answers").removesuffix(DAMPED)]],
    )


def _aims(case: Case, n_prompts: int, answer_tokens: int) -> list[Aim]:
    key = f"aims {answer_tokens}"
    if key not in case._cache:
        case._cache[key] = read_aims(case.inputs, case.runs(scored=False), answer_tokens=answer_tokens)[1]
    return [_first(one, n_prompts) for one in case._cache[key]]


def _first(one: Aim, n: int) -> Aim:
    """An aim on the first prompts of its task alone."""
    assert not one.anchor.is_difference
    return replace(
        one, token_ids=one.token_ids[:n], base=one.base[:n], specialized=one.specialized[:n], answers=one.answers[:n]
    )


def _turned(case: Case, one: Aim, seed: int) -> Aim:
    """An aim along a random direction, at the same places and with what both models read there."""
    from weightpatch.reading import readouts

    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(one.anchor.direction), generator=draw, dtype=torch.float64)
    anchor = Anchor(layer=one.anchor.layer, direction=direction, positions=one.anchor.positions)
    run = case.runs(scored=False)[one.expert]
    prompts = run.prompts().of_task(one.task).split("localize")
    pair = case.pair(one.expert)
    base, specialized = (
        readouts(model, pair, prompts, anchor)[: len(one.token_ids)] for model in (pair.base, pair.specialized)
    )
    spread = (specialized - base).square().mean().sqrt() * torch.sign((specialized - base).mean())
    return replace(one, anchor=anchor, base=specialized - spread, specialized=specialized)


def _entropies(case: Case, aims: list[Aim]) -> list[Loss]:
    """Entropies of the next token behind every prompt: AdaMerging's objective (arXiv:2310.02575)."""
    asked = [(share, ids) for share, one in zip(shares_of(aims), aims, strict=True) for ids in one.token_ids]
    found: list[Loss] = []
    for chosen in batches([ids for _, ids in asked], BATCH_TOKENS):
        token_ids = [asked[row][1] for row in chosen]
        share = torch.tensor([asked[row][0] for row in chosen])

        def loss(weights: Weights, token_ids: list[tuple[int, ...]] = token_ids, share: Tensor = share) -> Tensor:
            last = torch.tensor([len(ids) - 1 for ids in token_ids])
            logits = logits_with(case.model, weights, pad(token_ids, case.model.device))
            found = logits[torch.arange(len(last)), last].log_softmax(dim=-1)
            return -(share * (found.exp() * found).sum(dim=-1)).sum()

        found.append(loss)
    return found
