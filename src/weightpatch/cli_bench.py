"""The `bench` commands of the command line. Like `cli`, nothing at the top of this file imports torch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightpatch.cli_options import AsJson, quiet
from weightpatch.jsonable import known
from weightpatch.terminal import counting, print_json, print_table, status

if TYPE_CHECKING:
    from weightpatch.planted.calibration import Calibration
    from weightpatch.planted.scoring import Row as ScoreRow
    from weightpatch.planted.suite import Suite
    from weightpatch.speed import Row, Speed
    from weightpatch.statistics import Interval

bench = typer.Typer(help="Measure the program itself.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Keeps `bench` a group of commands, however few it has."""


@bench.command()
def speed(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="As in `run`; without it, the bundled pair.")
    ] = None,
    specialized: Annotated[str | None, typer.Argument(metavar="SPECIALIZED", help="As in `run`.")] = None,
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or the built-in set: instructions, instructions:title.")
    ] = "instructions",
    n_prompts: Annotated[int, typer.Option(min=1, help="How many of them, drawn at random.")] = 16,
    layers: Annotated[
        str | None, typer.Option(help="Anchor layers, with commas; without it, at 60, 80 and 97 % of the depth.")
    ] = None,
    units: Annotated[
        str, typer.Option(help="Units that are patched (heads, kvs, attns, mlps, neurons, blocks), with commas.")
    ] = "heads,kvs,attns,mlps",
    sample: Annotated[
        int, typer.Option(min=1, help="Components that the loops are timed on; at least one from every layer is taken.")
    ] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is done; medians are reported.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts drawn and the components sampled.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that torch computes with.")] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Some of loop, nnsight, transformer-lens, pyvene, swap, suffix, with commas; all without it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The same exact sweep by a plain loop, by other tools (extra `bench`) and by our engines, side by side."""
    if base is not None and specialized is None:
        raise typer.BadParameter("name the specialized model too, or neither for the bundled pair.")
    anchor_layers = _numbers(layers) if layers else ()
    quiet()
    import torch

    from weightpatch.checkpoint import BUNDLED
    from weightpatch.pair import ModelPair
    from weightpatch.prompts import ContrastPrompts
    from weightpatch.speed import SpeedSettings, measure_speed
    from weightpatch.speed.contestants import CONTESTANTS, check_names

    settings = SpeedSettings(
        layers=anchor_layers,
        units=units,
        engines=check_names(name.strip() for name in engines.split(",")) if engines else CONTESTANTS,
        n_prompts=n_prompts,
        sample=sample,
        repeats=repeats,
        seed=seed,
    )
    if threads:
        torch.set_num_threads(threads)
    names = (base, specialized) if base is not None and specialized is not None else BUNDLED
    with status(f"reading {names[0]} and {names[1]}"):
        loaded = ContrastPrompts.load(prompts, seed=seed)
        pair = ModelPair.from_pretrained(*names, prompts=loaded)
    with counting("turns", 100) as update:
        found = measure_speed(pair, loaded, settings, on_turn=lambda done, total: update(round(100 * done / total)))
    _print_speed(found, as_json=as_json)


