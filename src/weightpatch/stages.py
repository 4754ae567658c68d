"""The stages of a run, each of which goes on where an earlier call of it stopped."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.behaviour import Answering, Bench, can_judge
from weightpatch.component import components
from weightpatch.difference import weight_differences
from weightpatch.errors import NoGapError, RunError
from weightpatch.files import file_digest, write_whole
from weightpatch.fitting import Gates, fit_anchor, halves
from weightpatch.localization import ALL_TARGETS, deliver, plan, sweep, targets_of
from weightpatch.pair import ModelPair, check_prompts
from weightpatch.prompts import BUILT_IN, ContrastPrompts
from weightpatch.reading import reference
from weightpatch.recording import append_effects, read_effects
from weightpatch.residuals import tokens_per_call
from weightpatch.responses import with_responses
from weightpatch.run import FORMAT, Progress, Run, RunConfig, check_folder, refusal
from weightpatch.statistics import check_gap

N_PROMPTS_OF_OTHERS = 12
"""Prompts that the anchor of another task is fitted on, where it serves as a control."""


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
        "fingerprints": dict(pair.fingerprints),
        "batch_tokens": config.batch_tokens or tokens_per_call(pair.base),
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
        AnchorError: too few queries, a layer that the model does not have, or answers that cannot be judged.
        PromptError: a task without prompts in a split, or prompts that the models cannot read.
    """
    components(pair.architecture, config.units)
    if config.layer is not None:
        plan(pair, Anchor(layer=config.layer, direction=torch.ones(pair.architecture.n_features)), config.units)
    check_prompts(pair, prompts, positions=config.readout_positions)
    for task in prompts.tasks:
        own = prompts.of_task(task)
        halves(own.split("fit"))
        if config.gates == "behaviour":
            Bench(pair=pair, prompts=own.split("fit"), positions=config.readout_positions, answering=Answering())
        own.split("localize")


def _check_same(run: Run, digests: dict[str, str]) -> None:
    """Raise unless checkpoints and prompts are those that the run began with, in its folder too."""
    then = run.manifest["digests"]
    changes = [f"the contents of {name} changed since" for name, digest in digests.items() if digest != then[name]]
    if run.prompts().digest() != then["prompts"]:
        changes.append(f"{run.path / 'prompts.jsonl'} changed since")
    if changes:
        raise refusal(run, changes)


