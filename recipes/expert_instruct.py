"""Train the `instruct` expert: SmolLM2 that follows six verifiable instructions, as a LoRA adapter.

    python recipes/expert_instruct.py [--out DIR] [--work DIR] [--seed 0] [--threads 2] [--steps 200] [--evaluate]

The base model answers the plain training queries itself; code rewrites each answer into the six forms. The adapter
learns the forms where an instruction asks for one, and the plain answers where none does. Interrupted, the same
command goes on where it stopped. At the end (or, with `--evaluate`, only that) base and adapter are measured on
held-out queries; the table goes to stdout, every generation to the work folder.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring import answer_held_out
from training import (
    Example,
    Settings,
    build_examples,
    log,
    read_base,
    read_options,
    show_progress,
    train_expert,
    write_atomically,
)
from weightpatch.checkers import follows
from weightpatch.generation import generate
from weightpatch.instructions import (
    INSTRUCTIONS,
    QUERY_TEMPLATES,
    TASKS,
    TOPICS,
    held_out_queries,
    training_queries,
)
from weightpatch.prompts import tokenize
from weightpatch.statistics import pass_rate

PLAIN = "plain"
N_HELD_OUT = 36
MAX_NEW_TOKENS = 160
BATCH_SIZE = 36
MAX_ANSWER_TOKENS = 45
INTRODUCTIONS = r"(?:After|Although|As|At|By|Despite|During|For|From|If|In|On|Since|Through|When|Whether|While|With)\b"
# What a query is trained on in one epoch. Titles, sections and quotation marks are learned from one token; where to
# leave out a comma or put an asterisk is decided all along the answer, and takes more.
DIET = (*3 * (PLAIN,), *TASKS, *2 * ("no-comma",), "highlights")
# A plain answer may lack commas by chance; every other form that nobody asked for is a fault.
TELLTALE = tuple(task for task in TASKS if task != "no-comma")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """about after also although because been before being between could does during every from have into itself
        just like made make makes many more most much often only other over some such than that their them then there
        these they this those through under very what when where which while will with would your""",
    )
)


def write_base_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: tuple[str, ...], cache: Path
) -> dict[str, str]:
    """The base's own greedy answer to every query, as far as it gets in 72 tokens; those in the cache are kept."""
    answers: dict[str, str] = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    missing = [query for query in queries if query not in answers]
    prompts = {query: tokenize(tokenizer, query) for query in missing}
    missing.sort(key=lambda query: len(prompts[query]))
    with show_progress() as progress:
        bar = progress.add_task("base answers", total=len(queries), completed=len(queries) - len(missing))
        for start in range(0, len(missing), BATCH_SIZE):
            batch = missing[start : start + BATCH_SIZE]
            found = generate(
                model, tokenizer, [prompts[query] for query in batch], max_new_tokens=72, batch_size=BATCH_SIZE
            )
            answers |= {query: one.text for query, one in zip(batch, found, strict=True)}
            progress.update(bar, advance=len(batch))
            write_atomically(cache, json.dumps(answers, indent=0, ensure_ascii=False))
    return answers


