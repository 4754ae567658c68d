"""What a report says, read from a run folder: plain values, no markup."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from weightpatch.anchor import Anchor
from weightpatch.component import UNITS
from weightpatch.effects import Effects
from weightpatch.errors import RunError
from weightpatch.prompts import ContrastPrompt, ContrastPrompts
from weightpatch.recording import read_effects
from weightpatch.report.scores import Score, read_scores
from weightpatch.run import Run, RunConfig
from weightpatch.statistics import Interval, mean_interval

if TYPE_CHECKING:
    import pandas as pd

N_EXAMPLES = 2
N_TOP = 20


@dataclass(frozen=True, kw_only=True)
class UnitCount:
    """What was measured of one unit.

    Attributes:
        unit: Which unit.
        n_measured: Components with effects.
        n_past: Components at or past the anchor, not measured.
        best: The one with the highest recovery; None when nothing was measured.
    """

    unit: str
    n_measured: int
    n_past: int
    best: Score | None


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskResult:
    """One task as the report tells it.

    Attributes:
        name: The task.
        examples: Prompts on which effects were measured.
        anchor: Its anchor; None when not fitted yet.
        effects: Its effects; None when there are none.
        table: Their table, in the order of measurement; None when there are none.
        gap: Mean gap on the prompts of the effects, with interval; None when there are none.
        notice: Why there are no effects; None when there are.
        failed: Whether it was tried and could not be measured.
        n_missing: Components that are planned but not measured yet.
    """

    name: str
    examples: tuple[ContrastPrompt, ...]
    anchor: Anchor | None
    effects: Effects | None = None
    table: pd.DataFrame | None = None
    gap: Interval | None = None
    notice: str | None = None
    failed: bool = False
    n_missing: int = 0

    @property
    def top(self) -> pd.DataFrame:
        """The rows with the highest recovery, best first.

        Raises:
            RunError: there are no effects.
        """
        if self.table is None:
            raise RunError(f"no effects of {self.name!r}: {self.notice}")
        return self.table.sort_values("recovery", ascending=False, kind="stable").head(N_TOP).reset_index(drop=True)

    @property
    def unstable(self) -> bool:
        """Whether the anchor failed one of its gates."""
        return bool(self.anchor and self.anchor.report and not self.anchor.report.stable)

    @property
    def counts(self) -> list[UnitCount]:
        """What was measured, unit by unit."""
        if self.effects is None or self.table is None:
            return []
        found = []
        for unit in UNITS:
            n_measured = int((self.table["unit"] == unit).sum())
            n_past = sum(component.unit == unit for component in self.effects.past_anchor)
            if n_measured or n_past:
                best = self.best((unit,))
                found.append(UnitCount(unit=unit, n_measured=n_measured, n_past=n_past, best=best))
        return found

    def best(self, units: Sequence[str] = UNITS) -> Score | None:
        """The score with the highest recovery among some units; None when there is none."""
        if self.table is None:
            return None
        scores = read_scores(self.table[self.table["unit"].isin(list(units))].nlargest(1, "recovery"))
        return scores[0] if scores else None


def read_tasks(run: Run) -> list[TaskResult]:
    """Every task of a run, as far as it has come.

    Raises:
        RunError: a file of the run is damaged.
        AnchorError: an anchor is.
    """
    prompts = run.prompts()
    return [_read_task(run, task, prompts) for task in run.tasks]


def _read_task(run: Run, task: str, prompts: ContrastPrompts) -> TaskResult:
    measured = prompts.of_task(task).split("localize")
    examples = tuple(row for row in measured if row.prompt)[:N_EXAMPLES]  # token ids have no text to show
    folder = run.folder(task)
    if not (folder / "anchor.safetensors").is_file():
        notice = f"it has no anchor yet. Go on: weightpatch anchor {run.path.name}"
        return TaskResult(name=task, examples=examples, anchor=None, notice=notice)
    anchor = run.anchor(task)
    if failure := run.failure(task):
        return TaskResult(name=task, examples=examples, anchor=anchor, notice=failure, failed=True)
    if not (folder / "reference.json").is_file() or not read_effects(folder / "effects.jsonl"):
        notice = f"it is not measured yet. Go on: weightpatch localize {run.path.name}"
        return TaskResult(name=task, examples=examples, anchor=anchor, notice=notice)
    effects = run.effects(task)
    table = effects.table(seed=run.config.seed)
    gap = mean_interval(effects.gap.numpy(), groups=effects.queries)
    return TaskResult(
        name=task,
        examples=examples,
        anchor=anchor,
        effects=effects,
        table=table,
        gap=gap,
        n_missing=run.n_missing(task),
    )


def short_name(model: str) -> str:
    """A checkpoint's name for a heading: the last part of a path, a hub id as it is."""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is not None and not model.startswith(".")
    if is_hub_id:
        return model
    return PureWindowsPath(model).name or Path(model).name or model


def command(run: Run) -> str:
    """The command that makes the same run again in a new folder; settings at their default are left out."""
    config = run.config
    words = ["weightpatch", "run", config.base, config.specialized, "--prompts", config.prompts]
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        if name in ("base", "specialized", "prompts") or value == field.default:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"--{name.replace('_', '-')}={text}")
    words += ["--out", "RUN"]
    return shlex.join(words)


def count_words(number: int) -> str:
    """A count of parameters as people say it: `134.5 M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return str(number)
