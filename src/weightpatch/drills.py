"""The stage `drill`: exact effects of a run's tasks from blocks down to neurons, spent where the effect is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from weightpatch.component import Component
from weightpatch.drilling import BUDGET, N_GROUPS, DrillDown, steps
from weightpatch.files import write_whole
from weightpatch.pair import ModelPair
from weightpatch.recording import read_effects
from weightpatch.run import Progress, Run, settle


@dataclass(frozen=True, kw_only=True)
class DrillSettings:
    """What a drill-down does; see `weightpatch.drilling.drill`.

    Attributes:
        budget: Components and groups to patch exactly, in every task.
        n_groups: Groups that neurons are dealt into at each level.
    """

    budget: int = BUDGET
    n_groups: int = N_GROUPS


def drill_run(run: Run, pair: ModelPair, settings: DrillSettings) -> Iterator[Progress]:
    """Drill down in every task that has an anchor and a measurable gap, on the `localize` split.

    Writes `drill.jsonl` (exact effects, line by line) and `drill.json` (the tree). Goes on where an earlier call with
    the same settings stopped.

    Raises:
        RunError: a drill-down with other settings is there, or nothing was measured yet.
    """
    for task in run.tasks:
        if run.failure(task):
            continue
        yield Progress(stage="drill", task=task)
        anchor = run.anchor(task)
        if settle(run, task, "drill", asdict(settings)):
            continue
        file = run.folder(task) / "drill.jsonl"
        lines = read_effects(file, repair=True)
        walk = steps(
            pair,
            run.prompts().of_task(task).split("localize"),
            anchor,
            budget=settings.budget,
            n_groups=settings.n_groups,
            engine=run.config.engine,
            batch_tokens=run.batch_tokens if run.config.engine == "suffix" else run.pass_tokens,
            known={Component.parse(name): torch.tensor(own, dtype=torch.float64) for name, own in lines.items()},
        )
        done = len(lines)
        with file.open("a", encoding="utf-8") as out:
            while True:
                try:
                    effect = next(walk)
                except StopIteration as end:
                    found: DrillDown = end.value
                    break
                record = {"component": str(effect.component), "effects": effect.per_prompt.tolist()}
                out.write(json.dumps(record) + "\n")
                out.flush()
                done += 1
                yield Progress(stage="drill", task=task, done=done, total=settings.budget)
        yield Progress(stage="drill", task=task, done=settings.budget, total=settings.budget)
        columns = ["component", "unit", "layer", "recovery", "ci_low", "ci_high", "inside", "n_parts", "parts"]
        table = found.table(seed=run.config.seed)[columns]
        rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
        tree = {"settings": asdict(settings), "tree": str(found), "components": rows}
        write_whole(run.folder(task) / "drill.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
