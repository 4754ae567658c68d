"""The commands of the command line that make and go on with a run. Nothing at the top imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from weightpatch.cli_options import (
    AllowPickle,
    AnyAdapterBase,
    ArchitectureRow,
    AsJson,
    Base,
    DeviceMap,
    Dtype,
    Loading,
    OnlyTask,
    Revision,
    RunPath,
    Specialized,
    SpecializedRevision,
    Units,
    quiet,
)
from weightpatch.errors import WeightpatchError
from weightpatch.terminal import (
    draw,
    print_drill,
    print_edges,
    print_json,
    print_run,
    print_screening,
    print_trace,
    print_validation,
    status,
)

if TYPE_CHECKING:
    import pandas as pd

    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.run import Progress, Run, RunConfig

    Stage = Callable[[Run, ModelPair], Iterator[Progress]]

STAGES = ("anchor", "localize", "trace", "validate", "report")


class Show(Protocol):
    """Prints what a run holds."""

    def __call__(self, opened: Run, *, as_json: bool) -> None:
        """Print it, as text or as one JSON object."""
        ...


def run(
    base: Base,
    specialized: Specialized,
    out: Annotated[Path, typer.Option(help="The run folder; the same command continues an interrupted run.")],
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or the built-in set: instructions, instructions:title.")
    ] = "instructions",
    units: Units = "heads,kvs,mlps",
    layer: Annotated[int | None, typer.Option(help="Anchor layer, instead of searching it.")] = None,
    positions: Annotated[str, typer.Option(help="Readout positions with commas; from the end when negative.")] = "-1",
    response_tokens: Annotated[
        int, typer.Option(min=0, help="Read along so many tokens of the base's plain answer, and anchors at these.")
    ] = 0,
    readout: Annotated[str, typer.Option(help="projection, cosine or contrast.")] = "projection",
    estimator: Annotated[
        str, typer.Option(help="mean-difference, difference-in-differences or principal-component.")
    ] = "mean-difference",
    gates: Annotated[
        str,
        typer.Option(help="How anchors are tested: readout, behaviour (generates answers), auto (where it can)."),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer, for the gates.")] = 80,
    engine: Annotated[str, typer.Option(help="suffix (fast) or swap (the slow oracle).")] = "suffix",
    n_queries: Annotated[int, typer.Option(min=4, help="Queries of each split of the built-in prompts.")] = 24,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one forward call; else as many as suit model and device.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, choice of prompts and bootstrap.")] = 0,
    until: Annotated[str, typer.Option(help="Stop after this stage: anchor, localize or report.")] = "report",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take (memory, passes, time); load and write nothing.")
    ] = False,
    dtype: Dtype = "float32",
    architecture: ArchitectureRow = "table",
    revision: Revision = None,
    specialized_revision: SpecializedRevision = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """Anchor, localize, trace, validate, report: the main job on your own pair and prompts."""
    from pydantic import ValidationError

    if until not in STAGES:
        raise typer.BadParameter(f"unknown stage {until!r}. Choose one of {', '.join(STAGES)}.")
    from weightpatch.run import RunConfig

    try:
        config = RunConfig.model_validate(
            {
                "base": _absolute(base),
                "specialized": _absolute(specialized),
                "prompts": _absolute(prompts),
                "revision": revision,
                "specialized_revision": specialized_revision,
                "dtype": dtype,
                "architecture": architecture,
                "units": units,
                "layer": layer,
                "positions": positions.split(","),
                "response_tokens": response_tokens,
                "readout": readout,
                "estimator": estimator,
                "gates": gates,
                "max_new_tokens": max_new_tokens,
                "engine": engine,
                "n_queries": n_queries,
                "batch_tokens": batch_tokens,
                "seed": seed,
            }
        )
    except ValidationError as error:
        faults = "; ".join(f"--{'-'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise typer.BadParameter(faults) from error
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    if dry_run:
        _print_plan(config, loading, as_json=as_json)
        return
    do_stages(
        config,
        out,
        stages=STAGES[: STAGES.index(until) + 1],
        as_json=as_json,
        loading=loading,
    )


def anchor(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: fit the anchors that a run still lacks, and print them with their gates."""
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    _resume("anchor", path, loading, as_json=as_json)


