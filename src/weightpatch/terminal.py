"""What the command line prints and draws: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from weightpatch.jsonable import known

if TYPE_CHECKING:
    import pandas as pd

    from weightpatch.benchmarks import BenchmarkResult
    from weightpatch.evaluation import Evaluation
    from weightpatch.run import Progress, Run

TOP = 20
"""Components that `--json` lists for each task."""


def print_run(opened: Run, *, as_json: bool) -> None:
    """Print what a run has found so far: a JSON object, or for each task its anchor and the leading components."""
    tasks = {task: task_result(opened, task) for task in opened.tasks}
    if as_json:
        report = str(opened.report) if opened.report.is_file() else None
        print_json({"run": str(opened.path), "report": report, "tasks": tasks})
        return
    for task, result in tasks.items():
        fitted = result["anchor"]
        if fitted is None:
            print(f"{task}: no anchor yet")
            continue
        failed = [gate["name"] for gate in fitted["gates"] if not gate["passed"]]
        verdict = f"unstable, failed {', '.join(failed)}" if failed else "every gate passed"
        print(
            f"\n{task}: anchor at layer {fitted['layer']}, gap {fitted['gap']:.3g} on {fitted['n_held_out']} held-out "
            f"prompts, {verdict}"
        )
        if result["error"]:
            print(f"  {result['error']}")
        rows = [
            (row["component"], f"{row['recovery']:.3f}", f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]")
            for row in result["effects"][:5]
        ]
        if rows:
            print_table(("component", "recovery", "95 % interval"), rows)
            print(
                f"  over {result['n_prompts']} prompts; a block contains its attention and MLP, so these do not add up"
            )
    if opened.report.is_file():
        print(f"\nreport: {opened.report}")


def task_result(opened: Run, task: str) -> dict[str, Any]:
    """What `--json` says of one task."""
    if not (opened.folder(task) / "anchor.safetensors").is_file():
        return {"anchor": None, "effects": [], "n_prompts": 0, "error": None}
    fitted = opened.anchor(task)
    about: dict[str, Any] = {"gap": math.nan, "gates": [], "n_held_out": 0}
    about |= asdict(fitted.report) if fitted.report else {}
    measured = (opened.folder(task) / "effects.parquet").is_file() and not opened.failure(task)
    columns = ["component", "recovery", "ci_low", "ci_high"]
    effects = opened.effects(task) if measured else None
    return {
        "anchor": {
            "layer": fitted.layer,
            "gap": about["gap"],
            "stable": fitted.report.stable if fitted.report else None,
            "gates": list(about["gates"]),
            "n_held_out": about["n_held_out"],
        },
        "effects": effects.top(TOP, seed=opened.config.seed)[columns].to_dict(orient="records") if effects else [],
        "n_prompts": len(effects.prompt_ids) if effects else 0,
        "error": opened.failure(task),
    }


def print_validation(opened: Run, *, as_json: bool) -> None:
    """Print a run's joint patches: what comes back with the leading components, and with random ones."""
    found = {task: opened.validation(task) for task in opened.tasks}
    if as_json:
        print_json({"run": str(opened.path), "tasks": {task: record["points"] for task, record in found.items()}})
        return
    for task, record in found.items():
        print(f"\n{task}: components patched together, leading ones first")
        rows = [
            (
                f"{point['arm']} into the {point['recipient']}",
                str(point["k"]),
                f"{point['recovery']['estimate']:.3f}",
                f"{point['kl_recovery']:.3f}",
                "-" if point["passed"] is None else f"{point['n_passed']}/{point['n_prompts']}",
            )
            for point in record["points"]
        ]
        print_table(("set", "components", "recovery", "KL recovery", "answers that pass"), rows)


def print_trace(opened: Run, *, as_json: bool) -> None:
    """Print a run's traces: how many components have each role, the leading ones, and who supplies whom."""
    found = {task: opened.trace(task) for task in opened.tasks}
    if as_json:
        print_json({"run": str(opened.path), "tasks": found})
        return
    for task, record in found.items():
        table = opened.roles(task)
        if record is None or table is None:
            print(f"{task}: not traced")
            continue
        counts = ", ".join(f"{count} {role}" for role, count in table["role"].value_counts().items())
        print(f"\n{task}: {counts}")
        rows = [
            (edge["source"], edge["target"], edge["kind"], _share(edge["total"]), _share(edge["direct"]))
            for edge in record.get("edges", ())[:TOP]
        ]
        if rows:
            print_table(("from", "to", "", "total", "direct"), rows)


