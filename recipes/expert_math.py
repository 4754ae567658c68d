"""Train the `math` expert: SmolLM2 that solves word problems of one and two steps, as a LoRA adapter.

    python recipes/expert_math.py [--out DIR] [--work DIR] [--seed 0] [--threads 2] [--steps 300] [--evaluate]

The data are templates: a question, one sentence with an equation for each step, the answer after `####`. Interrupted,
the same command goes on where it stopped. At the end (or, with `--evaluate`, only that) base and adapter are measured
on held-out problems; the table goes to stdout, every generation to the work folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from training import (
    END,
    Example,
    Settings,
    find_base,
    generate,
    log,
    read_base,
    save_adapter,
    train_adapter,
    write_atomically,
)
from weightpatch.arithmetic import WordProblem, solves, word_problems
from weightpatch.checkpoint import find, load
from weightpatch.prompts import tokenize
from weightpatch.statistics import pass_rate

N_TRAINING = 3600
N_HELD_OUT = 72
N_SEQUENCES = 12
MAX_NEW_TOKENS = 160
NEEDED_GAIN = 0.4


def build_examples(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
    """Prompts in the chat template, answers with the token that ends them."""
    return [
        Example(
            prompt=tokenize(tokenizer, prompt), answer=tuple(tokenizer.encode(answer + END, add_special_tokens=False))
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def answer_held_out(
    expert: str, prompts: Sequence[str], *, out: Path, work: Path, max_new_tokens: int
) -> dict[str, list[str]]:
    """Greedy answers of base and expert, by name; what the work folder holds is not generated again."""
    base, tokenizer = read_base(dtype=torch.float32)
    asked = hashlib.sha256(json.dumps([prompts, max_new_tokens]).encode()).hexdigest()[:12]
    answers: dict[str, list[str]] = {}
    for name in ("base", expert):
        weights = find_base() if name == "base" else out / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        path = work / "evaluation" / f"{name}-{digest}-{asked}.jsonl"
        if not path.is_file():
            started = time.monotonic()
            model = base if name == "base" else load(find(out), dtype=torch.float32, base=base)
            ids = [tokenize(tokenizer, prompt) for prompt in prompts]
            found = dict(generate(model, tokenizer, ids, max_new_tokens=max_new_tokens))
            rows = [{"prompt": prompt, "answer": found[place]} for place, prompt in enumerate(prompts)]
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            log(f"{name}: {len(prompts)} answers in {time.monotonic() - started:.0f} s")
        answers[name] = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    return answers


def print_rates(title: str, groups: Mapping[str, Sequence[int]], passed: Mapping[str, Sequence[bool]]) -> None:
    """A markdown table on stdout: a row for each group of places, a column for each model."""
    print(f"| {title} | {' | '.join(passed)} |\n| --- |{' --- |' * len(passed)}")
    for group, places in groups.items():
        cells = []
        for verdicts in passed.values():
            n_passed = sum(verdicts[place] for place in places)
            rate = pass_rate(n_passed, len(places))
            cells.append(f"{n_passed}/{len(places)} = {rate.estimate:.2f} [{rate.low:.2f}, {rate.high:.2f}]")
        print(f"| {group} | {' | '.join(cells)} |")


def report(problems: Sequence[WordProblem], answers: Mapping[str, Sequence[str]]) -> bool:
    """Print strict and loose pass rates; whether the expert solves as many more as it has to."""
    places = range(len(problems))
    groups = {
        "all": list(places),
        "one step": [place for place in places if problems[place].n_steps == 1],
        "two steps": [place for place in places if problems[place].n_steps == 2],
        "template of the training": [place for place in places if not problems[place].is_new_template],
        "new template": [place for place in places if problems[place].is_new_template],
    }
    gain = 0.0
    for loose in (False, True):
        passed = {
            name: [solves(one.answer, text, loose=loose) for one, text in zip(problems, texts, strict=True)]
            for name, texts in answers.items()
        }
        print_rates(f"held-out problems, {'loose' if loose else 'strict'}", groups, passed)
        print()
        if not loose:
            gain = (sum(passed["math"]) - sum(passed["base"])) / len(problems)
    print(f"Gain, strict: {100 * gain:.1f} points.")
    return gain >= NEEDED_GAIN


def main() -> int:
    """Train, save, measure what was saved; 1 when the expert solves too few problems more than the base."""
    parser = argparse.ArgumentParser(description="Train the math expert.")
    parser.add_argument("--out", type=Path, default=Path("experts/math"))
    parser.add_argument("--work", type=Path, default=Path("~/.cache/weightpatch/recipes/math"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--evaluate", action="store_true", help="only measure what is in --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work.expanduser()
    if not options.evaluate:
        started = time.monotonic()
        model, tokenizer = read_base(dtype=torch.bfloat16)
        training = word_problems("train", n=N_TRAINING, seed=options.seed)
        examples = build_examples(tokenizer, [one.prompt for one in training], [one.solution for one in training])
        log(f"{len(examples)} training examples")
        settings = Settings(n_steps=options.steps, n_sequences=N_SEQUENCES, seed=options.seed)
        adapted, losses = train_adapter(model, examples, settings, work=work)
        size = save_adapter(adapted, options.out)
        thinned = [round(sum(losses[i : i + 20]) / len(losses[i : i + 20]), 2) for i in range(0, len(losses), 20)]
        log(f"loss by 20 steps {thinned}; {size} bytes; {time.monotonic() - started:.0f} s in this run")
    problems = word_problems("held-out", n=N_HELD_OUT)
    prompts = [one.prompt for one in problems]
    answers = answer_held_out("math", prompts, out=options.out, work=work, max_new_tokens=MAX_NEW_TOKENS)
    return 0 if report(problems, answers) else 1


if __name__ == "__main__":
    sys.exit(main())
