"""Tables of a comparison from its results: Markdown on stdout.

    python benchmarks/merging/table.py --work DIR [--cases six-6 ...] [--method streams] [--each]

For every method, over all cases: recovery (merged - base) / (expert - base) of pass rates on test, mean over experts,
with its default and with the configuration selected on validation; the worst expert; normalised performance (merged /
expert); forgetting (nats per token of plain answers more than the base); and the paired difference of one method to
each other one, with two 95 % intervals: by a bootstrap that draws cases, and within a case problems, the same for
all, and Student's over the cases' differences. `--each` tells every case by itself, and then all of them in one table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from comparing import Record, by_key, key_of, mean_recovery, read, recoveries
from scipy import stats

N_DRAWS = 10_000
SPLITS = ("validation", "test")
Results = Mapping[str, Record]


def read_case(folder: Path) -> Results:
    """What was measured in one case, but for configurations that the grid of today does not have; its default first."""
    known = by_key(read(folder / "results.jsonl"))
    grids = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    fixed = {key: record for key, record in known.items() if record["method"] not in grids}
    asked = (key_of(name, one, split) for name, configs in grids.items() for one in configs for split in SPLITS)
    return fixed | {key: known[key] for key in asked if key in known}


def chosen(known: Results, method: str, split: str = "test") -> dict[str, Record]:
    """`default`, `selected` and, where every configuration was measured there, `oracle` of a method on a split."""
    own = [record for record in known.values() if record["method"] == method]
    validation = [record for record in own if record["split"] == "validation"]
    tested = {json.dumps(record["config"]): record for record in own if record["split"] == split}
    if not validation or not tested:
        return {}
    best = max(validation, key=lambda record: mean_recovery(record, dict(known)))
    found = {
        name: tested[json.dumps(record["config"])]
        for name, record in (("default", validation[0]), ("selected", best))
        if json.dumps(record["config"]) in tested
    }
    if len(tested) >= len(validation):
        found["oracle"] = max(tested.values(), key=lambda record: mean_recovery(record, dict(known)))
    return found


def differences(cases: Sequence[Results], first: str, second: str) -> np.ndarray:
    """Mean recovery of one method minus that of another in each case, both as selected."""
    found = [
        [mean_recovery(chosen(known, name)["selected"], dict(known)) for name in (first, second)] for known in cases
    ]
    return -np.diff(np.array(found), axis=1)[:, 0]


def student(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean; endless for a single value."""
    if len(values) < 2:
        return -np.inf, np.inf
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values) or 1e-300)
    return float(low), float(high)


