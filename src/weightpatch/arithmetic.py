"""Templated word problems of one and two steps in everyday English, and the check of an answer after `####`."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from weightpatch.arithmetic_templates import NAMES, TEMPLATES, THINGS, Template
from weightpatch.errors import PromptError

SPLITS: tuple[str, ...] = ("train", "held-out")
ANSWER_FORMAT = "Write the final answer as a number after ####."
"""Ends every prompt, so that a model without the fine-tune is told the form too."""

N_CLASSES = 5
"""One combination of numbers, names and objects in this many is held out."""

# An answer is a run of digits, perhaps in groups of three, perhaps with cents; the sign stands before or after `$`.
_NUMBER = r"[-\u2212]?\s?[$\u20ac\u00a3\u00a5]?\s?-?\d+(?:[, ]\d{3}(?!\d))*(?:\.\d+)?"
_MARKED = re.compile(rf"(?<!#)####(?!#)[\s:*=_]*({_NUMBER})")
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """One word problem with its solution.

    Attributes:
        id: Stable name made of the template and a digest of the prompt.
        prompt: The question, then `ANSWER_FORMAT`.
        solution: One sentence with an equation per step, then a line `#### 42`.
        answer: The whole number asked for.
        n_steps: How many operations it takes, 1 or 2.
        template: Name of the template.
        is_new_template: The template occurs in no training problem.
    """

    id: str
    prompt: str
    solution: str
    answer: int
    n_steps: int
    template: str
    is_new_template: bool


def word_problems(split: str, *, n: int, seed: int = 0) -> tuple[WordProblem, ...]:
    """Draw word problems, no prompt twice, the templates in equal shares.

    A combination of numbers, names and object is held out, whatever the template, when the first byte of its SHA-256
    digest is a multiple of `N_CLASSES`; all problems of the few templates marked `held_out` are. Training problems
    come from the rest, so no seed can mix the two.

    Args:
        split: `train` or `held-out`.
        n: How many.
        seed: Decides which.

    Returns:
        `n` problems in a random order.

    Raises:
        PromptError: the split is unknown or `n` is not positive.
    """
    if split not in SPLITS:
        raise PromptError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}.")
    if n < 1:
        raise PromptError(f"n={n}: ask for at least one problem.")
    draw = random.Random(f"{seed}:{split}")  # noqa: S311
    templates = [template for template in TEMPLATES if split == "held-out" or not template.held_out]
    problems: dict[str, WordProblem] = {}
    n_misses = 0
    while len(problems) < n:
        if len(problems) % len(templates) == 0 and n_misses == 0:
            draw.shuffle(templates)
        problem = _draw_problem(templates[(len(problems) + n_misses) % len(templates)], split, draw)
        if problem.id in problems:
            n_misses += 1
            if n_misses > 1000:
                raise PromptError(f"n={n}, but there are only about {len(problems)} such problems: ask for fewer.")
        else:
            problems[problem.id] = problem
            n_misses = 0
    found = list(problems.values())
    draw.shuffle(found)
    return tuple(found)


def solves(problem_answer: int, response: str, *, loose: bool = False) -> bool:
    """Whether the response gives the answer.

    Strict: the last number that stands directly after `####` counts. Commas or spaces between thousands, a currency
    sign, markdown stars, decimals that are zero and a full stop are no obstacle.

    Args:
        problem_answer: The right answer.
        response: What the model wrote.
        loose: Without any number after `####`, the last number of the text counts.

    Returns:
        True if that number is the answer.
    """
    found = _MARKED.findall(response)
    if not found and loose:
        found = _ANY.findall(response)
    return bool(found) and _read_number(found[-1]) == problem_answer


def _read_number(text: str) -> float:
    digits = re.sub(r"[^\d.]", "", text)
    return -float(digits) if "-" in text or "\u2212" in text else float(digits)


def _draw_problem(template: Template, split: str, draw: random.Random) -> WordProblem:
    """A problem of this template that belongs to the split."""
    while True:
        words = dict(zip(("name", "friend"), draw.sample(NAMES, 2), strict=True))
        words["things"] = draw.choice(template.things or THINGS)
        numbers = {letter: draw.randint(low, high) for letter, (low, high) in template.numbers.items()}
        results = _work_out(template, numbers)
        if results is None:
            continue
        is_held_out = template.held_out or _is_held_out(template, {**numbers, **words})
        if is_held_out == (split == "held-out"):
            return _write_problem(template, {**numbers, **results}, words, is_new_template=template.held_out)


def _work_out(template: Template, numbers: dict[str, int]) -> dict[str, int] | None:
    """The results `r` (and `s`, of the second step), None when a step leaves the sensible whole numbers."""
    known = dict(numbers)
    for letter, (left, operation, right) in zip("rs", template.steps, strict=False):
        x, y = known[left], known[right]
        match operation:
            case "+":
                known[letter] = x + y
            case "-":
                known[letter] = x - y
            case "*":
                known[letter] = x * y
            case _:
                known[letter] = x // y if x % y == 0 else 0
        if not 1 < known[letter] <= template.largest:
            return None
    return {letter: known[letter] for letter in "rs" if letter in known}


def _is_held_out(template: Template, values: Mapping[str, int | str]) -> bool:
    key = ":".join(f"{name}={values[name]}" for name in sorted(values) if f"{{{name}}}" in template.question)
    return hashlib.sha256(key.encode()).digest()[0] % N_CLASSES == 0


def _write_problem(
    template: Template, numbers: dict[str, int], words: dict[str, str], *, is_new_template: bool
) -> WordProblem:
    values = {**words, **numbers}
    prompt = f"{template.question.format_map(values)} {ANSWER_FORMAT}"
    answer = numbers["rs"[len(template.steps) - 1]]
    sentences = [
        sentence.format_map({**values, "step": f"{numbers[left]} {operation} {numbers[right]} = {numbers[letter]}"})
        for letter, (left, operation, right), sentence in zip("rs", template.steps, template.sentences, strict=False)
    ]
    return WordProblem(
        id=f"{template.name}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}",
        prompt=prompt,
        solution=f"{' '.join(sentences)}\n#### {answer}",
        answer=answer,
        n_steps=len(template.steps),
        template=template.name,
        is_new_template=is_new_template,
    )
