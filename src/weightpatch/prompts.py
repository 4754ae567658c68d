"""Prompts with and without their instruction, their splits, and their tokens."""

from __future__ import annotations

import hashlib
import json
import operator
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from weightpatch.errors import PromptError
from weightpatch.instructions import SPLITS, TASKS, instruction_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "instructions"
"""Name of the built-in set; `instructions:title` is one of its tasks."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ContrastPrompt:
    """One prompt with and without its instruction, as text or as token ids.

    Attributes:
        id: Unique within its set.
        prompt: The base query; empty for token ids.
        instruction: What is added to it; empty for token ids.
        task: The behaviour it belongs to.
        split: One of `SPLITS`, or empty when none was given.
        system: System message for the chat template, if any.
        type: IFEval's id of the instruction type, if any, for the checkers.
        kwargs: Arguments of that checker.
        response: What the answer is taken to begin with, in both forms; read along, never generated. For text only.
        with_instruction: Token ids, for prompts that come as such.
        without_instruction: The same without the instruction.
    """

    id: str
    prompt: str = ""
    instruction: str = ""
    task: str = "task"
    split: str = ""
    system: str = ""
    type: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    response: str = ""
    with_instruction: TokenIds = ()
    without_instruction: TokenIds = ()

    @property
    def query(self) -> str:
        """What must not be shared between splits: the base query."""
        return self.prompt or " ".join(map(str, self.without_instruction))

    @property
    def text(self) -> str:
        """The query followed by the instruction."""
        return f"{self.prompt} {self.instruction}"


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompts:
    """Token ids of prompts, in the order of the prompts.

    Attributes:
        ids: The prompts' ids.
        with_instruction: Token ids of each, unpadded.
        without_instruction: The same without the instruction.
    """

    ids: tuple[str, ...]
    with_instruction: tuple[TokenIds, ...]
    without_instruction: tuple[TokenIds, ...]


@dataclass(frozen=True)
class ContrastPrompts:
    """Prompts that carry an instruction, each beside itself without it.

    Functions use all the prompts they are given; `split` and `of_task` select.
    """

    rows: tuple[ContrastPrompt, ...]

    def __post_init__(self) -> None:
        ids = [row.id for row in self.rows]
        if not ids:
            raise PromptError("no prompts: the set is empty. Give at least one.")
        if repeated := sorted({name for name in ids if ids.count(name) > 1} if len(set(ids)) < len(ids) else ()):
            raise PromptError(f"prompt ids must be unique; repeated: {', '.join(repeated[:8])}. Rename them.")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ContrastPrompt]:
        return iter(self.rows)

    @classmethod
    def load(cls, source: str | Path, *, seed: int = 0, n_queries: int = 24) -> ContrastPrompts:
        """Read prompts from JSONL, or generate the built-in set.

        Each line is an object with `prompt` and `instruction` (or, as token ids, `with_instruction` and
        `without_instruction`), optionally `id`, `task`, `split`, `system`, `type` and
        `kwargs`; other fields are ignored. Where no line names a split, `seed` deals the queries out to the three.

        Args:
            source: A JSONL file, `instructions` (six instruction types) or one of them, as `instructions:title`.
            seed: For the splits, and for the built-in set's choice of queries and paraphrases.
            n_queries: Queries of each split and task of the built-in set.

        Raises:
            PromptError: no such file or set; every line that cannot be used, with its number.
        """
        path = Path(source)
        name, _, task = str(source).partition(":")
        if name == BUILT_IN and not path.exists():
            rows = instruction_rows([task] if task else TASKS, n_queries=n_queries, seed=seed)
            return cls(tuple(_read_row(row, f"{BUILT_IN} row {number}") for number, row in enumerate(rows, 1)))
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also splits at U+2028, legal in JSON
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"cannot read prompts from {source}: {error}. Name a JSONL file, or the built-in set {BUILT_IN!r}."
            ) from error
        return cls(_deal_splits(_read_lines(lines, source), seed=seed))

    @classmethod
    def from_token_ids(
        cls, *, with_instruction: Sequence[Sequence[int]], without_instruction: Sequence[Sequence[int]]
    ) -> ContrastPrompts:
        """Prompts that are already token ids, unpadded.

        Raises:
            PromptError: the two lists differ in length, or a prompt has no tokens.
        """
        if len(with_instruction) != len(without_instruction):
            raise PromptError(
                f"{len(with_instruction)} prompts with an instruction and {len(without_instruction)} without: "
                "give one of each for every prompt."
            )
        rows = []
        for number, (positive, negative) in enumerate(zip(with_instruction, without_instruction, strict=True)):
            if not len(positive) or not len(negative):
                raise PromptError(f"prompt {number} has no tokens. Give at least one token with and without.")
            if wrong := [token for token in (*positive, *negative) if operator.index(token) < 0]:
                raise PromptError(f"prompt {number} has the token id {wrong[0]}. Give ids from 0 on.")
            ids = tuple(map(operator.index, positive)), tuple(map(operator.index, negative))
            rows.append(ContrastPrompt(id=f"p{number}", with_instruction=ids[0], without_instruction=ids[1]))
        return cls(tuple(rows))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order of appearance."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def of_task(self, task: str) -> ContrastPrompts:
        """The prompts of one task."""
        rows = tuple(row for row in self.rows if row.task == task)
        if not rows:
            raise PromptError(f"no prompts for task {task!r}. Tasks here: {', '.join(self.tasks)}.")
        return ContrastPrompts(rows)

    def split(self, name: str) -> ContrastPrompts:
        """The prompts of one split.

        Raises:
            PromptError: no such split, or none of these prompts is in it.
        """
        if name not in SPLITS:
            raise PromptError(f"unknown split {name!r}. Splits are {', '.join(SPLITS)}.")
        rows = tuple(row for row in self.rows if row.split == name)
        if not rows:
            raise PromptError(
                f"no prompts in split {name!r}. Every task needs at least 3 different queries, or a field `split`."
            )
        return ContrastPrompts(rows)

    def without_responses(self) -> ContrastPrompts:
        """The same prompts up to where the answer starts."""
        return ContrastPrompts(tuple(replace(row, response="") for row in self.rows))

    def without_instructions(self, tokenizer: PreTrainedTokenizerBase | None) -> ContrastPrompts:
        """The same queries without their instruction, on both sides, as token ids.

        Raises:
            PromptError: the prompts are text and there is no tokenizer.
        """
        alone = self.tokenize(tokenizer).without_instruction
        return ContrastPrompts(
            tuple(
                replace(row, instruction="", response="", with_instruction=ids, without_instruction=ids)
                for row, ids in zip(self.rows, alone, strict=True)
            )
        )

    def tokenize(self, tokenizer: PreTrainedTokenizerBase | None) -> TokenizedPrompts:
        """Tokens of every prompt, through the chat template where the tokenizer has one.

        Raises:
            PromptError: the prompts are text and there is no tokenizer.
        """
        positives, negatives = [], []
        for row in self.rows:
            if row.with_instruction:
                positives.append(row.with_instruction)
                negatives.append(row.without_instruction)
                continue
            if tokenizer is None:
                raise PromptError(
                    "these prompts are text, and the pair has no tokenizer. Save one into the base's folder, pass "
                    "ModelPair(tokenizer=...), or give token ids (with_instruction, without_instruction)."
                )
            begun = tuple(tokenizer.encode(row.response, add_special_tokens=False)) if row.response else ()
            positives.append(tokenize(tokenizer, row.text, system=row.system) + begun)
            negatives.append(tokenize(tokenizer, row.prompt, system=row.system) + begun)
        return TokenizedPrompts(
            ids=tuple(row.id for row in self.rows),
            with_instruction=tuple(positives),
            without_instruction=tuple(negatives),
        )

    def digest(self) -> str:
        """SHA-256 of everything in the set, in order."""
        rows = [replace(row, kwargs=dict(row.kwargs)).__dict__ for row in self.rows]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, system: str = "") -> TokenIds:
    """Token ids of one user message, up to where the answer starts.

    Raises:
        PromptError: the chat template refuses it.
    """
    rendered, adds_special = render(tokenizer, text, system=system)
    return tuple(tokenizer.encode(rendered) if adds_special else tokenizer.encode(rendered, add_special_tokens=False))


def render(tokenizer: PreTrainedTokenizerBase, text: str, *, system: str = "") -> tuple[str, bool]:
    """One user message as the text that is tokenized, and whether the tokenizer adds its special tokens to it.

    Raises:
        PromptError: the chat template refuses it.
    """
    if not tokenizer.chat_template:
        return (f"{system}\n\n{text}" if system else text), True
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    try:
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        which = "with a system message" if system else "of one user message"
        raise PromptError(f"the model's chat template refuses a conversation {which}: {error}.") from error
    return str(chat), False


def _read_lines(lines: Iterable[str], source: str | Path) -> list[ContrastPrompt]:
    rows: list[ContrastPrompt] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_read_row(json.loads(line), f"line {number}"))
        except (json.JSONDecodeError, PromptError) as error:
            what = str(error) if isinstance(error, PromptError) else f"line {number}: no JSON object ({error.msg})"
            faults.append(f"  - {what}")
    if faults:
        listed = "\n".join(faults[:12])
        raise PromptError(
            f"{len(faults)} of the lines of {source} cannot be used:\n{listed}\n"
            'Each line needs {"prompt": "...", "instruction": "..."}.'
        )
    if not rows:
        raise PromptError(f"{source} holds no prompts. Write one JSON object to a line.")
    return rows


def _read_row(record: object, where: str) -> ContrastPrompt:
    if not isinstance(record, dict):
        raise PromptError(f"{where}: not a JSON object")
    contents: dict[str, Any] = {}
    as_ids = "with_instruction" in record
    for name in ("with_instruction", "without_instruction") if as_ids else ("prompt", "instruction"):
        value = record.get(name)
        if not (_is_token_ids(value) if as_ids else isinstance(value, str) and value.strip()):
            what = "a list of token ids" if as_ids else "a text"
            raise PromptError(f"{where}: {name!r} is {'missing' if name not in record else f'not {what}'}")
        contents[name] = tuple(value) if as_ids else value  # type: ignore[arg-type]
    options: dict[str, Any] = {
        name: record[name] for name in ("task", "split", "system", "type", "response") if record.get(name)
    }
    if wrong := [name for name, value in options.items() if not isinstance(value, str)]:
        raise PromptError(f"{where}: {', '.join(wrong)} must be text")
    if as_ids and "response" in options:
        raise PromptError(f"{where}: a response goes with text; append its tokens to both lists of token ids instead")
    if options.get("split", "fit") not in SPLITS:
        raise PromptError(f"{where}: split {options['split']!r} is none of {', '.join(SPLITS)}")
    if not _is_safe_name(task := options.get("task", "task")):
        raise PromptError(f"{where}: task {task!r} names a folder; use letters, digits, '-', '_' and '.'")
    kwargs = record.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        raise PromptError(f"{where}: kwargs must be an object")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: it holds half a surrogate pair, which is no text ({error.reason})") from error
    given = record.get("id")
    identity = where.replace(" ", "-") if given in (None, "") else str(given)
    return ContrastPrompt(id=identity, **contents, **options, kwargs=kwargs)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _is_safe_name(name: str) -> bool:
    return bool(name.strip(".")) and all(letter.isalnum() or letter in "-_." for letter in name) and len(name) <= 80


def _deal_splits(rows: list[ContrastPrompt], *, seed: int) -> tuple[ContrastPrompt, ...]:
    """Give every row of a query the same split, unless the rows name theirs; each task's queries are dealt evenly."""
    named = [row for row in rows if row.split]
    if named and len(named) < len(rows):
        raise PromptError(f"{len(named)} of {len(rows)} prompts name a split. Name it for all of them or for none.")
    split = {row.query: row.split for row in named}
    if torn := [row for row in named if split[row.query] != row.split]:
        raise PromptError(
            f"the query {torn[0].query!r} is in two splits ({torn[0].split}, {split[torn[0].query]}). What an anchor "
            "is fitted on must not be measured on: keep every query in one split."
        )
    for task in dict.fromkeys(row.task for row in rows):
        queries = list(dict.fromkeys(row.query for row in rows if row.task == task))
        random.Random(seed).shuffle(queries)  # noqa: S311  no secret
        counts = dict.fromkeys(SPLITS, 0) | Counter(split[query] for query in queries if query in split)
        for query in queries:
            if query not in split:
                split[query] = min(SPLITS, key=lambda name: counts[name])
                counts[split[query]] += 1
    return tuple(replace(row, split=split[row.query]) for row in rows)
