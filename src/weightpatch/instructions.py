"""The built-in prompt set `instructions`: everyday queries, with and without one of six verifiable instructions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from weightpatch.errors import PromptError

QUERY_TEMPLATES: tuple[str, ...] = (
    "Tell me about {topic}.",
    "Describe {topic}.",
    "Can you write a few sentences about {topic}?",
    "What is special about {topic}?",
    "Why do people like {topic}?",
    "Please explain {topic} to a child.",
    "What should I know about {topic}?",
    "Give me a short description of {topic}.",
    "How would you describe {topic}?",
    "Write a short note about {topic}.",
)

TOPICS: tuple[str, ...] = (
    *("the river", "the ocean", "the moon", "the sun", "the forest", "the desert", "the beach", "the library"),
    *("the kitchen", "the market", "the city", "the village", "a garden", "a mountain", "a lake", "a bicycle"),
    *("a train", "a boat", "a cat", "a dog", "a horse", "a bird", "a bee", "an apple"),
    *("a book", "a piano", "a clock", "a bridge", "a museum", "a school", "a camera", "an umbrella"),
    *("a rose", "a farm", "music", "bread", "tea", "coffee", "chocolate", "cheese"),
    *("rain", "snow", "football", "chess", "summer", "winter", "painting", "cooking"),
)

SPLITS: tuple[str, ...] = ("fit", "localize", "validate")
"""Disjoint in base queries: anchors are fitted on one, effects measured on the next, validated on the last."""


@dataclass(frozen=True, kw_only=True)
class InstructionType:
    """One kind of verifiable instruction.

    Attributes:
        task: Our name, as used in addresses of runs (`instructions:title`).
        ifeval_id: The instruction id of IFEval (Zhou et al. 2023, arXiv:2311.07911).
        paraphrases: Ways to ask for it; each is appended to a query after one space.
        kwargs: What the checker needs to know, with IFEval's own names; the same for every paraphrase.
    """

    task: str
    ifeval_id: str
    paraphrases: tuple[str, ...]
    kwargs: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


_TYPES: tuple[InstructionType, ...] = (
    InstructionType(
        task="capitals",
        ifeval_id="change_case:english_capital",
        paraphrases=(
            "Write your whole answer in capital letters.",
            "Answer in English and use only capital letters.",
            "Please reply in all capital letters.",
            "Every letter of your answer must be a capital letter.",
            "Use upper case for the entire response.",
            "Make sure that all words in your reply are in upper case.",
        ),
    ),
    InstructionType(
        task="no-comma",
        ifeval_id="punctuation:no_comma",
        paraphrases=(
            "Do not use any commas in your answer.",
            "Your response must not contain a comma.",
            "Please avoid commas in the whole reply.",
            "Write the answer without commas.",
            "Make sure that no comma appears in your response.",
            "Leave out every comma in your reply.",
        ),
    ),
    InstructionType(
        task="title",
        ifeval_id="detectable_format:title",
        paraphrases=(
            "Your answer must contain a title in double angle brackets, such as <<title>>.",
            "Start with a title of the form <<title>>.",
            "Please give your response a title, wrapped in double angle brackets like <<title>>.",
            "Put a title inside << and >> at the top of your reply.",
            "Add a title to the answer and write it as <<title>>.",
            "Make sure that your response has a title between << and >>.",
        ),
    ),
    InstructionType(
        task="sections",
        ifeval_id="detectable_format:multiple_sections",
        paraphrases=(
            "Your answer must have 2 sections. Mark the start of each with Section 1 and Section 2.",
            "Split your response into 2 sections, named Section 1 and Section 2.",
            "Please write 2 sections and put Section 1 and Section 2 before them.",
            "Make sure that your reply has at least 2 sections, starting with Section 1.",
            "Use the form Section 1, then Section 2, for the whole answer.",
            "Divide the reply into Section 1 and Section 2.",
        ),
        kwargs=MappingProxyType({"section_spliter": "Section", "num_sections": 2}),
    ),
    InstructionType(
        task="quotation",
        ifeval_id="startend:quotation",
        paraphrases=(
            "Wrap your entire answer in double quotation marks.",
            "Put your whole response inside double quotation marks.",
            "Your reply must start and end with a double quotation mark.",
            "Please place double quotation marks around the whole answer.",
            "Make sure that your response is between double quotation marks.",
            "Write the entire reply as a quotation, with double marks at the start and at the end.",
        ),
    ),
    InstructionType(
        task="highlights",
        ifeval_id="detectable_format:number_highlighted_sections",
        paraphrases=(
            "Highlight at least 2 parts of your answer with markdown, like *this*.",
            "Please mark 2 or more phrases with asterisks, such as *important words*.",
            "Your response must contain at least 2 highlighted parts, like *this part*.",
            "Use markdown to highlight at least 2 phrases, for example *this phrase*.",
            "Make sure that 2 or more words in your reply are highlighted, as in *word*.",
            "Put asterisks around at least 2 important words of the answer, like *this*.",
        ),
        kwargs=MappingProxyType({"num_highlights": 2}),
    ),
)

INSTRUCTIONS: Mapping[str, InstructionType] = MappingProxyType({kind.task: kind for kind in _TYPES})
TASKS: tuple[str, ...] = tuple(INSTRUCTIONS)


def training_queries() -> tuple[str, ...]:
    """Queries that the recipe of the bundled pair may train on: two thirds of the bank, every template and topic."""
    return tuple(query for query, held_out in _bank().values() if not held_out)


def held_out_queries() -> tuple[str, ...]:
    """Queries that no recipe of ours trains on; the rows of `instruction_rows` come from these alone.

    A query is held out when the places of its template and its topic in their tables add up to a multiple of 3, so
    every template and every topic is on both sides and only the combination is new.
    """
    return tuple(query for query, held_out in _bank().values() if held_out)


def instruction_rows(
    tasks: Sequence[str] = TASKS, *, n_queries: int = 24, seed: int = 0, n_paraphrases_per_query: int = 1
) -> list[dict[str, object]]:
    """Contrast prompts of the given tasks, ready to be written as JSONL.

    The text with instruction is `f"{prompt} {instruction}"`, the text without is `prompt`. The queries are the same for
    every task and all rows of one query lie in one split. Paraphrases are cycled through, so each of them occurs in
    every split as soon as `n_queries * n_paraphrases_per_query` reaches their number (6).

    Args:
        tasks: Names from `TASKS`.
        n_queries: Queries in each of the three splits.
        seed: Decides which held-out query goes to which split.
        n_paraphrases_per_query: Rows per query and task, each with another paraphrase.

    Returns:
        `3 * n_queries * n_paraphrases_per_query` rows per task, with the keys `id`, `task`, `prompt`, `instruction`,
        `split` (`fit`, `localize` or `validate`), `query`, `paraphrase`, `type` (the IFEval id) and `kwargs`.

    Raises:
        PromptError: a task is unknown or named twice, or more queries or paraphrases are asked for than there are.
    """
    # A lone name is also a sequence (of letters); reading it letter by letter would give a confusing message.
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    held_out = [(name, query) for name, (query, is_held_out) in _bank().items() if is_held_out]
    _check_request(names, n_queries, n_paraphrases_per_query, n_held_out=len(held_out))
    held_out.sort(key=lambda entry: hashlib.sha256(f"{seed}:{entry[0]}".encode()).digest())

    rows: list[dict[str, object]] = []
    for kind in (INSTRUCTIONS[name] for name in names):
        for place, split in enumerate(SPLITS):
            for i, (name, query) in enumerate(held_out[place * n_queries : (place + 1) * n_queries]):
                for j in range(n_paraphrases_per_query):
                    paraphrase = (i * n_paraphrases_per_query + j) % len(kind.paraphrases)
                    rows.append(
                        {
                            "id": f"{kind.task}-{name}-p{paraphrase}",
                            "task": kind.task,
                            "prompt": query,
                            "instruction": kind.paraphrases[paraphrase],
                            "split": split,
                            "query": name,
                            "paraphrase": paraphrase,
                            "type": kind.ifeval_id,
                            "kwargs": dict(kind.kwargs),
                        }
                    )
    return rows


def _bank() -> dict[str, tuple[str, bool]]:
    """Every query by its name, with whether it is held out; topic by topic."""
    combinations = [
        (template.format(topic=topic), (i + j) % 3 == 0)
        for i, topic in enumerate(TOPICS)
        for j, template in enumerate(QUERY_TEMPLATES)
    ]
    return {f"q{number:03d}": combination for number, combination in enumerate(combinations)}


def _check_request(names: tuple[str, ...], n_queries: int, n_paraphrases_per_query: int, *, n_held_out: int) -> None:
    faults: list[str] = []
    known = ", ".join(TASKS)
    unknown = [name for name in names if name not in INSTRUCTIONS]
    if unknown:
        faults.append(
            f"unknown instruction task {', '.join(map(repr, unknown))}: the known names are {known}. "
            "Use one of these, or write your own prompts to a JSONL file."
        )
    if not names:
        faults.append(f"no task was named: name at least one of {known}.")
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        faults.append(f"task {', '.join(map(repr, repeated))} is named more than once: name each task once.")
    most_queries = n_held_out // len(SPLITS)
    if not 1 <= n_queries <= most_queries:
        faults.append(
            f"n_queries={n_queries}, but the bank has {n_held_out} queries for {len(SPLITS)} splits: "
            f"use 1 to {most_queries}."
        )
    most_paraphrases = min(len(kind.paraphrases) for kind in _TYPES)
    if not 1 <= n_paraphrases_per_query <= most_paraphrases:
        faults.append(
            f"n_paraphrases_per_query={n_paraphrases_per_query}, but each instruction has {most_paraphrases} "
            f"paraphrases: use 1 to {most_paraphrases}."
        )
    if faults:
        raise PromptError("\n".join(faults))