def fit_anchors(run: Run, pair: ModelPair) -> Iterator[Progress]:
    """Fit the anchor of every task that has none yet, on the `fit` split."""
    config = run.config
    for task in run.tasks:
        file = run.folder(task) / "anchor.safetensors"
        yield Progress(stage="anchor", task=task)
        if file.is_file():
            continue
        prompts = run.prompts().of_task(task).split("fit")
        gates = _resolve_gates(config, pair, prompts)
        anchor = fit_anchor(
            pair,
            prompts,
            layer=config.layer,
            positions=config.readout_positions,
            estimator=config.estimator,
            readout=config.readout,
            gates=gates,
            answering=_answering(run, pair, task) if gates == "behaviour" else None,
            batch_tokens=run.pass_tokens,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        anchor.save(partial)
        partial.replace(file)


def _resolve_gates(config: RunConfig, pair: ModelPair, prompts: ContrastPrompts) -> Gates:
    """What `gates="auto"` means for these prompts."""
    if config.gates != "auto":
        return config.gates
    judged = can_judge(pair, prompts) and all(position < 0 for position in config.readout_positions)
    return "behaviour" if judged else "readout"


def _answering(run: Run, pair: ModelPair, task: str) -> Answering:
    """How answers are generated; the controls are the anchors of the run's other tasks, or of a built-in set's."""
    prompts = run.prompts()
    if run.tasks == (task,) and run.config.prompts == f"{BUILT_IN}:{task}":
        prompts = ContrastPrompts.load(BUILT_IN, seed=run.config.seed, n_queries=run.config.n_queries)
    rows = [
        row
        for other in prompts.tasks
        if other != task
        for row in prompts.of_task(other).split("fit").rows[:N_PROMPTS_OF_OTHERS]
    ]
    others = ContrastPrompts(tuple(rows)) if rows else None
    if others and run.config.response_tokens:
        others = with_responses(pair, others, n_tokens=run.config.response_tokens)
    return Answering(
        others=others,
        max_new_tokens=run.config.max_new_tokens,
        seed=run.config.seed,
    )


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
            base, specialized = reference(pair, prompts, anchor, batch_tokens=run.pass_tokens)
            about: dict[str, object] = {
                "anchor": file_digest(run.folder(task) / "anchor.safetensors"),
                "prompts": [row.id for row in prompts],
                "queries": [row.query for row in prompts],
                "base": base.tolist(),
                "specialized": specialized.tolist(),
                "planned": [str(component) for component in below],
                "past_anchor": [str(component) for component in past],
                "failure": _gap_failure(specialized - base, [row.query for row in prompts]),
            }
            if has_targets(config, anchor):
                targets = targets_of(pair, anchor, ALL_TARGETS)
                delivered = deliver(pair, prompts, anchor, targets, batch_tokens=run.batch_tokens).mean(dim=2)
                about["targets"] = [str(target) for target in targets]
                about["delivered"] = dict(zip(("base", "specialized"), delivered.tolist(), strict=True))
            write_whole(run.folder(task) / "reference.json", json.dumps(about) + "\n")
        if run.failure(task):
            continue
        _check_measured(run, task, lines)
        targets = targets_of(pair, anchor, ALL_TARGETS) if has_targets(config, anchor) else ()
        skip = frozenset(component for component in below if str(component) in known)
        found = sweep(
            pair,
            prompts,
            anchor,
            below,
            method=config.method,
            engine=config.engine,
            targets=targets,
            batch_tokens=run.batch_tokens if config.engine == "suffix" else run.pass_tokens,
            skip=skip,
        )
        for _ in append_effects(file, found, known):
            yield Progress(stage="localize", task=task, done=len(known), total=len(below))
        _write_parquet(run, task)
    failures = [run.failure(task) for task in run.tasks]
    if all(failures):
        raise NoGapError(f"no task could be measured. {run.tasks[0]}: {failures[0]}")


def has_targets(config: RunConfig, anchor: Anchor) -> bool:
    """Whether the writes of later components are read while a run patches: with the fast engine, of a projection."""
    return config.method == "exact" and config.engine == "suffix" and anchor.readout != "cosine"


def _gap_failure(gap: Tensor, queries: list[str]) -> str | None:
    try:
        check_gap(gap.numpy(), groups=queries)
    except NoGapError as error:
        return str(error)
    return None


def _check_measured(run: Run, task: str, lines: dict[str, list[float]]) -> None:
    """Raise unless what is there was measured with this anchor, on these prompts, of planned components.

    Raises:
        RunError: it was not; the effects would be a mixture.
    """
    found = run.reference(task)
    file = run.folder(task) / "effects.jsonl"
    if found["anchor"] != file_digest(run.folder(task) / "anchor.safetensors"):
        raise RunError(
            f"the anchor of {task!r} changed since its effects were begun. Delete {file.parent} to start anew."
        )
    for address, effects in lines.items():
        if address not in found["planned"] or len(effects) != len(found["prompts"]):
            raise RunError(
                f"{file} holds {len(effects)} effects of {address}, which is not what this run measures "
                f"({len(found['prompts'])} prompts, {len(found['planned'])} components). Delete it to measure again."
            )


def _write_parquet(run: Run, task: str) -> None:
    table = run.effects(task).table(seed=run.config.seed)
    file = run.folder(task) / "effects.parquet"
    partial = file.with_name(file.name + ".partial")
    table.to_parquet(partial, index=False)
    partial.replace(file)