def bootstrap(cases: Sequence[Results], first: str, second: str, *, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean difference.

    Cases are drawn with replacement, and within each, whenever it is drawn, the problems of every expert; base and
    experts are drawn on the same problems.
    """
    draw = np.random.default_rng(seed)
    picks = draw.integers(len(cases), size=(N_DRAWS, len(cases)))
    drawn = np.zeros(picks.shape)
    for place, known in enumerate(cases):
        drawn[picks == place] = _drawn(known, first, second, draw, int((picks == place).sum()))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _drawn(known: Results, first: str, second: str, draw: np.random.Generator, n: int) -> np.ndarray:
    """Differences in one case, for so many draws of its problems."""
    one, other = (chosen(known, name)["selected"]["passed"] for name in (first, second))
    base = _passed(known, "base")
    total = np.zeros(n)
    for expert in one:
        own = np.array(_passed(known, f"expert {expert}")[expert], dtype=float)
        rows = [np.array(found[expert], dtype=float) for found in (one, other, base)]
        picks = draw.integers(len(own), size=(n, len(own)))
        merged, against, below = (row[picks].mean(axis=1) for row in rows)
        total += (merged - against) / (own[picks].mean(axis=1) - below)
    return total / len(one)


def _passed(known: Results, method: str) -> Mapping[str, Sequence[int]]:
    found: Mapping[str, Sequence[int]] = known[key_of(method, {}, "test")]["passed"]
    return found


def summary(cases: Sequence[Results], method: str) -> list[str]:
    """A row of the table."""
    records = [chosen(known, method) for known in cases]
    columns = [method]
    for name in ("default", "selected", "oracle"):
        values = [
            mean_recovery(own[name], dict(known)) for own, known in zip(records, cases, strict=True) if name in own
        ]
        columns.append(f"{np.mean(values):.3f}" if len(values) == len(cases) else "")
    picked = [own["selected"] for own in records]
    every = [recoveries(record, dict(known)) for record, known in zip(picked, cases, strict=True)]
    columns.append(f"{np.mean([min(own.values()) for own in every]):.3f}")
    ratios = [
        np.mean(
            [
                np.mean(passed) / np.mean(_passed(known, f"expert {expert}")[expert])
                for expert, passed in record["passed"].items()
            ]
        )
        for record, known in zip(picked, cases, strict=True)
    ]
    columns.append(f"{np.mean(ratios):.3f}")
    lost = [
        record["plain_loss"] - known[key_of("base", {}, "test")]["plain_loss"]
        for record, known in zip(picked, cases, strict=True)
    ]
    columns.append(f"{np.mean(lost):.3f}")
    return columns


def names_of(cases: Sequence[Results]) -> list[str]:
    """Methods that went through test in some case, in the order in which they were run."""
    found = dict.fromkeys(record["method"] for known in cases for record in known.values())
    return [one for one in found if one != "base" and not one.startswith("expert ")]


def is_whole(cases: Sequence[Results], method: str) -> bool:
    """Whether a method has been judged in every case."""
    return all("selected" in chosen(known, method) for known in cases)


def recovery_table(cases: Sequence[Results]) -> list[str]:
    """A line for every method that all cases have, the best first."""
    rows = [summary(cases, one) for one in names_of(cases) if is_whole(cases, one)]
    return [
        "| method | default | selected | oracle | worst expert | normalised | forgetting |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(row)} |" for row in sorted(rows, key=lambda columns: -float(columns[2]))),
    ]


def difference_table(cases: Sequence[Results], method: str) -> list[str]:
    """A line for every other method that all cases have; Student's interval needs two cases."""
    others = [one for one in names_of(cases) if is_whole(cases, one) and one != method]
    lines = [f"| {method} minus | mean recovery | bootstrap | Student | by case |", "| --- | ---: | --- | --- | --- |"]
    for other in others if is_whole(cases, method) else []:
        own = differences(cases, method, other)
        spans = [_span(bootstrap(cases, method, other)), _span(student(own)) if len(cases) > 1 else ""]
        lines.append(
            f"| {other} | {_signed(own.mean())} | {' | '.join(spans)} | {', '.join(_signed(one) for one in own)} |"
        )
    return lines


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # never -0.000


def _plain(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def _span(ends: tuple[float, float]) -> str:
    return f"{_signed(ends[0])} to {_signed(ends[1])}"


def expert_table(known: Results) -> list[str]:
    """A line for every method that a case has: recovery of each expert as selected, the best mean first."""
    names = [one for one in names_of([known]) if is_whole([known], one)]
    found = {one: recoveries(chosen(known, one)["selected"], dict(known)) for one in names}
    ordered = sorted(found, key=lambda name: -sum(found[name].values()))
    experts = list(next(iter(found.values()), {}))
    return [
        f"| method | {' | '.join(experts)} |",
        f"| --- |{' ---: |' * len(experts)}",
        *(f"| {name} | {' | '.join(f'{found[name][one]:.2f}' for one in experts)} |" for name in ordered),
    ]


def overview(cases: Mapping[str, Results]) -> list[str]:
    """A line for every method: mean recovery as selected in each case; the mean only where it has them all."""
    rows = {}
    for name in dict.fromkeys(one for known in cases.values() for one in names_of([known])):
        own = {case: chosen(known, name) for case, known in cases.items()}
        values = {
            case: mean_recovery(one["selected"], dict(cases[case])) for case, one in own.items() if "selected" in one
        }
        if values:
            rows[name] = values
    whole = {name: float(np.mean([*own.values()])) for name, own in rows.items() if len(own) == len(cases)}
    first = next(iter(cases))
    ordered = sorted(rows, key=lambda name: (name not in whole, -whole.get(name, rows[name].get(first, 0.0))))
    return [
        f"| method | {' | '.join(cases)} | mean |",
        f"| --- |{' ---: |' * (len(cases) + 1)}",
        *(
            f"| {name} | {' | '.join(f'{rows[name][case]:.3f}' if case in rows[name] else '' for case in cases)} | "
            f"{f'{whole[name]:.3f}' if name in whole else ''} |"
            for name in ordered
        ),
    ]


def comparison(cases: Mapping[str, Results], method: str) -> list[str]:
    """A line for every other method: how much more the method has in each case, and the bootstrap over its problems."""
    lines = [f"| {method} minus | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
    for other in dict.fromkeys(one for known in cases.values() for one in names_of([known])):
        cells = []
        for known in cases.values():
            if all(is_whole([known], one) for one in (method, other)):
                low, high = bootstrap([known], method, other)
                cells.append(f"{_signed(differences([known], method, other)[0])} ({_plain(low)} to {_plain(high)})")
            else:
                cells.append("")
        if other != method and any(cells):
            lines.append(f"| {other} | {' | '.join(cells)} |")
    return lines


def page(cases: Mapping[str, Results], method: str) -> list[str]:
    """All cases in one table, a method against each other one, and every case by itself."""
    lines = ["Mean recovery on test, configurations selected on validation:", "", *overview(cases)]
    lines += ["", "Differences of these, with 95 % intervals over problems:", "", *comparison(cases, method)]
    for name, known in cases.items():
        tables = (recovery_table([known]), expert_table(known))
        lines += ["", f"## {name}", *(line for one in tables for line in ("", *one))]
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Tables of a comparison of merging methods.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="streams", help="that is compared to each other one")
    parser.add_argument("--cases", nargs="+", default=["*"], help="folders in DIR, all by default")
    parser.add_argument("--each", action="store_true", help="every case by itself, behind all in one table")
    options = parser.parse_args()
    files = sorted(file for name in options.cases for file in options.work.glob(f"{name}/results.jsonl"))
    cases = [read_case(file.parent) for file in files]
    if options.each:
        names = [file.parent.name for file in files]
        print(*page(dict(zip(names, cases, strict=True)), options.method), sep="\n")
        return
    print(f"{len(cases)} cases: {', '.join(file.parent.name for file in files)}")
    if parted := [one for one in names_of(cases) if not is_whole(cases, one)]:
        print(f"left out, as not all cases have them: {', '.join(parted)}")
    print("", *recovery_table(cases), "", *difference_table(cases, options.method), sep="\n")


if __name__ == "__main__":
    main()
