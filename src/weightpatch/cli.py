"""The command line: parses, calls the library, draws progress. Results go to stdout, everything else to stderr.

Nothing at the top of this file imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightpatch import __version__
from weightpatch.errors import PairError, WeightpatchError
from weightpatch.terminal import (
    counting,
    draw,
    fail,
    print_benchmark,
    print_evaluation,
    print_json,
    print_run,
    print_table,
    print_validation,
    status,
)

if TYPE_CHECKING:
    from weightpatch.curves import CurveSettings
    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.run import RunConfig

app = typer.Typer(
    name="weightpatch",
    help="Find which parameters of a fine-tuned language model carry what it can do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Typer's base of all wrong arguments is click's, or its own copy of click, depending on its version.
_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = "interrupted. The same command continues where it stopped."
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
Units = Annotated[
    str,
    typer.Option(
        help="Units (blocks, attns, mlps, heads, heads.q, heads.o, kvs, neurons, norms, rests, ends) and addresses "
        "(L5.N812, L5.H3.q), with commas."
    ),
]


def main() -> None:
    """Entry point: exit code 0, 2 for a user's mistake, 1 for anything else; no traceback for a user's mistake."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except WeightpatchError as error:
        fields = {"pair": False, "differences": list(error.differences)} if isinstance(error, PairError) else {}
        fail(str(error), as_json, 2, fields)
    except _CommandLineError as error:
        if (context := getattr(error, "ctx", None)) and not as_json:
            print(context.get_usage(), file=sys.stderr)
        fail(error.format_message(), as_json, 2)
    except (typer.Abort, KeyboardInterrupt):
        fail(_INTERRUPTED, as_json, 1)
    except Exception as error:
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", as_json, 1)
    else:
        if code == 130:  # what typer makes of Ctrl-C
            fail(_INTERRUPTED, as_json, 1)
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
    quiet()
    from weightpatch.difference import weight_differences
    from weightpatch.pair import ModelPair

    with status(f"reading {base} and {specialized}"):
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
        print_json({"pair": True, "differences": differences})
        return
    architecture = pair.architecture
    print(
        f"{base} and {specialized} are a pair: {architecture.model_type}, {architecture.n_layers} layers, "
        f"{architecture.n_heads} heads in {architecture.n_kv_heads} key/value groups, {architecture.n_neurons} neurons "
        "to an MLP, one vocabulary."
    )
    table = [(str(row.component), f"{row.relative_norm:.3%}", f"{row.n_parameters:,}") for row in rows]
    print_table(("component", "relative norm of the difference", "parameters"), table)


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
                "base": _absolute(base),
                "specialized": _absolute(specialized),
                "prompts": _absolute(prompts),
                "revision": revision,
                "specialized_revision": specialized_revision,
                "dtype": dtype,
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
    _run(
        config,
        out,
        stages=STAGES[: STAGES.index(until) + 1],
        as_json=as_json,
        device_map=device_map,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
    )


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or PEFT adapter folder.")],
    suite: Annotated[
        str,
        typer.Option(
            help="instruct, math, code, a JSONL file with IFEval's fields, or a benchmark that lm-eval runs: ifeval, "
            "gsm8k, humaneval, mbpp, mmlu."
        ),
    ],
    base: Annotated[str | None, typer.Option(help="What an adapter is applied to.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every answer with its verdicts here, as JSONL.")] = None,
    n: Annotated[
        int | None,
        typer.Option(min=1, help="Problems of each type of a built-in suite (36), or of a benchmark (all)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 192,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated side by side.")] = 32,
    seed: Annotated[int, typer.Option(help="Which problems of a built-in suite.")] = 0,
    dtype: Dtype = "float32",
    revision: Revision = None,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    run_unsafe_code: Annotated[
        bool, typer.Option("--run-unsafe-code", help="Let lm-eval run code that the model wrote (humaneval, mbpp).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """How often do a model's own answers pass? Greedy generation, strict and loose, with 95 % intervals."""
    quiet()
    from weightpatch.benchmarks import BENCHMARKS, run_benchmark
    from weightpatch.checkpoint import load_alone, read_dtype
    from weightpatch.evaluation import evaluate
    from weightpatch.suites import load_suite

    problems = None if suite in BENCHMARKS else load_suite(suite, n=n or 36, seed=seed)
    with status(f"reading {model}"):
        loaded, tokenizer = load_alone(
            model,
            base=base,
            revision=revision,
            dtype=read_dtype(dtype),
            device_map=device_map,
            allow_pickle=allow_pickle,
        )
    if problems is None:
        result = run_benchmark(loaded, tokenizer, suite, n=n, batch_size=batch_size, run_unsafe_code=run_unsafe_code)
        print_benchmark(result, as_json=as_json)
        return
    with counting("answers", len(problems.problems)) as on_done:
        found = evaluate(
            loaded, tokenizer, problems, max_new_tokens=max_new_tokens, batch_size=batch_size, on_done=on_done
        )
    if out:
        found.save(out)
    print_evaluation(found, as_json=as_json)


@app.command()
def anchor(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: fit the anchors that a run still lacks, and print them with their gates."""
    _resume("anchor", path, device_map, allow_pickle, any_adapter_base, as_json)


@app.command()
def localize(
    path: RunPath,
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    any_adapter_base: AnyAdapterBase = False,
    as_json: AsJson = False,
) -> None:
    """One stage: measure the effects that a run still lacks (its anchors must be there)."""
    _resume("localize", path, device_map, allow_pickle, any_adapter_base, as_json)


@app.command()
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
    _resume("validate", path, device_map, allow_pickle, any_adapter_base, as_json, curves=settings)


@app.command()
def report(path: RunPath, as_json: AsJson = False) -> None:
    """One stage: write a run's report.html again from what is measured."""
    quiet()
    from weightpatch.report import write_report
    from weightpatch.run import Run

    opened = Run.open(path)
    write_report(opened)
    print_run(opened, as_json=as_json)


def _resume(
    stage: str,
    path: Path,
    device_map: str | None,
    allow_pickle: bool,
    any_adapter_base: bool,
    as_json: bool,
    *,
    curves: CurveSettings | None = None,
) -> None:
    """Do one stage of a run that was begun."""
    from weightpatch.run import Run

    _run(
        Run.open(path).config,
        path,
        stages=(stage,),
        resumed=True,
        as_json=as_json,
        device_map=device_map,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
        curves=curves,
    )


def _run(
    config: RunConfig,
    out: Path,
    *,
    stages: Iterable[str],
    as_json: bool,
    resumed: bool = False,
    device_map: str | None = None,
    allow_pickle: bool = False,
    any_adapter_base: bool = False,
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
            device_map=device_map,
            allow_pickle=allow_pickle,
            any_adapter_base=any_adapter_base,
            prompts=prompts,
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


def quiet() -> None:
    """Keep transformers' bars and advice off stderr; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