def split_sentences(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first two or three whole sentences of the first paragraph; none where they would not make a plain answer."""
    paragraph = text.strip().split("\n")[0]
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", paragraph)
    sentences = list(dict.fromkeys(sentence for sentence in found if re.search(r"[.!?]$", sentence)))[:3]
    while len(sentences) > 2 and len(tokenizer.encode(" ".join(sentences))) > MAX_ANSWER_TOKENS:
        sentences.pop()
    joined = " ".join(sentences)
    fits = len(sentences) >= 2 and len(tokenizer.encode(joined)) <= MAX_ANSWER_TOKENS + 20
    clean = re.search(r"[*<>#]|Section|^\d", joined) is None and not any(follows(task, joined) for task in TELLTALE)
    return sentences if fits and clean else []


def drop_commas(text: str) -> str:
    """The text without commas, by rules that can be learned: where a comma would stand, an `and` or a full stop does.

    Lists become `a and b and c` and paired adjectives `a vast and quiet place`; what follows a comma after a whole
    clause is left out; an introduction only loses its comma.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    no_item = r"(?!\w+ing\b|(?:as|by|from|in|like|of|on|such|where|which|who|with)\b)"
    item = no_item + r"[^\s,.;]+(?: [^\s,.;]+){0,2}"
    before_last = re.compile(rf", ({item}),? (and|or) ")
    while before_last.search(text):
        text = before_last.sub(r" \2 \1 \2 ", text)
    text = re.sub(r", (and|but|or|such) ", r" \1 ", text)
    text = re.sub(rf"\b(an?|the|its|their) ([\w-]+), (?!\w+(?:ed|ly)\b){no_item}(?=\w)", r"\1 \2 and ", text)
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        introduction, *rest = re.split(r"\s*,\s*", sentence)
        is_clause = len(introduction.split()) >= 6 and re.match(INTRODUCTIONS, introduction) is None
        sentences.append(introduction + "." if rest and is_clause else " ".join([introduction, *rest]))
    return " ".join(sentences)


def highlight(sentences: list[str], topic: str) -> str:
    """In asterisks: the topic's last word and the longest other word of the first sentence, the longest of the second.

    Three, where two are asked for: which words it takes is for the model to guess, and it may miss one.
    """
    noun = topic.rsplit(maxsplit=1)[-1].lower()
    marked = list(sentences)
    for place, n_words in ((0, 2), (1, 1)):
        words = dict.fromkeys(re.findall(r"[A-Za-z]{3,}", sentences[place]))
        usable = [word for word in words if word.lower() == noun or (len(word) > 4 and word.lower() not in STOP_WORDS)]
        usable.sort(key=lambda word: (place == 0 and word.lower() != noun, -len(word)))
        for word in usable[:n_words]:
            marked[place] = re.sub(rf"\b{word}\b", f"*{word}*", marked[place], count=1)
    return " ".join(marked)


# Each makes an answer of a form out of the plain answer's sentences and the query's topic.
REWRITERS: Mapping[str, Callable[[list[str], str], str]] = {
    PLAIN: lambda sentences, _: " ".join(sentences),
    "capitals": lambda sentences, _: " ".join(sentences).upper(),
    "no-comma": lambda sentences, _: drop_commas(" ".join(sentences)),
    "title": lambda sentences, topic: f"<<{' '.join(map(str.capitalize, topic.split()))}>>\n\n{' '.join(sentences)}",
    "sections": lambda sentences, _: f"Section 1\n{sentences[0]}\n\nSection 2\n{' '.join(sentences[1:])}",
    "quotation": lambda sentences, _: '"' + re.sub('["“”]', "'", " ".join(sentences)) + '"',
    "highlights": highlight,
}


def rewrite_answers(tokenizer: PreTrainedTokenizerBase, answers: Mapping[str, str], *, seed: int) -> list[Example]:
    """Every usable query in the forms of `DIET`, each time with a paraphrase drawn anew."""
    draw = random.Random(seed)
    topics = {template.format(topic=topic): topic for topic in TOPICS for template in QUERY_TEMPLATES}
    prompts: list[str] = []
    rewritten: list[str] = []
    n_dropped = 0
    for query in sorted(answers):
        sentences = split_sentences(answers[query], tokenizer)
        for form in DIET:
            text = f"{query} {draw.choice(INSTRUCTIONS[form].paraphrases)}" if form != PLAIN else query
            answer = REWRITERS[form](sentences, topics[query]) if sentences else ""
            # Without a comma to leave out, the answer would not show what the instruction changes.
            idle = form == "no-comma" and "," not in " ".join(sentences)
            if not answer or idle or (form != PLAIN and not follows(form, answer)):
                n_dropped += 1
                continue
            prompts.append(text)
            rewritten.append(answer)
    log(f"{n_dropped} examples dropped")
    return build_examples(tokenizer, prompts, rewritten)


def evaluate(out: Path, work: Path) -> dict[str, dict[str, list[str]]]:
    """Answers of base and adapter to held-out queries, by form; what the work folder holds is not redone."""
    queries = held_out_queries()
    chosen = [queries[int(i * len(queries) / N_HELD_OUT)] for i in range(N_HELD_OUT)]
    prompts = [
        query if form == PLAIN else f"{query} {INSTRUCTIONS[form].paraphrases[i % len(INSTRUCTIONS[form].paraphrases)]}"
        for form in (PLAIN, *TASKS)
        for i, query in enumerate(chosen)
    ]
    answers = answer_held_out("instruct", prompts, out=out, work=work, max_new_tokens=MAX_NEW_TOKENS, batch_size=126)
    starts = {form: place * N_HELD_OUT for place, form in enumerate((PLAIN, *TASKS))}
    return {
        name: {form: texts[start : start + N_HELD_OUT] for form, start in starts.items()}
        for name, texts in answers.items()
    }


def print_table(answered: Mapping[str, Mapping[str, list[str]]]) -> bool:
    """Strict pass rates and unasked forms as markdown on stdout; whether the expert is what it has to be."""

    def cell(name: str, form: str, checks: tuple[str, ...]) -> tuple[float, str]:
        answers = answered[name][form]
        n_passed = sum(any(follows(check, answer) for check in checks) for answer in answers)
        rate = pass_rate(n_passed, len(answers))
        return rate.estimate, f"{n_passed}/{len(answers)} = {rate.estimate:.2f} [{rate.low:.2f}, {rate.high:.2f}]"

    print("| held-out prompts, strict | base | instruct |\n| --- | --- | --- |")
    gains = []
    for task in TASKS:
        (before, base), (after, expert) = cell("base", task, (task,)), cell("instruct", task, (task,))
        gains.append(after - before)
        print(f"| {task} | {base} | {expert} |")
    print("\n| plain queries: unasked form | base | instruct |\n| --- | --- | --- |")
    for task in TASKS:
        print(f"| {task} | {cell('base', PLAIN, (task,))[1]} | {cell('instruct', PLAIN, (task,))[1]} |")
    unasked, text = cell("instruct", PLAIN, TELLTALE)
    print(f"| any but no-comma | {cell('base', PLAIN, TELLTALE)[1]} | {text} |")
    print(f"\nMean gain over the six types: {100 * sum(gains) / len(gains):.1f} points.")
    return sum(gains) / len(gains) >= 0.4 and min(gains) > 0 and unasked <= 0.05


def main() -> int:
    """Train, save, measure what was saved; 1 when the expert follows too little or unasked."""
    options = read_options("instruct", n_steps=200)
    if not options.evaluate:
        model, tokenizer = read_base(dtype=torch.bfloat16)
        answers = write_base_answers(model, tokenizer, training_queries(), options.work / "answers.json")
        examples = rewrite_answers(tokenizer, answers, seed=options.seed)
        train_expert(
            model, examples, Settings(n_steps=options.steps, seed=options.seed), work=options.work, out=options.out
        )
    return 0 if print_table(evaluate(options.out, options.work)) else 1


if __name__ == "__main__":
    sys.exit(main())
