"""Compare merging methods on small experts of the bundled base, several seeds.

    python benchmarks/merging/tiny.py --work DIR [--experts three|six] [--prompts N] [--seeds 1 2 3 4 5]
        [--only METHOD ...] [--oracle] [--threads 1]

What learns coefficients learns them from the first `--prompts` of each form. Experts are trained by
recipes/tiny_experts.py where they are missing. Interrupted, the same command goes on; two processes may work on
different seeds. `python benchmarks/merging/table.py --work DIR` makes the tables.
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


def open_case(folder: Path, seed: int, *, chosen: str) -> Case:
    """Experts of one set and seed, trained if need be."""
    from tiny_experts import EXPERTS, passes, read_rows

    shared = folder / "experts"
    shared.mkdir(parents=True, exist_ok=True)
    if not (shared / "forgetting.jsonl").is_file():
        recipe = str(ROOT / "recipes" / "tiny_experts.py")
        command = [sys.executable, recipe, "--experts", chosen, "--out", str(shared), "--seed", str(seed)]
        subprocess.run(command, check=True)
    base = "tiny:base"
    experts = {name: str(shared / name) for name in EXPERTS[chosen]}
    model, tokenizer = load_alone(base)
    problems = {
        split: {
            name: [
                Problem(prompt=row["prompt"], passes=partial(passes, row), max_new_tokens=64)
                for row in read_rows(shared / f"{name}-problems.jsonl")
                if row["split"] == split
            ]
            for name in experts
        }
        for split in ("validation", "test")
    }
    plain = [(row["prompt"], row["answer"]) for row in read_rows(shared / "forgetting.jsonl")]
    return Case(
        name=f"{chosen}, seed {seed}",
        folder=folder,
        shared=shared,
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
    parser.add_argument("--experts", choices=["three", "six"], default="six")
    parser.add_argument("--prompts", type=int, default=2, help="of each form, that coefficients are learned from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", help="these methods alone")
    parser.add_argument("--oracle", action="store_true", help="measure every configuration on test too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        folder = options.work / f"{options.experts}-{seed}"
        case = open_case(folder, seed, chosen=options.experts)
        every = ways(len(case.experts), n_prompts=options.prompts)
        compare(case, [way for way in every if not options.only or way.name in options.only], oracle=options.oracle)


if __name__ == "__main__":
    main()
