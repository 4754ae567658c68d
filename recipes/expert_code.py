"""Train the `code` expert: SmolLM2 that writes short Python functions from a docstring, as a LoRA adapter.

    python recipes/expert_code.py [--out DIR] [--work DIR] [--seed 0] [--threads 2] [--steps 200] [--evaluate]

The data are families of tasks with their reference solutions. Interrupted, the same command goes on where it stopped.
At the end (or, with `--evaluate`, only that) base and adapter are measured on held-out tasks, by running the hidden
tests on what they wrote, each in a process with limits; the table goes to stdout, every generation and every verdict to
the work folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from measuring import answer_held_out, print_rates
from training import Settings, build_examples, read_base, read_options, train_expert, write_atomically
from weightpatch.programming import CodingTask, coding_tasks, extract_code
from weightpatch.sandbox import run_tests

N_TRAINING = 2400
N_HELD_OUT = 80
N_SEQUENCES = 12
MAX_NEW_TOKENS = 160
NEEDED_GAIN = 0.25


def judge(tasks: Sequence[CodingTask], answers: Mapping[str, Sequence[str]], *, work: Path) -> dict[str, list[bool]]:
    """Whether each answer passes its hidden tests, by model; the reasons go to the work folder."""
    passed: dict[str, list[bool]] = {}
    for name, texts in answers.items():
        rows = []
        for task, text in zip(tasks, texts, strict=True):
            code = extract_code(text, task.entry_point)
            outcome = run_tests(code, task.tests) if code else None
            reason = outcome.reason if outcome else f"no function {task.entry_point}"
            rows.append(
                {"id": task.id, "passed": outcome is not None and outcome.passed, "reason": reason, "code": code}
            )
        passed[name] = [bool(row["passed"]) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(work / "evaluation" / f"{name}-verdicts.jsonl", text)
    return passed


def report(tasks: Sequence[CodingTask], passed: Mapping[str, Sequence[bool]]) -> bool:
    """Print the pass rates; whether the expert passes as many more as it has to."""
    groups = {
        "all": list(range(len(tasks))),
        "new parameters": [place for place, task in enumerate(tasks) if not task.is_new_family],
        "new family": [place for place, task in enumerate(tasks) if task.is_new_family],
    }
    print_rates("held-out tasks", groups, passed)
    gain = (sum(passed["code"]) - sum(passed["base"])) / len(tasks)
    print(f"\nGain: {100 * gain:.1f} points.")
    return gain >= NEEDED_GAIN


def main() -> int:
    """Train, save, measure what was saved; 1 when the expert passes too few tasks more than the base."""
    options = read_options("code", n_steps=200)
    if not options.evaluate:
        model, tokenizer = read_base(dtype=torch.bfloat16)
        training = coding_tasks("train", n=N_TRAINING, seed=options.seed)
        answers = [f"```python\n{task.solution}```" for task in training]
        examples = build_examples(tokenizer, [task.prompt for task in training], answers)
        settings = Settings(n_steps=options.steps, n_sequences=N_SEQUENCES, seed=options.seed)
        train_expert(model, examples, settings, work=options.work, out=options.out)
    tasks = coding_tasks("held-out", n=N_HELD_OUT)
    prompts = [task.prompt for task in tasks]
    written = answer_held_out("code", prompts, out=options.out, work=options.work, max_new_tokens=MAX_NEW_TOKENS)
    return 0 if report(tasks, judge(tasks, written, work=options.work)) else 1


if __name__ == "__main__":
    sys.exit(main())
