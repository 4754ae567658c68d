"""Compare merging methods on three small experts of the bundled base, several seeds.

    python benchmarks/merging/tiny.py --work DIR [--seeds 0 1 2 3 4] [--only METHOD ...] [--oracle] [--threads 1]

Experts are trained by recipes/tiny_experts.py where they are missing. Interrupted, the same command goes on; two
processes may work on different seeds. `python benchmarks/merging/table.py --work DIR` makes the tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from cases import Case, Problem
from comparing import compare
from methods import ways

from weightpatch.checkpoint import load_alone
from weightpatch.merging.inputs import Inputs

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))


def open_case(folder: Path, seed: int) -> Case:
    """Experts of one seed, trained if need be."""
    from tiny_experts import EXPERTS, passes, read_rows

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "forgetting.jsonl").is_file():
        recipe = str(ROOT / "recipes" / "tiny_experts.py")
        subprocess.run([sys.executable, recipe, "--out", str(folder), "--seed", str(seed)], check=True)
    base = "tiny:base"
    experts = {name: str(folder / name) for name in EXPERTS}
    model, tokenizer = load_alone(base)
    problems = {
        split: {
            name: [
                Problem(prompt=row["prompt"], passes=partial(passes, row), max_new_tokens=64)
                for row in read_rows(folder / f"{name}-problems.jsonl")
                if row["split"] == split
            ]
            for name in EXPERTS
        }
        for split in ("validation", "test")
    }
    plain = [(row["prompt"], row["answer"]) for row in read_rows(folder / "forgetting.jsonl")]
    return Case(
        name=f"seed {seed}",
        folder=folder,
        shared=folder,
        base=base,
        experts=experts,
        problems=problems,
        plain=plain,
        model=model,
        tokenizer=tokenizer,
        inputs=Inputs.open(base, experts),
    )


def main() -> None:
    """Compare what is asked for."""
    parser = argparse.ArgumentParser(description="Compare merging methods on small experts.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="these methods alone")
    parser.add_argument("--oracle", action="store_true", help="measure every configuration on test too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        case = open_case(options.work / f"seed-{seed}", seed)
        every = [way for way in ways(len(case.experts)) if not options.only or way.name in options.only]
        compare(case, every, oracle=options.oracle)


if __name__ == "__main__":
    main()
