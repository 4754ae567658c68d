"""The command line: parses, calls the library, draws progress. Results go to stdout, everything else to stderr.

Nothing at the top of this file imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightpatch import __version__
from weightpatch.cli_bench import bench
from weightpatch.cli_merge import merge
from weightpatch.cli_options import (
    AllowPickle,
    AnyAdapterBase,
    ArchitectureRow,
    AsJson,
    Base,
    DeviceMap,
    Dtype,
    Revision,
    RunPath,
    Specialized,
    SpecializedRevision,
    Units,
    quiet,
)
from weightpatch.cli_run import STAGES, anchor, do_stages, drill, localize, run, screen, trace, validate
from weightpatch.errors import PairError, WeightpatchError
from weightpatch.terminal import (
    counting,
    fail,
    print_benchmark,
    print_evaluation,
    print_json,
    print_run,
    print_table,
    status,
)

if TYPE_CHECKING:
    from weightpatch.cli_run import Stage

app = typer.Typer(
    name="weightpatch",
    help="Find which parameters of a fine-tuned language model carry what it can do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")

# Typer's base of all wrong arguments is click's, or its own copy of click, depending on its version.
_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = "interrupted. The same command continues where it stopped."
DEMO_UNITS = "blocks,attns,mlps,heads,kvs"
DEMO_TASK = "title"


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


app.command()(run)
app.command()(anchor)
app.command()(localize)
app.command()(screen)
app.command()(drill)
app.command()(trace)
app.command()(validate)
app.command()(merge)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("weightpatch-demo"),
    as_json: AsJson = False,
) -> None:
    """Run the whole job on the bundled pair, one type traced and validated: no network, no download, about a minute."""
    from weightpatch.checkpoint import BUNDLED
    from weightpatch.curves import CurveSettings, validate
    from weightpatch.run import RunConfig
    from weightpatch.suppliers import TraceSettings
    from weightpatch.traces import TraceStage, trace_run

    base, specialized = BUNDLED
    config = RunConfig(base=base, specialized=specialized, units=DEMO_UNITS)
    short = TraceStage(trace=TraceSettings(n_rounds=1, n_targets=4, n_exact=16), n_shuffles=4)
    curve = CurveSettings(shares=(0.05, 0.1, 0.2, 1.0), n_prompts=8, answers="none")
    own: dict[str, Stage] = {
        "trace": lambda opened, pair: trace_run(opened, pair, short, tasks=(DEMO_TASK,)),
        "validate": lambda opened, pair: validate(opened, pair, curve, tasks=(DEMO_TASK,)),
    }
    do_stages(config, out, stages=STAGES, as_json=as_json, own=own)


@app.command()
def inspect(
    base: Base,
    specialized: Specialized,
    units: Units = "ends,norms,attns,mlps",
    dtype: Dtype = "float32",
    architecture: ArchitectureRow = "table",
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
            architecture=architecture,
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
    about = pair.architecture
    print(
        f"{base} and {specialized} are a pair: {about.model_type}, {about.n_layers} layers, {about.n_heads} heads in "
        f"{about.n_kv_heads} key/value groups, {about.n_neurons} neurons to an MLP, one vocabulary."
    )
    table = [(str(row.component), f"{row.relative_norm:.3%}", f"{row.n_parameters:,}") for row in rows]
    print_table(("component", "relative norm of the difference", "parameters"), table)


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
def report(path: RunPath, as_json: AsJson = False) -> None:
    """One stage: write a run's report.html again from what is measured."""
    quiet()
    from weightpatch.report import write_report
    from weightpatch.run import Run

    opened = Run.open(path)
    write_report(opened)
    print_run(opened, as_json=as_json)
