"""How stable a run's ranking is: across halves of its queries, across paraphrases, and with other queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from weightpatch.effects import Effects
from weightpatch.errors import AnchorError
from weightpatch.estimation import Estimation
from weightpatch.fitting import fit_anchor
from weightpatch.jsonable import finite, known
from weightpatch.localization import localize
from weightpatch.pair import ModelPair
from weightpatch.prompts import BUILT_IN, ContrastPrompts
from weightpatch.responses import with_responses
from weightpatch.run import Run
from weightpatch.stability import Stability, across, between, split_halves
from weightpatch.statistics import Floats, orientation

LEAST_PROMPTS = 2
"""Prompts that a paraphrase needs to be compared with others."""


def robustness(run: Run, pair: ModelPair, task: str) -> dict[str, Any]:
    """How far the effects of one task depend on what they were measured on, as `validation.json` keeps it.

    Effects count in the gap's direction, so the highest ones are those that close it.

    Args:
        run: A run with effects of this task.
        pair: The two models.
        task: One of the run's tasks.

    Returns:
        By kind of comparison a dict of the fields of `stability.Stability`, NaN as None, or None where there is
        nothing to compare:

        - `halves`: mean effects on two halves of the queries, split at random again and again;
        - `paraphrases`: on prompts of each instruction text with those of every other one; only texts with at least
          two prompts, and None with fewer than two such texts;
        - `seed`: the run's with those on other queries, for the built-in prompts only: dealt with the next seed, the
          anchor fitted anew on them at the same layer (without gates by behaviour), and the effects of the same
          components estimated to first order. So the error of the estimate counts as instability here. `cosine` is
          that of the two anchors' directions. None too where no anchor can be fitted on them.

    Raises:
        RunError: nothing measured yet.
    """
    effects = run.effects(task)
    values = _oriented(effects)
    instruction = {row.id: row.instruction for row in run.prompts().of_task(task)}
    labels = [instruction[name] for name in effects.prompt_ids]
    halves = (
        split_halves(values, groups=effects.queries, seed=run.config.seed) if len(set(effects.queries)) > 1 else None
    )
    return {
        "halves": None if halves is None else _record(halves),
        "paraphrases": _paraphrases(values, labels),
        "seed": _other_queries(run, pair, task, effects),
    }


def _oriented(effects: Effects) -> Floats:
    """Effects in the gap's direction, shape `(component, prompt)`."""
    values: Floats = orientation(effects.gap.numpy()) * effects.per_prompt.numpy()
    return values


def _paraphrases(values: Floats, labels: Sequence[str]) -> dict[str, Any] | None:
    counts = Counter(labels)
    kept = np.array([counts[label] >= LEAST_PROMPTS for label in labels])
    chosen = [label for label in labels if counts[label] >= LEAST_PROMPTS]
    return _record(across(values[:, kept], chosen)) if len(set(chosen)) > 1 else None


def _other_queries(run: Run, pair: ModelPair, task: str, effects: Effects) -> dict[str, Any] | None:
    config, anchor = run.config, run.anchor(task)
    if config.prompts.partition(":")[0] != BUILT_IN:
        return None
    drawn = ContrastPrompts.load(config.prompts, seed=config.seed + 1, n_queries=config.n_queries)
    if task not in drawn.tasks:  # the run was given other prompts than its settings name
        return None
    fit, measured = (drawn.of_task(task).split(name) for name in ("fit", "localize"))
    if config.response_tokens:
        fit, measured = (with_responses(pair, own, n_tokens=config.response_tokens) for own in (fit, measured))
    try:
        other = fit_anchor(
            pair,
            fit,
            layer=anchor.layer,
            positions=anchor.positions,
            estimator=config.estimator,
            readout=anchor.readout,
            gates="readout",
            batch_tokens=run.pass_tokens,
        )
    except AnchorError:  # the rest of the validation is worth keeping
        return None
    found = localize(
        pair,
        measured,
        replace(other, report=None),  # a failed gate is no matter here: the cosine says how far the anchors agree
        units=effects.components,
        method="first-order" if config.method == "exact" else config.method,
        estimation=Estimation(),
        batch_tokens=run.pass_tokens,
    )
    place = {component: number for number, component in enumerate(found.components)}
    same = _oriented(found)[[place[component] for component in effects.components]]
    compared = between(_oriented(effects).mean(axis=1), same.mean(axis=1))
    return {**_record(compared), "cosine": finite(float(anchor.direction @ other.direction))}


def _record(found: Stability) -> dict[str, Any]:
    record: dict[str, Any] = known(asdict(found))
    return record