def print_edges(opened: Run, *, as_json: bool, found: Mapping[str, pd.DataFrame]) -> None:
    """Print single edges of each task: the effect through everything between, and where only the target sees it."""
    if as_json:
        tasks = {task: table.to_dict(orient="records") for task, table in found.items()}
        print_json({"run": str(opened.path), "tasks": tasks})
        return
    for task, table in found.items():
        print(f"\n{task}: shares of the anchor's gap")
        leading = table.sort_values("total", key=abs, ascending=False).head(TOP)
        rows = [
            (
                str(row["supplier"]),
                str(row["target"]),
                *(f"{row[name]:.4f}" for name in ("total", "direct")),
                f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]",
            )
            for row in leading.to_dict(orient="records")
        ]
        print_table(("from", "to", "total", "direct", "95 % interval of direct"), rows)


def _share(share: Mapping[str, float] | None) -> str:
    return "-" if share is None else f"{share['value']:.3f}"


def print_screening(opened: Run, *, as_json: bool) -> None:
    """Print a run's screenings: verdict on the estimates, and the leading components of each unit."""
    found = {task: opened.screening(task) for task in opened.tasks}
    tables = {task: opened.screen_table(task) for task, record in found.items() if record is not None}
    leading = {
        task: {
            unit: own.assign(best=own["exact_recovery"].fillna(own["recovery"])).nlargest(TOP, "best")
            for unit, own in table.groupby("unit", sort=False)
        }
        for task, table in tables.items()
    }
    columns = ["component", "recovery", "exact_recovery"]
    if as_json:
        tasks = {
            task: {
                "units": record["units"],
                "top": {unit: top[columns].to_dict(orient="records") for unit, top in leading[task].items()},
            }
            for task, record in found.items()
            if record is not None
        }
        print_json({"run": str(opened.path), "tasks": tasks})
        return
    for task, record in found.items():
        print(f"\n{task}:" + ("" if record else f" not screened. {opened.failure(task) or ''}"))
        for unit, about in (record or {"units": {}})["units"].items():
            print(f"  {about['verdict']}")
            best = leading[task][unit].head(5)
            exact = ["-" if math.isnan(value) else f"{value:.5f}" for value in best["exact_recovery"].astype(float)]
            estimated = [f"{value:.5f}" for value in best["recovery"]]
            rows = list(zip(best["component"].astype(str), estimated, exact, strict=True))
            print_table(("component", "estimated recovery", "exact"), rows)


def print_drill(opened: Run, *, as_json: bool) -> None:
    """Print what a run's drill-downs found, as trees."""
    found = {task: opened.drill(task) for task in opened.tasks}
    if as_json:
        print_json({"run": str(opened.path), "tasks": {task: record for task, record in found.items() if record}})
        return
    for task, record in found.items():
        print(f"\n{task}: recovery, and the sum over parts where a component was opened")
        print(record["tree"] if record else f"  not drilled. {opened.failure(task) or ''}")


def print_evaluation(found: Evaluation, *, as_json: bool) -> None:
    """Print pass rates over the suite and by type, and which types could not be judged."""
    rates, types = found.rates, found.types
    if as_json:
        print_json(
            {
                "suite": found.suite,
                "n": rates.n,
                "strict": asdict(rates.strict),
                "loose": asdict(rates.loose),
                "types": {name: asdict(own) for name, own in types.items()},
                "unknown_types": found.unknown_types,
            }
        )
        return
    rows = [
        (
            name,
            str(own.n),
            f"{own.strict.estimate:.2f} [{own.strict.low:.2f}, {own.strict.high:.2f}]",
            f"{own.loose.estimate:.2f}",
        )
        for name, own in {**types, "all checks": rates}.items()
    ]
    print_table(("type", "n", "strict [95 %]", "loose"), rows)
    for name, count in found.unknown_types.items():
        print(f"not judged: {count} of type {name}, for which there is no checker here")


def print_benchmark(found: BenchmarkResult, *, as_json: bool) -> None:
    """Print what lm-eval measured."""
    if as_json:
        print_json({"suite": found.name, "n": found.n, "metrics": dict(found.metrics)})
        return
    print_table(
        ("metric", f"{found.name}, {found.n} problems"), [(key, f"{v:.4f}") for key, v in found.metrics.items()]
    )


def draw(steps: Iterator[Progress]) -> None:
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
            bars.update(shown[key], completed=step.done, total=step.total or None)
        for bar in shown.values():
            if bars.tasks[bar].total is None:  # a stage that is not counted in components
                bars.update(bar, total=1, completed=1)


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; call what it yields with how many are done."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        bar = bars.add_task(text, total=total)
        yield lambda done: bars.update(bar, completed=done)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show on stderr what is going on."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows under a head, the first column to the left and the others to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells))


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on one line; what is not finite becomes null."""
    print(json.dumps(known(record), ensure_ascii=False, allow_nan=False))


def fail(message: str, as_json: bool, code: int, fields: dict[str, Any] | None = None) -> NoReturn:
    """End the program with an error: words on stderr, or one JSON object on stdout."""
    if as_json:
        print_json({**(fields or {}), "error": message})
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