@bench.command()
def planted(
    make: Annotated[bool, typer.Option("--make", help="Plant sources in a base: new plants from any seed.")] = False,
    score: Annotated[bool, typer.Option("--score", help="Score methods of localization on plants.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Count who is called source where the carriers were taken out.")
    ] = False,
    suite: Annotated[
        str, typer.Option(help="tiny, the shipped suite of 40 plants (with --make, a fresh one), or a suite's folder.")
    ] = "tiny",
    base: Annotated[
        str | None, typer.Option(help="Where the base of a suite lies, as in `run`, if not where the suite says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the plants with --make; else of prompts and shuffles.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where --make writes; planted-SUITE-SEED without it.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes of one thread each; all cores without it.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods to score, with commas; all without it.")] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(help="Scores of another tool, NAME=FILE: a CSV file of plant, component, score. Repeatable."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Where --score writes the figure, an HTML file.")] = None,
    n_queries: Annotated[
        int, typer.Option(min=4, help="Queries that --score fits each anchor on, and as many to measure.")
    ] = 12,
    as_json: AsJson = False,
) -> None:
    """Pairs whose sources are known: make them, score methods on them, and calibrate the rule that gives roles."""
    if not (make or score or calibrate):
        raise typer.BadParameter("say what to do: --make, --score, --calibrate, or several of them.")
    named = dict(_named_file(one) for one in scores or [])
    quiet()
    from weightpatch.planted.making import make_suite
    from weightpatch.planted.methods import METHODS, check_methods
    from weightpatch.planted.scoring import read_scores, score_suite, summarize
    from weightpatch.planted.suite import SUITES, Suite, places

    chosen = check_methods([name.strip() for name in methods.split(",")]) if methods else tuple(METHODS)
    others = {name: read_scores(file) for name, file in named.items()}
    folder = suite
    if make:
        if suite not in SUITES:
            raise typer.BadParameter(f"{suite!r} cannot be made. Choose one of {', '.join(SUITES)}.")
        folder = str(out or f"planted-{suite}-{seed}")
        total, done = len(places(SUITES[suite])), 0
        with counting("plants", total) as update:
            for made in make_suite(folder, seed=seed, counts=SUITES[suite], jobs=jobs):
                done += made.took
                update(done)
    found = Suite.open(folder, base=base)
    rows: list[ScoreRow] = []
    if score:
        with counting("scored", len(found.plants)) as update:
            counted = count(1)
            every = score_suite(
                found,
                methods=chosen,
                n_queries=n_queries,
                seed=seed,
                others=others,
                jobs=jobs,
                on_plant=lambda _: update(next(counted)),
            )
        rows = summarize(every)
        if figure:
            from weightpatch.planted.figure import score_figure

            score_figure(rows).write_html(figure, include_plotlyjs=True)
            print(f"figure: {figure}", file=sys.stderr)
    calibration = _calibrate(found, seed=seed, jobs=jobs) if calibrate else None
    if as_json:
        told = {"rows": [known(asdict(row)) for row in rows], "plants": len(found.plants), "version": found.version}
        if calibration:
            told["calibration"] = [known(asdict(row)) for row in calibration.rates]
            told["coverage"] = [asdict(row) for row in calibration.coverage]
        print_json(told)
        return
    redrawn = sum(len(attempts) for attempts in found.failures.values())
    version = f", version {found.version}" if found.version else ""
    print(f"{len(found.plants)} plants of {suite}{version}; {redrawn} designs that did not take were drawn again")
    for among in dict.fromkeys(row.among for row in rows):
        print(f"\namong {'components of the same unit' if among == 'unit' else 'all components with a difference'}")
        print_table(
            ("variant", "unit", "method", "AUROC", "95 % interval", "average precision", "precision", "plants"),
            [_score_cells(row) for row in rows if row.among == among],
        )
    if calibration:
        _print_calibration(calibration)


def _calibrate(suite: Suite, *, seed: int, jobs: int | None) -> Calibration:
    from weightpatch.planted.calibration import calibrate

    with counting("calibrated", len(suite.plants)) as update:
        counted = count(1)
        return calibrate(suite, seed=seed, jobs=jobs, on_plant=lambda _: update(next(counted)))


def _print_calibration(calibration: Calibration) -> None:
    print("\ncalled source, of components that carry nothing (mean over pairs, 95 % interval)")
    print_table(
        (
            *("pair, anchor", "pairs", "no gap", "unstable", "by the rule", "p <= 5 %", "p <= 5 %, shuffles alone"),
            *("pairs with any", "carriers called source", "shuffles alone"),
        ),
        [
            (
                *(row.kind, str(row.n_pairs), str(row.n_refused), str(row.n_unstable)),
                *(_share(one) for one in (row.sources, row.at_level, row.at_level_shuffled)),
                *(f"{value:.2f}" for value in (row.any_source, row.carriers, row.carriers_shuffled)),
            )
            for row in calibration.rates
        ],
    )
    print("\nhow often the 95 % interval of a recovery holds the recovery over all queries")
    print_table(
        ("plant", "queries", "population", "covered"),
        [(row.plant, str(row.n), str(row.n_population), f"{row.covered:.3f}") for row in calibration.coverage],
    )


def _share(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _named_file(text: str) -> tuple[str, str]:
    name, sign, file = text.partition("=")
    if not (name and sign and file):
        raise typer.BadParameter(f"cannot read {text!r}. Write NAME=FILE: mytool=scores.csv.")
    return name, file


def _score_cells(row: ScoreRow) -> tuple[str, ...]:
    """A row of the table."""
    return (
        row.variant,
        row.unit,
        row.method,
        f"{row.auroc:.3f}",
        f"{row.ci_low:.3f} to {row.ci_high:.3f}",
        f"{row.average_precision:.3f}",
        f"{row.precision:.3f}",
        str(row.n_plants),
    )


def _numbers(layers: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"cannot read the layers {layers!r}. Write numbers with commas: 18,24,29.") from error


def _print_speed(found: Speed, *, as_json: bool) -> None:
    """Print what was measured: a JSON object, or a table with the machine under it."""
    if as_json:
        rows = [asdict(row) for row in found.rows]
        print_json({"rows": rows, "machine": asdict(found.machine), "notes": list(found.notes)})
        return
    head = ("engine", "anchor layer", "seconds", "low to high", "ratio", "of the ideal", "MiB", "patched", "difference")
    print_table(head, [_cells(row) for row in found.rows])
    machine = found.machine
    print(
        f"\n{machine.n_prompts} prompts of {machine.n_tokens_tree} tokens (shared starts counted once; "
        f"{machine.n_tokens_padded} when padded), {machine.threads} threads on {machine.device}, {machine.dtype}, "
        f"{machine.matrix_product_rate_gflops:.0f} gigaflops in matrix products, load "
        f"{_number(machine.load_before, '.2f')} before and {_number(machine.load_after, '.2f')} after"
    )
    print(", ".join(f"{package} {version}" for package, version in machine.versions.items()))
    for row in found.rows:
        if row.note:
            print(f"{row.engine} at layer {row.anchor_layer} was not timed: {row.note}")
    for note in found.notes:
        print(note)


def _cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    spread = f"{row.seconds_low:.1f} to {row.seconds_high:.1f}" if row.seconds_low and row.seconds_high else "-"
    return (
        row.engine,
        str(row.anchor_layer),
        _number(row.seconds, ".1f"),
        spread,
        _number(row.ratio, ".1f"),
        _number(row.share_of_ideal, ".1%"),
        _number(row.peak_memory, ".0f"),
        f"{row.n_measured}/{row.n_components}",
        _number(row.max_difference, ".0e"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
