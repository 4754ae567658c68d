"""Run a comparison: every configuration on validation, the default and the selected one on test; resumable."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case, Weights
from methods import Config, Way

from weightpatch.files import write_whole

Record = dict[str, Any]


def compare(case: Case, every: Sequence[Way], *, oracle: bool = False) -> None:
    """Fill `results.jsonl` of a case: one line for each method, configuration and split; those that are there stay.

    Which configurations a method has now, its default first, stands in `grid.json`.

    Args:
        case: What is merged.
        every: Methods.
        oracle: Whether all configurations go through test, not only the default and the selected one.
    """
    file = case.folder / "results.jsonl"
    known = by_key(read(file))
    if file.is_file() and not file.read_bytes().endswith(b"\n"):  # a line that was cut off
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n")
    grid = case.folder / "grid.json"
    grids = json.loads(grid.read_text(encoding="utf-8")) if grid.is_file() else {}
    write_whole(grid, json.dumps(grids | {way.name: list(way.configs) for way in every}, indent=1) + "\n")

    def measured(way: str, config: Config, split: str, build: Any) -> Record:
        key = key_of(way, config, split)
        if key not in known:
            began = time.monotonic()
            weights: Weights = build()
            merging = time.monotonic() - began
            record = {"method": way, "config": config, "split": split, "seconds": round(merging, 3)}
            record |= case.measure(weights, split)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            known[key] = record
        return known[key]

    changes = case.changes()
    for split in ("validation", "test"):
        measured("base", {}, split, lambda: dict(case.weights))
        for expert in case.experts:
            whole = {name: base + changes[expert][name] for name, base in case.weights.items()}
            measured(f"expert {expert}", {}, split, lambda whole=whole: whole)
    for split in ("validation", "test"):
        below = known[key_of("base", {}, split)]["passed"]
        for expert in case.experts:
            if _rate(known[key_of(f"expert {expert}", {}, split)]["passed"][expert]) <= _rate(below[expert]):
                raise SystemExit(
                    f"{case.name}: {expert} solves no more of {split} than the base, so nothing is to win."
                )
    for way in every:
        records = [
            measured(way.name, config, "validation", lambda c=config, w=way: w.build(case, c)) for config in way.configs
        ]
        best = max(records, key=lambda record: mean_recovery(record, known))
        for config in (*(way.configs if oracle else way.configs[:1]), best["config"]):
            last = measured(way.name, config, "test", lambda c=config, w=way: w.build(case, c))
        print(
            f"{case.name}  {way.name:40} default {mean_recovery(records[0], known):.3f}  selected "
            f"{mean_recovery(best, known):.3f}  test {mean_recovery(last, known):.3f} "
            f"{ {one: round(own, 2) for one, own in recoveries(last, known).items()} } {best['config']}",
            file=sys.stderr,
            flush=True,
        )


def recoveries(record: Record, known: dict[str, Record]) -> dict[str, float]:
    """(merged - base) / (expert - base) of each expert's pass rate, same split."""
    split = record["split"]
    base = known[key_of("base", {}, split)]["passed"]
    found = {}
    for expert, passed in record["passed"].items():
        own = known[key_of(f"expert {expert}", {}, split)]["passed"][expert]
        found[expert] = (_rate(passed) - _rate(base[expert])) / (_rate(own) - _rate(base[expert]))
    return found


def mean_recovery(record: Record, known: dict[str, Record]) -> float:
    """Over experts: what configurations are selected by."""
    found = recoveries(record, known)
    return sum(found.values()) / len(found)


def read(file: Path) -> list[Record]:
    """What was measured; a line that was cut off is left out."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def by_key(records: Sequence[Record]) -> dict[str, Record]:
    """Records by method, configuration and split."""
    return {key_of(record["method"], record["config"], record["split"]): record for record in records}


def key_of(method: str, config: Config, split: str) -> str:
    """What a record is found by."""
    return json.dumps([method, config, split], sort_keys=True)


def _rate(passed: Sequence[int]) -> float:
    return sum(passed) / len(passed)
