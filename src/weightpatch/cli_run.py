"""The commands of the command line that make and go on with a run. Nothing at the top imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Revision,
    RunPath,
    Specialized,
    SpecializedRevision,
    Units,
    quiet,
)
from weightpatch.terminal import draw, print_json, print_run, print_validation, status

if TYPE_CHECKING:
    from weightpatch.curves import CurveSettings
    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.run import RunConfig

STAGES = ("anchor", "localize", "report")


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
    seed: Annotated[int, typer.Option(help="Of splits, choice of prompts and bootstrap.")] = 0,
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
    """Anchor, localize, report: the main job on your own pair and prompts."""
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
        bool, typer.Option("--necessity", help="Also put base weights into the specialized model.")
    ] = False,
    n_random: Annotated[int, typer.Option(min=0, help="Random sets beside each set.")] = 1,
    n_prompts: Annotated[int, typer.Option(min=2, help="Prompts of each task, at most.")] = 24,
    no_answers: Annotated[bool, typer.Option("--no-answers", help="Generate nothing: no pass rates.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 80,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: patch the leading components of a run together, more and more, with random sets beside them."""
    from weightpatch.curves import CurveSettings

    settings = CurveSettings(
        recipients=("base", "specialized") if necessity else ("base",),
        n_random=n_random,
        n_prompts=n_prompts,
        answers=not no_answers,
        max_new_tokens=max_new_tokens,
    )
    loading = Loading(device_map=device_map, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base)
    _resume("validate", path, loading, as_json=as_json, curves=settings)


def _resume(
    stage: str,
    path: Path,
    loading: Loading,
    *,
    as_json: bool,
    curves: CurveSettings | None = None,
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
        curves=curves,
    )


def do_stages(
    config: RunConfig,
    out: Path,
    *,
    stages: Iterable[str],
    as_json: bool,
    resumed: bool = False,
    loading: Loading | None = None,
    curves: CurveSettings | None = None,
) -> None:
    """Check what is cheap to check, load the pair, and do the stages one after another."""
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
    with alone(out):
        opened = start(config, pair, prompts, out)
        for stage in stages:
            if stage == "anchor":
                draw(fit_anchors(opened, pair))
            elif stage == "localize":
                draw(measure_effects(opened, pair))
            elif stage == "validate":
                from weightpatch.curves import CurveSettings, validate

                draw(validate(opened, pair, curves or CurveSettings()))
            else:
                from weightpatch.report import write_report

                write_report(opened)
    if "validate" in stages:
        print_validation(opened, as_json=as_json)
    else:
        print_run(opened, as_json=as_json)


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
