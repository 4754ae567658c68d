"""The run folder: what a run was asked for, what it found, and how it goes on after an interruption.

manifest.json                     configuration as resolved, digests, versions, time
prompts.jsonl                     the prompts as used
report.html                       derived
tasks/<task>/anchor.safetensors   direction, gates, reference levels
tasks/<task>/reference.json       readouts of both models, prompt by prompt
tasks/<task>/effects.jsonl        one line for each component: the truth, append-only
tasks/<task>/effects.parquet      derived
tasks/<task>/validation.json      joint patches, once `validate` was run
tasks/<task>/screen.jsonl         exact effects of a screening, one line for each component
tasks/<task>/screen.parquet       its table: every component's estimate, by span too, beside exact effects
tasks/<task>/screen.json          its verdicts, and where in a prompt the leading components act
tasks/<task>/drill.jsonl, .json   a drill-down: exact effects line by line, and the tree
tasks/<task>/activation.jsonl     effects by activation patching, one line for each component
tasks/<task>/null.jsonl           recoveries of pairs with shuffled differences, one line for each shuffle
tasks/<task>/plain.json           effects of suspected sources and routers on the queries without the instruction
tasks/<task>/executors.json       what the steered base loses without each component past the anchor
tasks/<task>/roles.parquet        every component's role, and what it was judged by
tasks/<task>/trace.json, .graphml  the graph: who supplies whom
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weightpatch.anchor import Anchor, Readout
from weightpatch.behaviour import MAX_NEW_TOKENS
from weightpatch.component import Component
from weightpatch.derivation import Rows
from weightpatch.effects import Effects
from weightpatch.errors import RunError
from weightpatch.files import file_digest, write_whole
from weightpatch.localization import Engine, Method
from weightpatch.prompts import ContrastPrompts
from weightpatch.recording import read_delivered, read_effects
from weightpatch.residuals import BATCH_TOKENS
from weightpatch.streams import Estimator

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "weightpatch.run/1"
LOCK = ".lock"


class RunConfig(BaseModel):
    """Everything that decides what a run finds. Fields as the arguments of the functions of these names.

    With `response_tokens`, prompts are read along the beginning of the base's plain answer, and anchors at all of its
    tokens unless `positions` says otherwise. `gates="auto"` is `behaviour` for tasks whose every prompt is text and
    names a known checker, else `readout`. Without `batch_tokens` a run takes as many as suit the model and the device
    that it was begun on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    specialized: str
    prompts: str = "instructions"
    revision: str | None = None
    specialized_revision: str | None = None
    dtype: str = "float32"
    architecture: Rows = "table"
    units: str = "heads,kvs,mlps"
    layer: int | None = None
    positions: tuple[int, ...] = (-1,)
    response_tokens: int = 0
    estimator: Estimator = "mean-difference"
    readout: Readout = "projection"
    gates: Literal["auto", "readout", "behaviour"] = "auto"
    max_new_tokens: int = MAX_NEW_TOKENS
    method: Method = "exact"
    engine: Engine = "suffix"
    n_queries: int = 24
    batch_tokens: int | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def readout_positions(self) -> tuple[int, ...]:
        """Where anchors are read."""
        along = self.response_tokens > 0 and self.positions == (-1,)
        return tuple(range(-self.response_tokens, 0)) if along else self.positions


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder opened for reading.

    Attributes:
        path: The folder.
        config: What was asked for.
        manifest: `manifest.json` as it is.
    """

    path: Path
    config: RunConfig
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a run folder's manifest.

        Raises:
            RunError: there is none, or it was not written by this program.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise RunError(f"{folder} was written as {manifest['format']}; this version reads {FORMAT}.")
            return cls(path=folder, config=RunConfig(**manifest["config"]), manifest=manifest)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise RunError(
                f"{folder} is no run folder ({type(error).__name__}: {error}). "
                "Start one: weightpatch run BASE SPECIALIZED --prompts P --out RUN"
            ) from error

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the prompts."""
        return tuple(self.manifest["tasks"])

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The tasks of some names; none named: all.

        Raises:
            RunError: there is none of a name.
        """
        if unknown := [name for name in names if name not in self.tasks]:
            raise RunError(f"{self.path} has no task {', '.join(unknown)}. Its tasks: {', '.join(self.tasks)}.")
        return tuple(names) or self.tasks

    @property
    def batch_tokens(self) -> int:
        """Most tokens of one call of a sweep, as resolved when the run was begun."""
        return int(self.manifest.get("batch_tokens") or self.config.batch_tokens or BATCH_TOKENS)

    @property
    def pass_tokens(self) -> int:
        """Most tokens of one forward pass of a whole model, which has logits to hold too."""
        return self.config.batch_tokens or BATCH_TOKENS

    @property
    def has_results(self) -> bool:
        """Whether anything was fitted or measured yet."""
        return any((self.path / "tasks").glob("*/*"))

    @property
    def report(self) -> Path:
        """Where the report is, or will be."""
        return self.path / "report.html"

    def folder(self, task: str) -> Path:
        """The folder of one task."""
        return self.path / "tasks" / task

    def prompts(self) -> ContrastPrompts:
        """The prompts that the run uses, splits included."""
        return ContrastPrompts.load(self.path / "prompts.jsonl")

    def anchor(self, task: str) -> Anchor:
        """The anchor of one task.

        Raises:
            AnchorError: not there yet, or damaged.
        """
        return Anchor.load(self.folder(task) / "anchor.safetensors")

    def effects(self, task: str) -> Effects:
        """The effects of one task as far as they are measured.

        Raises:
            RunError: nothing measured yet.
        """
        anchor = self.anchor(task)
        found = self.reference(task)
        lines = read_effects(self.folder(task) / "effects.jsonl")
        if not lines:
            raise RunError(f"{self.path} has no effects of {task!r}: {found['failure'] or 'not measured yet'}")
        if odd := next((one for one, own in lines.items() if len(own) != len(found["prompts"])), None):
            raise RunError(
                f"{self.folder(task) / 'effects.jsonl'} has {len(lines[odd])} effects of {odd} and the run "
                f"{len(found['prompts'])} prompts. Delete its line, and go on: weightpatch localize {self.path}"
            )
        return Effects(
            components=tuple(Component.parse(address) for address in lines),
            per_prompt=torch.tensor(list(lines.values()), dtype=torch.float64),
            base=torch.tensor(found["base"], dtype=torch.float64),
            specialized=torch.tensor(found["specialized"], dtype=torch.float64),
            prompt_ids=tuple(found["prompts"]),
            queries=tuple(found["queries"]),
            past_anchor=tuple(Component.parse(address) for address in found["past_anchor"]),
            anchor=anchor,
            method=self.config.method,
            engine=self.config.engine if self.config.method == "exact" else "outputs",
        )

    def failure(self, task: str) -> str | None:
        """Why a task has no effects although it was tried: no measurable gap. None when it has, or was not tried."""
        tried = (self.folder(task) / "reference.json").is_file()
        failure: str | None = self.reference(task)["failure"] if tried else None
        return failure

    def validation(self, task: str) -> dict[str, Any]:
        """`validation.json` of a task as it is; without points where nothing was validated."""
        file = self.folder(task) / "validation.json"
        return _read_json(file) if file.is_file() else {"points": []}

    def drill(self, task: str) -> dict[str, Any] | None:
        """`drill.json` of a task as it is; None where nothing was drilled."""
        file = self.folder(task) / "drill.json"
        return _read_json(file) if file.is_file() else None

    def trace(self, task: str) -> dict[str, Any] | None:
        """`trace.json` of a task as it is; None where nothing was traced."""
        file = self.folder(task) / "trace.json"
        return _read_json(file) if file.is_file() else None

    def roles(self, task: str) -> pd.DataFrame | None:
        """`roles.parquet` of a task: `Hierarchy.table`; None where nothing was traced."""
        import pandas as pd

        file = self.folder(task) / "roles.parquet"
        return pd.read_parquet(file) if file.is_file() else None

    def matrix(self, task: str) -> pd.DataFrame | None:
        """Total effects of each component on what each target writes along the anchor, as shares of the gap.

        Rows add up to recoveries. None where targets were not read.
        """
        import pandas as pd

        found = self.reference(task)
        rows = read_delivered(self.folder(task) / "effects.jsonl")
        if "targets" not in found or not rows:
            return None
        gap = sum(found["specialized"]) / len(found["specialized"]) - sum(found["base"]) / len(found["base"])
        shares: pd.DataFrame = pd.DataFrame.from_dict(rows, orient="index", columns=found["targets"]) / gap
        return shares

    def screening(self, task: str) -> dict[str, Any] | None:
        """`screen.json` of a task as it is; None where nothing was screened."""
        file = self.folder(task) / "screen.json"
        return _read_json(file) if file.is_file() else None

    def screen_table(self, task: str) -> pd.DataFrame:
        """`screen.parquet` of a task: what `Screening.table` returns, with recovery by span in columns `span.<name>`.

        Raises:
            RunError: not there, or damaged.
        """
        import pandas as pd

        file = self.folder(task) / "screen.parquet"
        try:
            return pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path} has no readable table of the screening of {task!r} ({error}). Delete screen.json beside "
                f"{file} and screen again: weightpatch screen {self.path}"
            ) from error

    def n_missing(self, task: str) -> int:
        """How many of a task's planned components have no effects yet.

        Raises:
            RunError: its measurement was not begun.
        """
        planned = self.reference(task)["planned"]
        return len(planned) - len(read_effects(self.folder(task) / "effects.jsonl"))

    def check_measured(self, task: str) -> None:
        """Check that all planned effects of a task are there.

        Raises:
            RunError: some are missing, or its measurement was not begun.
        """
        if n_missing := self.n_missing(task):
            raise RunError(f"{n_missing} effects of {task!r} are missing: weightpatch localize {self.path}")

    def reference(self, task: str) -> dict[str, Any]:
        """`reference.json` of a task as it is.

        Raises:
            RunError: the task was not begun, or there is none of this name.
        """
        if task not in self.tasks:
            raise RunError(f"{self.path} has no task {task!r}. Its tasks: {', '.join(self.tasks)}.")
        file = self.folder(task) / "reference.json"
        if not file.is_file():
            raise RunError(f"{self.path} has no measurements of {task!r} yet. Go on: weightpatch localize {self.path}")
        return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    """What a stage noted.

    Raises:
        RunError: the file is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged ({error}). Delete it and repeat the stage that wrote it.") from error
    return found


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a run.

    Attributes:
        stage: `anchor`, `localize` or `validate`.
        task: The task it belongs to.
        done: Components or sets measured, of this task.
        total: Those to measure; 0 for the anchor stage.
    """

    stage: str
    task: str
    done: int = 0
    total: int = 0


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise unless a run with these settings may be made or continued here; known before any model is loaded.

    A run that has no results yet may still change its settings.

    Raises:
        RunError: it cannot be made, holds other things, or a run with other settings (every difference listed).
    """
    if (folder / "manifest.json").is_file():
        run = Run.open(folder)
        then, now = run.config.model_dump(), config.model_dump()
        changes = [f"{name}: {then[name]!r} then, {now[name]!r} now" for name in then if then[name] != now[name]]
        if changes and run.has_results:
            raise refusal(run, changes)
        return
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunError(f"{folder} cannot be made: {existing} is no folder that can be written to. Name another one.")
    left = {"prompts.jsonl", "prompts.jsonl.partial", "manifest.json.partial", LOCK}
    others = sorted(file.name for file in folder.iterdir() if file.name not in left) if folder.is_dir() else []
    if others:
        raise RunError(
            f"{folder} is no run folder and not empty (it holds {others[0]}). Name a new folder for the run."
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder for as long as the block lasts.

    Raises:
        RunError: another process is at work there, or the folder cannot be made.
    """
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK, blocking=False):
                yield
        finally:
            if is_new and [file.name for file in folder.iterdir()] in ([], [LOCK]):  # nothing came of it
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
    except Timeout as error:
        raise RunError(f"another process is at work on {folder}. Wait for it, or name another folder.") from error
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}.") from error


def settle(run: Run, task: str, stage: str, settings: dict[str, Any], *, results: Sequence[str] = ()) -> bool:
    """Note settings and anchor of a stage before it begins, in `<stage>.settings.json`; tell whether it is done.

    Args:
        run: The run.
        task: The task.
        stage: The stage, whose results are `<stage>.jsonl` and `<stage>.json`.
        settings: What it does.
        results: Names of other files that it writes.

    Raises:
        RunError: it was begun with other settings.
    """
    anchor = file_digest(run.folder(task) / "anchor.safetensors")[:12]
    wanted = json.loads(json.dumps(settings)) | {"anchor": anchor}
    file = run.folder(task) / f"{stage}.settings.json"
    names = (f"{stage}.jsonl", f"{stage}.json", *results)
    found = [run.folder(task) / name for name in names]
    if any(result.is_file() and result.stat().st_size for result in found):
        then = _read_json(file) if file.is_file() else {}
        changes = [
            f"{name}: {then.get(name)!r} then, {wanted.get(name)!r} now"
            for name in {**then, **wanted}
            if then.get(name) != wanted.get(name)
        ]
        if changes:
            raise RunError(
                f"{run.folder(task)} holds a {stage} with other settings ({'; '.join(changes)}). Repeat them, or "
                f"delete its files {', '.join((f'{stage}.*', *results))}"
            )
    write_whole(file, json.dumps(wanted) + "\n")
    return (run.folder(task) / f"{stage}.json").is_file()


def refusal(run: Run, changes: list[str]) -> RunError:
    """The error for a run that is continued with something else than it began with."""
    listed = "\n".join(f"  - {change}" for change in changes)
    return RunError(
        f"{run.path} holds a run with other settings:\n{listed}\nName another folder, or repeat the settings it has."
    )
