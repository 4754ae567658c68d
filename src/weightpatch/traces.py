"""The stage `trace`: activations, a null, components past the anchor, roles, and the graph of who supplies whom."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.effects import Effects
from weightpatch.engine.activations import has_output
from weightpatch.engine.edges import Receives
from weightpatch.errors import NoGapError, RunError
from weightpatch.executors import Executors, find_executors
from weightpatch.files import file_digest, write_whole
from weightpatch.hierarchy import Hierarchy, Suspects, find_roles, find_suspects
from weightpatch.jsonable import finite, known
from weightpatch.localization import Method, plan, sweep, targets_of
from weightpatch.nulls import N_SHUFFLES, Draw, Plain, draw_null, measure_plain, pooled
from weightpatch.pair import ModelPair
from weightpatch.paths import ANCHOR, direct_effects
from weightpatch.prompts import ContrastPrompts
from weightpatch.recording import append_effects, read_effects, whole_lines
from weightpatch.run import Progress, Run, settle
from weightpatch.suppliers import TraceSettings
from weightpatch.tracing import trace

if TYPE_CHECKING:
    import pandas as pd

EXECUTOR_UNITS = ("heads", "attns", "mlps")


@dataclass(frozen=True, kw_only=True)
class TraceStage:
    """What the stage does.

    Attributes:
        trace: How far the graph goes.
        n_shuffles: Of the null.
        n_executor_prompts: Prompts on which components past the anchor are held, at most.
    """

    trace: TraceSettings = field(default_factory=TraceSettings)
    n_shuffles: int = N_SHUFFLES
    n_executor_prompts: int = 12


@dataclass(frozen=True, kw_only=True)
class EdgeSettings:
    """Which edges to measure; see `weightpatch.paths.direct_effects`.

    Attributes:
        suppliers: Units and addresses.
        target: An address, or `anchor`.
        receives: Which of an attention's inputs see the supplier.
        method: What is patched in suppliers.
    """

    suppliers: str
    target: str
    receives: Receives = "all"
    method: Literal["exact", "activation"] = "exact"


def trace_run(run: Run, pair: ModelPair, settings: TraceStage, *, tasks: Sequence[str] = ()) -> Iterator[Progress]:
    """Find roles and the graph of every task whose effects are complete, on the `localize` split.

    Writes `activation.jsonl` (effects by activation patching, line by line), `null.jsonl` (one shuffle to a line),
    `executors.json`, `roles.parquet`, `trace.graphml` and, last, `trace.json`. Goes on where an earlier call with the
    same settings stopped.

    Args:
        run: The run.
        pair: The two models.
        settings: What to do.
        tasks: Which tasks; none named: all.

    Raises:
        RunError: a trace with other settings is there, or effects are missing.
    """
    seed = run.config.seed
    for task in run.chosen(tasks):
        if run.failure(task):
            continue
        anchor = run.anchor(task)
        run.check_measured(task)
        folder = run.folder(task)
        digest = file_digest(folder / "effects.jsonl")[:12]
        if run.config.method not in ("exact", "first-order"):
            raise RunError(f"{run.path} holds effects by {run.config.method}; roles need those of weights.")
        own_files = ("activation.jsonl", "null.jsonl", "plain.json", "executors.json")
        if settle(
            run,
            task,
            "trace",
            {**asdict(settings), "effects": digest, "plain": not anchor.is_difference},
            results=own_files,
        ):
            continue
        prompts = run.prompts().of_task(task).split("localize")
        effects = run.effects(task)
        units = [one for one in effects.components if has_output(one)]
        if not units:  # norms and the like have no activations to take
            continue
        yield from measure(run, pair, task, method="activation", units=units, stage="trace")
        activation = read_measured(run, task, "activation", effects)
        draws: list[Draw] = []
        own = _Task(run=run, pair=pair, name=task, prompts=prompts, anchor=anchor, effects=effects)
        for draw in _draws(own, settings.n_shuffles):
            draws.append(draw)
            yield Progress(stage="null", task=task, done=len(draws), total=settings.n_shuffles)
        yield Progress(stage="roles", task=task)
        executors = _executors(own, settings.n_executor_prompts)
        null = pooled(draws, effects.components)
        plain: Plain | None = None
        if not anchor.is_difference:
            plain = _plain(own, find_suspects(effects, activation, null, seed=seed))
        hierarchy = find_roles(
            effects,
            activation,
            null,
            plain,
            executors=executors,
            n_layers=pair.architecture.n_layers,
            seed=seed,
        )
        partial = folder / "roles.parquet.partial"
        hierarchy.table.to_parquet(partial, index=False)
        partial.replace(folder / "roles.parquet")
        record = _about(hierarchy, executors, settings)
        if anchor.readout == "projection":
            yield Progress(stage="graph", task=task)
            graph = trace(
                pair,
                prompts,
                anchor,
                effects,
                hierarchy=hierarchy,
                settings=settings.trace,
                seed=run.config.seed,
                batch_tokens=run.batch_tokens,
            )
            graph.save_graphml(folder / "trace.graphml")
            record |= graph.record()
        write_whole(folder / "trace.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def measure_edges(
    run: Run, pair: ModelPair, settings: EdgeSettings, found: dict[str, pd.DataFrame], *, tasks: Sequence[str] = ()
) -> Iterator[Progress]:
    """Measure single edges of every task, direct and total; nothing is written.

    Args:
        run: The run.
        pair: The two models.
        settings: Which edges.
        found: Takes up, by task, the table of `Edges` with a column `total`: the effect through everything between, as
            a share of the anchor's gap like `direct`.
        tasks: Which tasks; none named: all.
    """
    for task in run.chosen(tasks):
        if run.failure(task):
            continue
        yield Progress(stage="edges", task=task)
        anchor, prompts = run.anchor(task), run.prompts().of_task(task).split("localize")
        edges = direct_effects(
            pair,
            prompts,
            anchor,
            suppliers=settings.suppliers,
            target=settings.target,
            receives=settings.receives,
            method=settings.method,
            batch_tokens=run.batch_tokens,
        )
        found_now = sweep(
            pair,
            prompts,
            anchor,
            edges.suppliers,
            method=settings.method,
            targets=() if settings.target == ANCHOR else targets_of(pair, anchor, settings.target),
            batch_tokens=run.batch_tokens,
        )
        whole = torch.stack([one.per_prompt if one.per_target is None else one.per_target[0] for one in found_now])
        table = edges.table(seed=run.config.seed)
        table.insert(3, "total", (whole.mean(dim=1) / edges.gap.mean()).numpy())
        found[task] = table


def measure(
    run: Run, pair: ModelPair, task: str, *, method: Method, units: list[Component], stage: str
) -> Iterator[Progress]:
    """Measure effects by another method than the run's own, into `<method>.jsonl`; goes on where it stopped.

    Args:
        run: The run.
        pair: The two models.
        task: One of its tasks.
        method: As in `localize`.
        units: What to patch.
        stage: What progress is called.
    """
    anchor = run.anchor(task)
    below, _ = plan(pair, anchor, units)
    file = run.folder(task) / f"{method}.jsonl"
    known = set(read_effects(file, repair=True))
    yield Progress(stage=stage, task=task, done=len(known), total=len(below))
    found = sweep(
        pair,
        run.prompts().of_task(task).split("localize"),
        anchor,
        below,
        method=method,
        batch_tokens=run.batch_tokens,
        skip=frozenset(one for one in below if str(one) in known),
    )
    for _ in append_effects(file, found, known) if len(known) < len(below) else ():
        yield Progress(stage=stage, task=task, done=len(known), total=len(below))


def read_measured(run: Run, task: str, method: Method, effects: Effects) -> Effects:
    """What `measure` wrote, with the readouts of the run's own effects.

    Raises:
        RunError: it does not belong to these prompts.
    """
    file = run.folder(task) / f"{method}.jsonl"
    lines = read_effects(file)
    if any(len(values) != len(effects.prompt_ids) for values in lines.values()):
        raise RunError(f"{file} was measured on other prompts than this run's effects. Delete it to measure again.")
    return replace(
        effects,
        components=tuple(Component.parse(address) for address in lines),
        per_prompt=torch.tensor(list(lines.values()), dtype=torch.float64),
        method=method,
    )


@dataclass(frozen=True, kw_only=True)
class _Task:
    run: Run
    pair: ModelPair
    name: str
    prompts: ContrastPrompts
    anchor: Anchor
    effects: Effects


def _draws(task: _Task, n_shuffles: int) -> Iterator[Draw]:
    """The null, those of its shuffles that are known already from the file."""
    file = task.run.folder(task.name) / "null.jsonl"
    known = _read_draws(file)[:n_shuffles]
    yield from known
    seeds = [task.run.config.seed + number for number in range(len(known), n_shuffles)]
    with file.open("a", encoding="utf-8") as out:
        for draw in draw_null(task.pair, task.prompts, task.anchor, task.effects, seeds=seeds):
            values = {name: [finite(value) for value in getattr(draw, name)] for name in ("weights", "activation")}
            out.write(json.dumps({"seed": draw.seed, **values}) + "\n")
            out.flush()
            yield draw


def _plain(task: _Task, suspects: Suspects) -> Plain:
    """What suspects do without the instruction, from the file where it holds just these."""
    file = task.run.folder(task.name) / "plain.json"
    chosen = {"weights": suspects.sources, "activation": suspects.routers}
    if file.is_file():
        read = json.loads(file.read_text(encoding="utf-8"))
        if {name: list(map(str, own)) for name, own in chosen.items()} == {name: list(read[name]) for name in chosen}:
            found = [
                {one: torch.tensor(read[name][str(one)], dtype=torch.float64) for one in own}
                for name, own in chosen.items()
            ]
            return Plain(weights=found[0], activation=found[1])
    plain = measure_plain(
        task.pair,
        task.prompts,
        task.anchor,
        weights=suspects.sources,
        activation=suspects.routers,
        method=task.run.config.method,
        batch_tokens=task.run.batch_tokens,
    )
    sides = {"weights": plain.weights, "activation": plain.activation}
    record = {name: {str(one): values.tolist() for one, values in own.items()} for name, own in sides.items()}
    write_whole(file, json.dumps(record) + "\n")
    return plain


def _read_draws(file: Path) -> list[Draw]:
    records = [json.loads(line) for line in whole_lines(file, repair=True)]
    return [
        Draw(
            seed=record["seed"],
            weights=np.array(record["weights"], dtype=float),
            activation=np.array(record["activation"], dtype=float),
        )
        for record in records
    ]


def _executors(task: _Task, n_prompts: int) -> Executors | None:
    """What lies past the anchor, held; from its file where it is known. None where nothing does."""
    run, anchor = task.run, task.anchor
    file = run.folder(task.name) / "executors.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        return _read_executors(known) if known else None
    units = [one for one in task.effects.past_anchor if one.unit in EXECUTOR_UNITS and one.layer is not None]
    found = None
    if units and anchor.readout != "cosine" and anchor.layer < task.pair.architecture.n_layers:
        some = ContrastPrompts(task.prompts.rows[:n_prompts])
        with suppress(NoGapError):
            found = find_executors(
                task.pair, some, anchor, units=units, seed=run.config.seed, batch_tokens=run.batch_tokens
            )
    record: dict[str, Any] = {}
    if found:
        names = ("lost", "null", "base_kl", "steered_kl")
        record = {"components": [str(one) for one in found.components], "level": found.level, "queries": found.queries}
        record |= {name: getattr(found, name).tolist() for name in names}
    write_whole(file, json.dumps(record) + "\n")
    return found


def _read_executors(record: dict[str, Any]) -> Executors:
    def tensor(name: str) -> torch.Tensor:
        return torch.tensor(record[name], dtype=torch.float64)

    return Executors(
        components=tuple(Component.parse(address) for address in record["components"]),
        lost=tensor("lost"),
        null=tensor("null"),
        base_kl=tensor("base_kl"),
        steered_kl=tensor("steered_kl"),
        level=record["level"],
        queries=tuple(record["queries"]),
    )


def _about(hierarchy: Hierarchy, executors: Executors | None, settings: TraceStage) -> dict[str, Any]:
    """What `trace.json` says beside the graph."""
    return {
        "settings": asdict(settings),
        "rule": {
            "level": hierarchy.level,
            "share": hierarchy.share,
            "n_shuffles": hierarchy.n_shuffles,
            "plain": hierarchy.plain,
        },
        "depth": known(asdict(hierarchy.depth)),
        "executors": None
        if executors is None
        else {
            "restored": executors.restored,
            "level": executors.level,
            "n_components": len(executors.components),
            "n_prompts": len(executors.base_kl),
        },
    }
