"""The command line: parses, calls the library, draws progress. Results go to stdout, everything else to stderr.

Nothing at the top of this file imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightpatch import __version__
from weightpatch.errors import PairError, WeightpatchError

if TYPE_CHECKING:
    from weightpatch.run import Progress, Run, RunConfig

app = typer.Typer(
    name="weightpatch",
    help="Find which parameters of a fine-tuned language model carry what it can do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Typer's base of all wrong arguments is click's, or its own copy of click, depending on its version.
_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

TOP = 20
DEMO_UNITS = "blocks,attns,mlps,heads,kvs"
STAGES = ("anchor", "localize", "report")

Base = Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder or .gguf file of the base.")]
Specialized = Annotated[
    str, typer.Argument(metavar="SPECIALIZED", help="The same of the specialized model, or a PEFT adapter folder.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Dtype = Annotated[str, typer.Option(help="One dtype for both: float32, bfloat16, float16, float64.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the hub.")]
SpecializedRevision = Annotated[str | None, typer.Option(help="The same of the specialized model.")]
DeviceMap = Annotated[str | None, typer.Option(help="As in transformers: auto, cuda, mps, cpu.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights too; they can run code.")]
AnyAdapterBase = Annotated[
    bool, typer.Option("--any-adapter-base", help="Apply an adapter although it names another base.")
]
Units = Annotated[str, typer.Option(help="Units and addresses with commas: heads,kvs,mlps,L5.N812.")]


def main() -> None:
    """Entry point: exit code 0, 2 for a user's mistake, 1 for anything else; no traceback for a user's mistake."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except WeightpatchError as error:
        fields = {"pair": False, "differences": list(error.differences)} if isinstance(error, PairError) else {}
        _fail(str(error), as_json, 2, fields)
    except _CommandLineError as error:
        message = error.format_message()
        usage = getattr(error, "ctx", None)
        _fail(message if as_json or not usage else f"{usage.get_usage()}\n{message}", as_json, 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted. The same command continues where it stopped.", as_json, 1)
    except Exception as error:
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", as_json, 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("weightpatch-demo"),
    as_json: AsJson = False,
) -> None:
    """Run the whole job on the bundled pair: no network, no download, about a minute."""
    from weightpatch.checkpoint import BUNDLED
    from weightpatch.run import RunConfig

    base, specialized = BUNDLED
    config = RunConfig(base=base, specialized=specialized, units=DEMO_UNITS)
    _run(config, out, stages=STAGES, as_json=as_json)


