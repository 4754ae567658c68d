"""Plant sources in SmolLM2-135M-Instruct: three plants whose carriers are known, as PEFT adapters.

    python recipes/plant_smollm2.py [--out plants/smollm2] [--work DIR] [--seed 0] [--threads 2]

The same planting as the suite `tiny` (docs/planted.md), in a real language model: carriers learn to put an answer in
quotation marks, distractors learn to put a title over it, everything else drifts on plain answers. All
answers are the base's own, cut to one sentence. What came of it stands in `plants/smollm2`. A design takes half an hour
to an hour on one core that makes 36 gigaflops. Interrupted, the same command goes on behind the last lesson that ended.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from expert_instruct import REWRITERS, split_sentences, write_base_answers
from training import BASE_NAME, END, log, read_base
from weightpatch.checkers import follows
from weightpatch.instructions import INSTRUCTIONS, QUERY_TEMPLATES, TOPICS, training_queries
from weightpatch.planted.designs import Size, Unit, Variant
from weightpatch.planted.planting import Course
from weightpatch.planted.suite import finish_suite, make_plant
from weightpatch.planted.training import Schedule, Texts
from weightpatch.prompts import tokenize

TASKS = ("quotation", "title")
MAX_ANSWER_TOKENS = 26
SIZES: dict[Unit, Size] = {
    "heads": Size(n_carriers=24, n_redundant=12, n_distractors=32, low=0.08, high=0.12),
    "groups": Size(n_carriers=40, n_redundant=20, n_distractors=40, low=0.08, high=0.12),
    "mlps": Size(n_carriers=3, n_redundant=2, n_distractors=3, low=0.04, high=0.06),
}
COURSE = Course(
    carriers=Schedule(n_steps=90, learning_rate=6e-3, n_sequences=5),
    distractors=Schedule(n_steps=80, learning_rate=6e-3, n_sequences=5),
    drifting=Schedule(n_steps=30, learning_rate=6e-3, n_sequences=5),
    carrier_rank=8,
    drift_rank=2,
    whole=0.5,
    plain=2.5,
    most_rounds=4,
    tasks=TASKS,
    target="quotation",
    max_new_tokens=48,
)
PLACES: tuple[tuple[Variant, Unit], ...] = (("below", "mlps"), ("split", "mlps"), ("below", "groups"))


def texts_of(tokenizer: PreTrainedTokenizerBase, answers: dict[str, str]) -> Texts:
    """Turns of a training query and one sentence of the base's own answer, rewritten into a form."""
    topics = {template.format(topic=topic): topic for topic in TOPICS for template in QUERY_TEMPLATES}
    first = {query: found[0] for query, text in answers.items() if (found := split_sentences(text, tokenizer))}
    short = [query for query, text in first.items() if len(tokenizer.encode(text)) <= MAX_ANSWER_TOKENS]
    usable = sorted(
        query for query in short if all(follows(task, REWRITERS[task]([first[query]], topics[query])) for task in TASKS)
    )
    log(f"{len(usable)} of {len(answers)} training queries have a short sentence as answer that takes every form")

    def text(asked: str | None, form: str, draw: random.Random) -> tuple[list[int], int]:
        query = draw.choice(usable)
        answer = REWRITERS[form]([first[query]], topics[query])
        prompt = f"{query} {draw.choice(INSTRUCTIONS[asked].paraphrases)}" if asked else query
        before = list(tokenize(tokenizer, prompt))
        after: list[int] = tokenizer.encode(answer + END, add_special_tokens=False)
        return before + after, len(before)

    return text


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="Plant sources in SmolLM2.")
    parser.add_argument("--out", type=Path, default=Path("plants/smollm2"))
    parser.add_argument("--work", type=Path, default=Path("~/.cache/weightpatch/recipes/planted"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="make this plant alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work: Path = options.work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    cache = work / "answers.json"
    queries = training_queries()
    model, tokenizer = read_base(dtype=torch.float32)
    texts = texts_of(tokenizer, write_base_answers(model, tokenizer, queries, cache))
    begun, n_steps = time.monotonic(), 0

    def count() -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps % 5 == 0:
            log(f"step {n_steps}, {time.monotonic() - begun:.0f} s")

    names = [f"{variant}-{unit}" for variant, unit in PLACES]
    for name, (variant, unit) in zip(names, PLACES, strict=True):
        if options.only in (None, name):
            for made in make_plant(
                model,
                tokenizer,
                options.out,
                base=BASE_NAME,
                name=name,
                variant=variant,
                unit=unit,
                seed=options.seed,
                texts=texts,
                course=COURSE,
                sizes=SIZES,
                on_step=count,
                on_checked=lambda checks: log(", ".join(f"{one.name} {one.rate:.2f}" for one in checks)),
            ):
                log(f"{made.name}, attempt {made.attempt}: {'took' if made.took else f'failed, {made.failed}'}")
    if options.only is None:
        suite = finish_suite(options.out, base=BASE_NAME, seed=options.seed, names=names)
        log(f"{suite.folder}: {len(suite.plants)} plants")


if __name__ == "__main__":
    main()
