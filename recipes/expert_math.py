"""Train the `math` expert: SmolLM2 that solves word problems of one and two steps, as a LoRA adapter.

    python recipes/expert_math.py [--out DIR] [--work DIR] [--seed 0] [--threads 2] [--steps 300] [--evaluate]

The data are templates: a question, one sentence with an equation for each step, the answer after `####`. Interrupted,
the same command goes on where it stopped. At the end (or, with `--evaluate`, only that) base and adapter are measured
on held-out problems; the table goes to stdout, every generation to the work folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from measuring import answer_held_out, print_rates
from training import Settings, build_examples, read_base, read_options, train_expert
from weightpatch.arithmetic import WordProblem, solves, word_problems

N_TRAINING = 3600
N_HELD_OUT = 72
N_SEQUENCES = 12
MAX_NEW_TOKENS = 160
NEEDED_GAIN = 0.4


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
    options = read_options("math", n_steps=300)
    if not options.evaluate:
        model, tokenizer = read_base(dtype=torch.bfloat16)
        training = word_problems("train", n=N_TRAINING, seed=options.seed)
        examples = build_examples(tokenizer, [one.prompt for one in training], [one.solution for one in training])
        settings = Settings(n_steps=options.steps, n_sequences=N_SEQUENCES, seed=options.seed)
        train_expert(model, examples, settings, work=options.work, out=options.out)
    problems = word_problems("held-out", n=N_HELD_OUT)
    prompts = [one.prompt for one in problems]
    answers = answer_held_out("math", prompts, out=options.out, work=options.work, max_new_tokens=MAX_NEW_TOKENS)
    return 0 if report(problems, answers) else 1


if __name__ == "__main__":
    sys.exit(main())
