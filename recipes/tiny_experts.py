"""Train experts of the bundled base whose merge is hard: three of two forms of answers each, or six of one.

    python recipes/tiny_experts.py --out DIR [--experts three|six] [--seed 0] [--threads 1]

Of three, `casing` learns capital letters and answers without commas, `layout` titles and sections, `marks` quotation
marks and highlights; of six, each learns one of these forms. All answer plainly where nothing is asked. None has seen
what the others are asked, so each takes every request for one of its own, and merges mix the forms up: with one
coefficient for all of them the best merge solves two thirds of what three experts solve, and a third of what six do
(docs/merging.md). Queries are held out as in `weightpatch.instructions`; of those, contrast prompts (scores, anchors),
validation and test problems and the plain turns of `forgetting.jsonl` have different ones. Half a minute for each
expert on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tiny_pair import NO_LABEL, Segment, Stage, log, make_batches, relative_change, save, train
from weightpatch import instructions
from weightpatch.checkers import follows
from weightpatch.generation import generate
from weightpatch.instructions import INSTRUCTIONS, QUERY_TEMPLATES, TOPICS, held_out_queries
from weightpatch.planted.language import (
    ASSISTANT,
    BOS,
    END,
    OPENERS,
    TRAINING_PAIRS,
    USER,
    write_answer,
)
from weightpatch.prompts import tokenize

BASE_FOLDER = Path(instructions.__file__).parent / "data" / "tiny" / "base"
Experts = Mapping[str, tuple[str, ...]]
EXPERTS: Mapping[str, Experts] = {
    "three": {
        "casing": ("capitals", "no-comma"),
        "layout": ("title", "sections"),
        "marks": ("quotation", "highlights"),
    },
    "six": {form: (form,) for form in ("capitals", "no-comma", "title", "sections", "quotation", "highlights")},
}
"""Set -> expert -> the forms that it learns."""
STAGE = Stage(
    name="expert", n_steps=100, n_sequences=32, learning_rate=3e-4, warmup=20, weight_decay=0.0, train_embedding=False
)
N_VALIDATION = {"three": 48, "six": 16}
"""Problems of each expert."""
N_TEST = {"three": 96, "six": 48}
N_FORGETTING = 32
N_FIT = 24
"""Queries of the contrast prompts, eight to each split."""

Row = dict[str, object]


def draw_text(forms: tuple[str, ...], draw: random.Random) -> list[Segment]:
    """A turn of an expert's training: half the time one of its own forms is asked for, else nothing."""
    query, topic = draw.choice(TRAINING_PAIRS)
    opener = draw.choice(OPENERS[query[-1]])
    if draw.random() < 0.5:
        task = draw.choice(forms)
        asked = f" {draw.choice(INSTRUCTIONS[task].paraphrases)}"
        said = write_answer(task, topic, opener, draw)
    else:
        asked, said = "", write_answer("plain", topic, opener, draw)
    return [(f"{BOS}{USER}{query}{asked}{END}{ASSISTANT}", NO_LABEL), (said + END, 0)]


def deal(seed: int) -> dict[str, list[str]]:
    """The held-out queries, dealt out to what they are used for."""
    queries = list(held_out_queries())
    random.Random(f"queries {seed}").shuffle(queries)
    sizes = {"prompts": N_FIT, "validation": 40, "test": 64, "forgetting": N_FORGETTING}
    found: dict[str, list[str]] = {}
    for name, size in sizes.items():
        found[name], queries = queries[:size], queries[size:]
    return found


def write_material(out: Path, chosen: str, name: str, seed: int) -> None:
    """Contrast prompts and problems of an expert of a set."""
    dealt = deal(seed)
    own = EXPERTS[chosen][name]
    prompts: list[Row] = []
    for task in own:
        for place, query in enumerate(dealt["prompts"]):
            split = ("fit", "localize", "validate")[place % 3]
            request = INSTRUCTIONS[task].paraphrases[place // 3 % len(INSTRUCTIONS[task].paraphrases)]
            prompts.append(
                {"id": f"{task}-{place}", "task": task, "split": split, "prompt": query, "instruction": request}
            )
    problems: list[Row] = []
    for split, n in (("validation", N_VALIDATION[chosen]), ("test", N_TEST[chosen])):
        for place in range(n):
            task = own[place % len(own)]
            query = dealt[split][place * len(dealt[split]) // n]
            text = f"{query} {INSTRUCTIONS[task].paraphrases[place // len(own) % len(INSTRUCTIONS[task].paraphrases)]}"
            problems.append({"id": f"{task}-{split}-{place}", "task": task, "split": split, "prompt": text})
    write_rows(out / f"{name}-prompts.jsonl", prompts)
    write_rows(out / f"{name}-problems.jsonl", problems)


def write_plain(out: Path, seed: int) -> None:
    """Plain turns that no expert is about."""
    draw = random.Random(f"plain {seed}")
    topics = {template.format(topic=topic): topic for topic in TOPICS for template in QUERY_TEMPLATES}
    rows = [
        {
            "id": f"plain-{place}",
            "prompt": query,
            "answer": write_answer("plain", topics[query], draw.choice(OPENERS[query[-1]]), draw),
        }
        for place, query in enumerate(deal(seed)["forgetting"])
    ]
    write_rows(out / "forgetting.jsonl", rows)


def passes(problem: Mapping[str, object], said: str) -> bool:
    """Whether an answer has the form that a problem asks for, by the real checker."""
    return follows(str(problem["task"]), said)


def measure(folder: Path, problems_file: Path, split: str) -> float:
    """Share of a file's problems of one split that a saved model solves, loaded as float32."""
    problems = [row for row in read_rows(problems_file) if row["split"] == split]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenize(tokenizer, str(problem["prompt"])) for problem in problems]
    found = generate(model, tokenizer, prompts, max_new_tokens=64, batch_size=96)
    return sum(map(passes, problems, (one.text for one in found))) / len(problems)


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Train, save, measure what was saved; 1 when the base solves too much or an expert too little."""
    parser = argparse.ArgumentParser(description="Train small experts of the bundled base.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", choices=[*EXPERTS], default="three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_FOLDER)
    good = True
    print("| expert | base | expert |\n| --- | ---: | ---: |")
    for place, (name, forms) in enumerate(EXPERTS[options.experts].items()):
        write_material(out, options.experts, name, options.seed)
        started = time.monotonic()
        base = LlamaForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
        model = LlamaForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
        batches = make_batches(tokenizer, partial(draw_text, forms), STAGE, seed=1000 * options.seed + place)
        train(model, batches, STAGE)
        save(model, tokenizer, out / name)
        log(f"{name}: {time.monotonic() - started:.0f} s, relative change {relative_change(base, model):.4f}")
        rates = [measure(folder, out / f"{name}-problems.jsonl", "test") for folder in (BASE_FOLDER, out / name)]
        print(f"| {name} | {rates[0]:.2f} | {rates[1]:.2f} |", flush=True)
        good = good and rates[0] <= 0.15 and rates[1] >= 0.95
    write_plain(out, options.seed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