@app.command()
def inspect(
    base: Base,
    specialized: Specialized,
    units: Units = "ends,norms,attns,mlps",
    dtype: Dtype = "float32",
    revision: Revision = None,
    specialized_revision: SpecializedRevision = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """Are they a pair? Prints the verdict and where the weights differ."""
    _quiet()
    from weightpatch.difference import weight_differences
    from weightpatch.pair import ModelPair

    with _status(f"reading {base} and {specialized}"):
        pair = ModelPair.from_pretrained(
            base,
            specialized,
            revision=revision,
            specialized_revision=specialized_revision,
            dtype=dtype,
            device_map=device_map,
            allow_pickle=allow_pickle,
            any_adapter_base=any_adapter_base,
        )
        rows = weight_differences(pair, units)
    if as_json:
        differences = [
            {
                "component": str(row.component),
                "unit": row.component.unit,
                "layer": row.component.layer,
                "relative_norm": row.relative_norm,
                "n_parameters": row.n_parameters,
            }
            for row in rows
        ]
        _print_json({"pair": True, "differences": differences})
        return
    architecture = pair.architecture
    print(
        f"{base} and {specialized} are a pair: {architecture.model_type}, {architecture.n_layers} layers, "
        f"{architecture.n_heads} heads in {architecture.n_kv_heads} key/value groups, {architecture.n_neurons} neurons "
        "to an MLP, one vocabulary."
    )
    table = [(str(row.component), f"{row.relative_norm:.3%}", f"{row.n_parameters:,}") for row in rows]
    _print_table(("component", "relative norm of the difference", "parameters"), table)


@app.command()
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
    readout: Annotated[str, typer.Option(help="projection, cosine or contrast.")] = "projection",
    estimator: Annotated[str, typer.Option(help="mean-difference or principal-component.")] = "mean-difference",
    engine: Annotated[str, typer.Option(help="suffix (fast) or swap (the slow oracle).")] = "suffix",
    n_queries: Annotated[int, typer.Option(min=4, help="Queries of each split of the built-in prompts.")] = 24,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one forward call.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of splits, choice of prompts and bootstrap.")] = 0,
    until: Annotated[str, typer.Option(help="Stop after this stage: anchor, localize or report.")] = "report",
    dtype: Dtype = "float32",
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
                "base": base,
                "specialized": specialized,
                "prompts": prompts,
                "revision": revision,
                "specialized_revision": specialized_revision,
                "dtype": dtype,
                "units": units,
                "layer": layer,
                "positions": positions.split(","),
                "readout": readout,
                "estimator": estimator,
                "engine": engine,
                "n_queries": n_queries,
                "batch_tokens": batch_tokens,
                "seed": seed,
            }
        )
    except ValidationError as error:
        faults = "; ".join(f"--{'-'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise typer.BadParameter(faults) from error
    _run(
        config,
        out,
        stages=STAGES[: STAGES.index(until) + 1],
        as_json=as_json,
        device_map=device_map,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
    )


@app.command()
def anchor(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: fit the anchors that a run still lacks, and print them with their gates."""
    _run(
        _config_of(path),
        path,
        stages=("anchor",),
        as_json=as_json,
        device_map=device_map,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
    )


@app.command()
def localize(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: measure the effects that a run still lacks (its anchors must be there)."""
    _run(
        _config_of(path),
        path,
        stages=("localize",),
        as_json=as_json,
        device_map=device_map,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
    )


@app.command()
def report(path: RunPath, as_json: AsJson = False) -> None:
    """One stage: write a run's report.html again from what is measured."""
    _quiet()
    from weightpatch.report import write_report
    from weightpatch.run import Run

    opened = Run.open(path)
    write_report(opened)
    _print_run(opened, as_json=as_json)


def _config_of(path: Path) -> RunConfig:
    from weightpatch.run import Run

    return Run.open(path).config


def _run(
    config: RunConfig,
    out: Path,
    *,
    stages: Iterable[str],
    as_json: bool,
    device_map: str | None = None,
    allow_pickle: bool = False,
    any_adapter_base: bool = False,
) -> None:
    """Check what is cheap to check, load the pair, and do the stages one after another."""
    _quiet()
    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.run import Run, check_free, config_changes, fit_anchors, measure_effects, refusal, start

    if (out / "manifest.json").is_file():
        earlier = Run.open(out)
        if changes := config_changes(earlier, config):
            raise refusal(earlier, changes)
    else:
        check_free(out)
    with _status(f"reading {config.base} and {config.specialized}"):
        prompts = ContrastPrompts.load(config.prompts, seed=config.seed, n_queries=config.n_queries)
        pair = ModelPair.from_pretrained(
            config.base,
            config.specialized,
            revision=config.revision,
            specialized_revision=config.specialized_revision,
            dtype=config.dtype,
            device_map=device_map,
            allow_pickle=allow_pickle,
            any_adapter_base=any_adapter_base,
            prompts=prompts,
        )
        opened = start(config, pair, prompts, out)
    for stage in stages:
        if stage == "report":
            from weightpatch.report import write_report

            write_report(opened)
        else:
            _draw((fit_anchors if stage == "anchor" else measure_effects)(opened, pair))
    _print_run(opened, as_json=as_json)


def _print_run(opened: Run, *, as_json: bool) -> None:
    tasks = {task: _task_result(opened, task) for task in opened.tasks}
    if as_json:
        _print_json({"run": str(opened.path), "report": str(opened.report), "tasks": tasks})
        return
    for task, result in tasks.items():
        fitted = result["anchor"]
        if fitted is None:
            print(f"{task}: no anchor yet")
            continue
        failed = [gate["name"] for gate in fitted["gates"] if not gate["passed"]]
        verdict = f"unstable, failed {', '.join(failed)}" if failed else "every gate passed"
        print(f"\n{task}: anchor at layer {fitted['layer']}, gap {fitted['gap']:.3g}, {verdict}")
        if result["error"]:
            print(f"  {result['error']}")
        rows = [
            (row["component"], f"{row['recovery']:+.1%}", f"{row['ci_low']:+.1%} to {row['ci_high']:+.1%}")
            for row in result["effects"][:5]
        ]
        if rows:
            _print_table(("component", "recovery", "95 % interval"), rows)
    if opened.report.is_file():
        print(f"\nreport: {opened.report}")


def _task_result(opened: Run, task: str) -> dict[str, Any]:
    """What `--json` says of one task."""
    from dataclasses import asdict

    if not (opened.folder(task) / "anchor.safetensors").is_file():
        return {"anchor": None, "effects": [], "error": None}
    fitted = opened.anchor(task)
    about = asdict(fitted.report) if fitted.report else {"gap": None, "gates": []}
    measured = (opened.folder(task) / "effects.parquet").is_file() and not opened.failure(task)
    columns = ["component", "recovery", "ci_low", "ci_high"]
    top = opened.effects(task).top(TOP, seed=opened.config.seed)[columns] if measured else None
    return {
        "anchor": {
            "layer": fitted.layer,
            "gap": about["gap"],
            "stable": fitted.report.stable if fitted.report else None,
            "gates": list(about["gates"]),
        },
        "effects": [] if top is None else top.to_dict(orient="records"),
        "error": opened.failure(task),
    }


def _draw(steps: Iterator[Progress]) -> None:
    """Show progress on stderr while a stage runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        shown: dict[tuple[str, str], Any] = {}
        for step in steps:
            key = (step.stage, step.task)
            if key not in shown:
                shown[key] = bars.add_task(f"{step.stage} {step.task}", total=step.total or None)
            bars.update(shown[key], completed=step.done)
        for bar in shown.values():
            bars.update(bar, total=bars.tasks[bar].total or 1, completed=bars.tasks[bar].total or 1)


@contextmanager
def _status(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _quiet() -> None:
    """Keep transformers' bars and advice off stderr; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells))


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _fail(message: str, as_json: bool, code: int, fields: dict[str, Any] | None = None) -> None:
    if as_json:
        _print_json({**(fields or {}), "error": message})
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
