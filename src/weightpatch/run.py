"""The run folder: what a run was asked for, what it found, and how it goes on after an interruption.

manifest.json                     configuration as resolved, digests, versions, time
prompts.jsonl                     the prompts as used
report.html                       derived
tasks/<task>/anchor.safetensors   direction, gates, reference levels
tasks/<task>/reference.json       readouts of both models, prompt by prompt
tasks/<task>/effects.jsonl        one line for each component: the truth, append-only
tasks/<task>/effects.parquet      derived
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from weightpatch.anchor import Anchor, Estimator, Readout, fit_anchor, halves
from weightpatch.component import Component, components
from weightpatch.difference import weight_differences
from weightpatch.errors import NoGapError, RunError
from weightpatch.localization import Effects, Engine, Method, plan, reference, sweep
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import ContrastPrompts
from weightpatch.residuals import BATCH_TOKENS
from weightpatch.statistics import check_gap

FORMAT = "weightpatch.run/1"
LOCK = ".lock"


class RunConfig(BaseModel):
    """Everything that decides what a run finds. Fields as the arguments of the functions of these names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    specialized: str
    prompts: str = "instructions"
    revision: str | None = None
    specialized_revision: str | None = None
    dtype: str = "float32"
    units: str = "heads,kvs,mlps"
    layer: int | None = None
    positions: tuple[int, ...] = (-1,)
    estimator: Estimator = "mean-difference"
    readout: Readout = "projection"
    method: Method = "exact"
    engine: Engine = "suffix"
    n_queries: int = 24
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a run.

    Attributes:
        stage: `anchor` or `localize`.
        task: The task it belongs to.
        done: Components measured, of this task.
        total: Components to measure; 0 for the anchor stage.
    """

    stage: str
    task: str
    done: int = 0
    total: int = 0


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
            engine=self.config.engine,
        )

    def failure(self, task: str) -> str | None:
        """Why a task has no effects although it was tried: no measurable gap. None when it has, or was not tried."""
        tried = (self.folder(task) / "reference.json").is_file()
        failure: str | None = self.reference(task)["failure"] if tried else None
        return failure

    def n_missing(self, task: str) -> int:
        """How many of a task's planned components have no effects yet.

        Raises:
            RunError: its measurement was not begun.
        """
        planned = self.reference(task)["planned"]
        return len(planned) - len(read_effects(self.folder(task) / "effects.jsonl"))

    def reference(self, task: str) -> dict[str, Any]:
        """`reference.json` of a task as it is.

        Raises:
            RunError: the task was not begun, or there is none of this name.
        """
        if task not in self.tasks:
            raise RunError(f"{self.path} has no task {task!r}. Its tasks: {', '.join(self.tasks)}.")
        try:
            found: dict[str, Any] = json.loads((self.folder(task) / "reference.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path} has no measurements of {task!r} yet. Go on: weightpatch localize {self.path}"
            ) from error
        return found


def start(config: RunConfig, pair: ModelPair, prompts: ContrastPrompts, out: str | Path) -> Run:
    """Make a run folder, or open the one that an earlier call with the same settings made.

    Args:
        config: The settings.
        pair: The two models, as the settings name them.
        prompts: The prompts, as the settings name them; every task needs the splits `fit` and `localize`.
        out: The folder. It is not made unless the settings fit the pair.

    Raises:
        ComponentError: an unknown unit or address.
        AnchorError: too few queries, too short prompts, or a layer that the model does not have.
        PromptError: a task without prompts in a split, or tokens outside the vocabulary.
        RunError: the folder holds something else, or a run with other settings or inputs (every difference listed).
    """
    folder = Path(out)
    digests = {**pair.digests(), "prompts": prompts.digest()}
    check_folder(folder, config)
    if (folder / "manifest.json").is_file() and Run.open(folder).has_results:
        run = Run.open(folder)
        _check_same(run, digests)
        return run
    check_settings(config, pair, prompts)
    architecture = pair.architecture
    manifest = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "digests": digests,
        "tasks": list(prompts.tasks),
        "architecture": {
            "model_type": architecture.model_type,
            "n_layers": architecture.n_layers,
            "n_heads": architecture.n_heads,
            "n_kv_heads": architecture.n_kv_heads,
            "n_neurons": architecture.n_neurons,
            "n_features": architecture.n_features,
            "n_parameters": sum(parameter.numel() for parameter in pair.base.parameters()),
        },
        "differences": [
            {"component": str(row.component), "relative_norm": row.relative_norm, "n_parameters": row.n_parameters}
            for row in weight_differences(pair)
        ],
        "versions": {
            **{name: version(name) for name in ("weightpatch", "torch", "transformers", "numpy")},
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": str(pair.base.device),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({name: value for name, value in asdict(row).items() if value}, ensure_ascii=False) for row in prompts
    ]
    write_whole(folder / "prompts.jsonl", "\n".join(lines) + "\n")
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return Run.open(folder)


def check_settings(config: RunConfig, pair: ModelPair, prompts: ContrastPrompts) -> None:
    """Raise for everything that a later stage would stumble over and that can be seen without running a model.

    Raises:
        ComponentError: an unknown unit or address, or nothing below a fixed anchor layer.
        AnchorError: too few queries, or a layer that the model does not have.
        PromptError: a task without prompts in a split, or prompts that the models cannot read.
    """
    components(pair.architecture, config.units)
    if config.layer is not None:
        plan(pair, Anchor(layer=config.layer, direction=torch.ones(pair.architecture.n_features)), config.units)
    check_prompts(pair, prompts, positions=config.positions)
    for task in prompts.tasks:
        own = prompts.of_task(task)
        halves(own.split("fit"))
        own.split("localize")


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
            raise _refusal(run, changes)
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
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, blocking=False):
            yield
    except Timeout as error:
        raise RunError(f"another process is at work on {folder}. Wait for it, or name another folder.") from error
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}.") from error


def fit_anchors(run: Run, pair: ModelPair) -> Iterator[Progress]:
    """Fit the anchor of every task that has none yet, on the `fit` split."""
    config = run.config
    for task in run.tasks:
        file = run.folder(task) / "anchor.safetensors"
        yield Progress(stage="anchor", task=task)
        if file.is_file():
            continue
        anchor = fit_anchor(
            pair,
            run.prompts().of_task(task).split("fit"),
            layer=config.layer,
            positions=config.positions,
            estimator=config.estimator,
            readout=config.readout,
            batch_tokens=config.batch_tokens,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        anchor.save(partial)
        partial.replace(file)


def measure_effects(run: Run, pair: ModelPair) -> Iterator[Progress]:
    """Measure the effects that are missing, on the `localize` split, and append each to its task's `effects.jsonl`.

    A task in whose readout the two models do not differ is left out and says so in `Run.failure`; the others go on.

    Raises:
        AnchorError: an anchor is missing.
        NoGapError: no task at all could be measured.
    """
    config = run.config
    for task in run.tasks:
        anchor = run.anchor(task)
        prompts = run.prompts().of_task(task).split("localize")
        below, past = plan(pair, anchor, config.units)
        file = run.folder(task) / "effects.jsonl"
        lines = read_effects(file, repair=True)
        known = set(lines)
        yield Progress(stage="localize", task=task, done=len(known), total=len(below))
        if not (run.folder(task) / "reference.json").is_file():
            base, specialized = reference(pair, prompts, anchor, batch_tokens=config.batch_tokens)
            found = {
                "anchor": _file_digest(run.folder(task) / "anchor.safetensors"),
                "prompts": [row.id for row in prompts],
                "queries": [row.query for row in prompts],
                "base": base.tolist(),
                "specialized": specialized.tolist(),
                "planned": [str(component) for component in below],
                "past_anchor": [str(component) for component in past],
                "failure": _gap_failure(specialized - base, [row.query for row in prompts]),
            }
            write_whole(run.folder(task) / "reference.json", json.dumps(found) + "\n")
        if run.failure(task):
            continue
        _check_measured(run, task, lines)
        skip = frozenset(component for component in below if str(component) in known)
        with file.open("a", encoding="utf-8") as out:
            for effect in sweep(
                pair,
                prompts,
                anchor,
                below,
                method=config.method,
                engine=config.engine,
                batch_tokens=config.batch_tokens,
                skip=skip,
            ):
                if effect.component in skip:
                    continue
                record = {"component": str(effect.component), "effects": effect.per_prompt.tolist()}
                out.write(json.dumps(record) + "\n")
                out.flush()
                known.add(str(effect.component))
                yield Progress(stage="localize", task=task, done=len(known), total=len(below))
        _write_parquet(run, task)
    failures = [run.failure(task) for task in run.tasks]
    if all(failures):
        raise NoGapError(f"no task could be measured. {run.tasks[0]}: {failures[0]}")


def _gap_failure(gap: Tensor, queries: list[str]) -> str | None:
    try:
        check_gap(gap.numpy(), groups=queries)
    except NoGapError as error:
        return str(error)
    return None


def read_effects(file: Path, *, repair: bool = False) -> dict[str, list[float]]:
    """Per-prompt effects by component address, in the order of the lines; empty when there is no file.

    Args:
        file: An `effects.jsonl`.
        repair: Cut off a last line that was only half written, so that the file can be continued.

    Raises:
        RunError: a whole line that is no record.
    """
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(file, len(whole))
    found: dict[str, list[float]] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            found[record["component"]] = record["effects"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"line {number} of {file} is no record ({error}). Delete the file to measure it again."
            ) from error
    return found


def _check_measured(run: Run, task: str, lines: dict[str, list[float]]) -> None:
    """Raise unless what is there was measured with this anchor, on these prompts, of planned components.

    Raises:
        RunError: it was not; the effects would be a mixture.
    """
    found = run.reference(task)
    file = run.folder(task) / "effects.jsonl"
    if found["anchor"] != _file_digest(run.folder(task) / "anchor.safetensors"):
        raise RunError(
            f"the anchor of {task!r} changed since its effects were begun. Delete {file.parent} to start anew."
        )
    for address, effects in lines.items():
        if address not in found["planned"] or len(effects) != len(found["prompts"]):
            raise RunError(
                f"{file} holds {len(effects)} effects of {address}, which is not what this run measures "
                f"({len(found['prompts'])} prompts, {len(found['planned'])} components). Delete it to measure again."
            )


def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _write_parquet(run: Run, task: str) -> None:
    table = run.effects(task).table(seed=run.config.seed)
    file = run.folder(task) / "effects.parquet"
    partial = file.with_name(file.name + ".partial")
    table.to_parquet(partial, index=False)
    partial.replace(file)


def _check_same(run: Run, digests: dict[str, str]) -> None:
    """Raise unless checkpoints and prompts are those that the run began with, in its folder too."""
    then = run.manifest["digests"]
    changes = [f"the contents of {name} changed since" for name, digest in digests.items() if digest != then[name]]
    if run.prompts().digest() != then["prompts"]:
        changes.append(f"{run.path / 'prompts.jsonl'} changed since")
    if changes:
        raise _refusal(run, changes)


def _refusal(run: Run, changes: list[str]) -> RunError:
    listed = "\n".join(f"  - {change}" for change in changes)
    return RunError(
        f"{run.path} holds a run with other settings:\n{listed}\nName another folder, or repeat the settings it has."
    )
