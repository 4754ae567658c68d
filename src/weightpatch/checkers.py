"""Does a response follow its instruction? Six of IFEval's checks, with IFEval's semantics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import langdetect

from weightpatch.errors import PromptError
from weightpatch.instructions import INSTRUCTIONS, InstructionType


def follows(
    task_or_ifeval_id: str, response: str, kwargs: Mapping[str, object] | None = None, *, loose: bool = False
) -> bool:
    """Whether the response obeys the instruction.

    A blank response never follows. Capitals: every cased letter is upper case, and `langdetect` takes the text for
    English. As in IFEval, a text in which it finds no language counts as English; unlike there its random draws are
    seeded, so the verdict is the same every time. It errs on texts of a few words.

    Args:
        task_or_ifeval_id: A name from `TASKS` (`title`) or its IFEval id (`detectable_format:title`).
        response: The text that the model wrote, without special tokens.
        kwargs: IFEval's arguments of this instruction (`num_highlights`; `section_spliter`, a regular expression as in
            IFEval, and `num_sections`); other keys are ignored. None: those of the built-in set.
        loose: Accept when any of IFEval's 8 variants passes: the response as it is, without its first line, its last
            line or both, each with and without its asterisks.

    Returns:
        True if it follows.

    Raises:
        PromptError: the type is none of the six, or an argument that its check needs is missing or of the wrong kind.

    Source:
        Zhou et al. 2023, arXiv:2311.07911, written anew from the behaviour of its reference code.
    """
    kind = _find_type(task_or_ifeval_id)
    check = _CHECKS[kind.task]
    arguments = kind.kwargs if kwargs is None else kwargs
    variants = _loose_variants(response) if loose else [response]
    # All of them are checked before any is judged: a wrong argument is reported also when the response is blank.
    verdicts = [check(variant, arguments) and variant.strip() != "" for variant in variants]
    return any(verdicts)


def _find_type(name: str) -> InstructionType:
    for kind in INSTRUCTIONS.values():
        if name in (kind.task, kind.ifeval_id):
            return kind
    known = ", ".join(f"{kind.task} ({kind.ifeval_id})" for kind in INSTRUCTIONS.values())
    raise PromptError(
        f"no checker for the instruction type {name!r}: the known ones are {known}. "
        "Leave rows of other types out, or rename the type."
    )


def _loose_variants(response: str) -> list[str]:
    lines = response.split("\n")
    shortened = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [response, *shortened]
    return [*variants, *(variant.replace("*", "") for variant in variants)]


def _is_capitals(response: str, _arguments: Mapping[str, object]) -> bool:
    return response.isupper() and _is_english(response)


def _has_no_comma(response: str, _arguments: Mapping[str, object]) -> bool:
    return "," not in response


def _has_title(response: str, _arguments: Mapping[str, object]) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _has_sections(response: str, arguments: Mapping[str, object]) -> bool:
    splitter = arguments.get("section_spliter")
    if not isinstance(splitter, str):
        raise PromptError(
            f"section_spliter is {splitter!r}: sections need the word that starts each of them, "
            'for example {"section_spliter": "Section", "num_sections": 2}.'
        )
    needed = _count(arguments, "num_sections")
    try:
        pieces = re.split(r"\s?" + splitter + r"\s?\d+\s?", response)
    except re.error as error:
        raise PromptError(
            f"section_spliter {splitter!r} is no regular expression ({error}): "
            "put a backslash before special characters."
        ) from error
    return len(pieces) - 1 >= needed


def _is_quotation(response: str, _arguments: Mapping[str, object]) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def _has_highlights(response: str, arguments: Mapping[str, object]) -> bool:
    needed = _count(arguments, "num_highlights")
    single = [match.strip("*") for match in re.findall(r"\*[^\n\*]*\*", response)]
    double = [match[2:-2] for match in re.findall(r"\*\*[^\n\*]*\*\*", response)]
    return sum(1 for text in [*single, *double] if text.strip()) >= needed


def _count(arguments: Mapping[str, object], name: str) -> int:
    value = arguments.get(name)
    # Tables read with pandas or JSON may turn a whole number into 2.0.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    raise PromptError(f"{name} is {value!r}: this instruction needs a whole number, for example {{{name!r}: 2}}.")


def _is_english(text: str) -> bool:
    factory = langdetect.DetectorFactory
    previous_seed = factory.seed
    # langdetect draws random numbers: without a seed the same response may pass once and fail the next time.
    factory.seed = 0
    try:
        return bool(langdetect.detect(text) == "en")
    except langdetect.LangDetectException:
        return True
    finally:
        factory.seed = previous_seed


_CHECKS: Mapping[str, Callable[[str, Mapping[str, object]], bool]] = {
    "capitals": _is_capitals,
    "no-comma": _has_no_comma,
    "title": _has_title,
    "sections": _has_sections,
    "quotation": _is_quotation,
    "highlights": _has_highlights,
}