def localize(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: measure the effects that a run still lacks (its anchors must be there)."""
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    _resume("localize", path, loading, as_json=as_json)


def validate(
    path: RunPath,
    necessity: Annotated[
        bool, typer.Option("--necessity/--no-necessity", help="Also put base weights into the specialized model.")
    ] = True,
    ranking: Annotated[
        Literal["effects", "screen"], typer.Option(help="Whose order: the run's effects, or its screening.")
    ] = "effects",
    controls: Annotated[
        str, typer.Option(help="Sets beside each, of equal size, with commas; activation: where the run was traced.")
    ] = "random,layer-matched,largest differences,activation,bottom",
    n_random: Annotated[int, typer.Option(min=0, help="How many of each random kind.")] = 1,
    n_prompts: Annotated[int, typer.Option(min=2, help="Prompts of each task, at most.")] = 24,
    answers: Annotated[
        Literal["all", "top", "none"],
        typer.Option(help="Generate answers with all sets, with the leading and the first random ones, or with none."),
    ] = "top",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 80,
    task: OnlyTask = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: patch the leading components of a run together, more and more, with controls beside them."""
    from weightpatch.curves import CurveSettings
    from weightpatch.curves import validate as work

    settings = CurveSettings(
        recipients=("base", "specialized") if necessity else ("base",),
        ranking=ranking,
        controls=tuple(name.strip() for name in controls.split(",") if name.strip()),
        n_random=n_random,
        n_prompts=n_prompts,
        answers=answers,
        max_new_tokens=max_new_tokens,
    )
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    own = {"validate": lambda opened, pair: work(opened, pair, settings, tasks=task or ())}
    _resume("validate", path, loading, as_json=as_json, own=own, show=print_validation)


def trace(
    path: RunPath,
    supplier: Annotated[
        str | None, typer.Option("--from", help="Path patching: from these (units, addresses), with --to.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="The target: a head, attention, MLP or neuron, or anchor.")
    ] = None,
    receives: Annotated[
        Literal["all", "q", "k", "v"], typer.Option("--input", help="Which of the target's inputs sees the supplier.")
    ] = "all",
    method: Annotated[
        Literal["exact", "activation"],
        typer.Option(help="What is patched in --from: weights (exact), or what it puts out (activation)."),
    ] = "exact",
    candidates: Annotated[
        str, typer.Option(help="Among which suppliers are looked for: units and addresses.")
    ] = "neurons,heads",
    shuffles: Annotated[int, typer.Option(min=2, help="Of the null: pairs with shuffled differences.")] = 10,
    task: OnlyTask = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: activation patching, roles, and who supplies whom; with --from and --to, single edges of each task."""
    from weightpatch.suppliers import TraceSettings
    from weightpatch.traces import EdgeSettings, TraceStage, measure_edges, trace_run

    if (supplier is None) != (target is None):
        raise typer.BadParameter("--from and --to belong together: name both ends of the edge, or none.")
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    if supplier is None or target is None:
        settings = TraceStage(trace=TraceSettings(candidates=candidates), n_shuffles=shuffles)
        own = {"trace": lambda opened, pair: trace_run(opened, pair, settings, tasks=task or ())}
        _resume("trace", path, loading, as_json=as_json, own=own, show=print_trace)
        return
    edges = EdgeSettings(suppliers=supplier, target=target, receives=receives, method=method)
    found: dict[str, pd.DataFrame] = {}
    own = {"edges": lambda opened, pair: measure_edges(opened, pair, edges, found, tasks=task or ())}
    _resume("edges", path, loading, as_json=as_json, own=own, show=partial(print_edges, found=found))


def screen(
    path: RunPath,
    units: Units = "neurons,heads,kvs",
    budget: Annotated[int, typer.Option(min=2, help="Components to patch exactly, in every task.")] = 200,
    readout: Annotated[
        Literal["anchor", "margin", "divergence"],
        typer.Option(help="What is read: the run's anchor, or the output (log-probability margin, KL)."),
    ] = "anchor",
    approximation: Annotated[
        str, typer.Option(help="outputs (exact in the component), weights, or ig (integrated gradients, joint).")
    ] = "outputs",
    n_steps: Annotated[int, typer.Option(min=1, help="Points of `ig`.")] = 8,
    grad_drop: Annotated[
        bool, typer.Option("--grad-drop", help="Sizes that cancelling does not hide; many more backward passes.")
    ] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Recovery that should not be missed; else the tenth of each unit's top list.")
    ] = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: estimate every neuron, head and group to first order, patch the top and a random sample exactly."""
    from pydantic import TypeAdapter, ValidationError

    from weightpatch.estimation import Estimation
    from weightpatch.screens import ScreenSettings, screen_run

    try:
        how = TypeAdapter(Estimation).validate_python(
            {"approximation": approximation, "n_steps": n_steps, "grad_drop": grad_drop}
        )
    except ValidationError as error:
        raise typer.BadParameter(
            "; ".join(f"--{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        ) from error
    settings = ScreenSettings(units=units, budget=budget, readout=readout, estimation=how, threshold=threshold)
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    own = {"screen": lambda opened, pair: screen_run(opened, pair, settings)}
    _resume("screen", path, loading, as_json=as_json, own=own, show=print_screening)


def drill(
    path: RunPath,
    budget: Annotated[int, typer.Option(min=1, help="Components to patch exactly, in every task.")] = 300,
    groups: Annotated[int, typer.Option(min=2, help="Groups that neurons are dealt into at each level.")] = 8,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: patch blocks, then the parts of those that matter, down to neurons; exact at every level."""
    from weightpatch.drills import DrillSettings, drill_run

    settings = DrillSettings(budget=budget, n_groups=groups)
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    own = {"drill": lambda opened, pair: drill_run(opened, pair, settings)}
    _resume("drill", path, loading, as_json=as_json, own=own, show=print_drill)


def _resume(
    stage: str,
    path: Path,
    loading: Loading,
    *,
    as_json: bool,
    own: Mapping[str, Stage] | None = None,
    show: Show = print_run,
) -> None:
    """Do one stage of a run that was begun."""
    from weightpatch.run import Run

    do_stages(
        Run.open(path).config,
        path,
        stages=(stage,),
        resumed=True,
        as_json=as_json,
        loading=loading,
        own=own,
        show=show,
    )


def do_stages(
    config: RunConfig,
    out: Path,
    *,
    stages: Iterable[str],
    as_json: bool,
    resumed: bool = False,
    loading: Loading | None = None,
    own: Mapping[str, Stage] | None = None,
    show: Show = print_run,
) -> None:
    """Check what is cheap to check, load the pair, and do the stages one after another.

    Args:
        config: The run's settings.
        out: Its folder.
        stages: Names out of `STAGES` and `own`.
        as_json: Print JSON.
        resumed: Whether the run was begun by an earlier call, whose prompts it keeps.
        loading: How checkpoints are read.
        own: Stages with settings of their own.
        show: Prints what was found.
    """
    quiet()
    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.run import Run, alone, check_folder
    from weightpatch.stages import fit_anchors, measure_effects, start

    check_folder(out, config)
    with status(f"reading {config.base} and {config.specialized}"):
        if resumed:
            prompts = Run.open(out).prompts()
        else:
            prompts = ContrastPrompts.load(config.prompts, seed=config.seed, n_queries=config.n_queries)
        pair = ModelPair.from_pretrained(
            config.base,
            config.specialized,
            revision=config.revision,
            specialized_revision=config.specialized_revision,
            dtype=config.dtype,
            architecture=config.architecture,
            prompts=prompts,
            **asdict(loading or Loading()),
        )
    if config.response_tokens and not resumed:
        prompts = _with_responses(config, pair, prompts, out)
    stages = list(stages)
    with alone(out):
        opened = start(config, pair, prompts, out)
        for stage in stages:
            if own and stage in own:
                draw(own[stage](opened, pair))
            elif stage == "anchor":
                draw(fit_anchors(opened, pair))
            elif stage == "localize":
                draw(measure_effects(opened, pair))
            elif stage == "trace":
                from weightpatch.traces import TraceStage, trace_run

                draw(trace_run(opened, pair, TraceStage()))
            elif stage == "validate":
                from weightpatch.curves import CurveSettings
                from weightpatch.curves import validate as work

                try:
                    draw(work(opened, pair, CurveSettings()))
                except WeightpatchError:
                    if "report" in stages:  # whatever was found before stays to be read
                        _report(opened)
                    raise
            else:
                _report(opened)
    show(opened, as_json=as_json)


def _report(run: Run) -> None:
    from weightpatch.report import write_report  # takes a second

    write_report(run)


def _print_plan(config: RunConfig, loading: Loading, *, as_json: bool) -> None:
    quiet()
    from weightpatch.planning import plan_run

    plan = plan_run(config, allow_pickle=loading.allow_pickle, any_adapter_base=loading.any_adapter_base)
    if as_json:
        print_json({"plan": asdict(plan)})
    else:
        print(plan)


def _with_responses(config: RunConfig, pair: ModelPair, prompts: ContrastPrompts, out: Path) -> ContrastPrompts:
    """The prompts with responses: those of a run that was begun with the same prompts, or new ones."""
    from weightpatch.responses import with_responses
    from weightpatch.run import Run

    if (out / "manifest.json").is_file():
        known = Run.open(out).prompts()
        if known.without_responses().digest() == prompts.digest():
            return known
    with status("the base answers the plain queries"):
        return with_responses(pair, prompts, n_tokens=config.response_tokens)


def _absolute(name: str) -> str:
    """A path that exists, from the root on, so that a run can be continued from anywhere; other names as they are."""
    return str(Path(name).expanduser().absolute()) if Path(name).expanduser().exists() else name
