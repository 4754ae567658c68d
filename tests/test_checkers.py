"""The six checkers decide as IFEval's do."""

from __future__ import annotations

import random

import if_verifiable
import langdetect
import pytest

from weightpatch.checkers import follows
from weightpatch.errors import PromptError
from weightpatch.instructions import INSTRUCTIONS, TASKS

CASES = [
    ("capitals", "THE RIVER IS LONG, COLD AND QUIET.", True),
    ("capitals", "THE RIVER IS LONG, cOLD AND QUIET.", False),
    ("capitals", "1, 2, 3.", False),
    ("no-comma", "The river is long.", True),
    ("no-comma", "The river is long, cold.", False),
    ("title", "<<The River>>\nThe river is long.", True),
    ("title", "The river is <<long>> and cold.", True),
    ("title", "<< >>\nThe river is long.", False),
    ("title", "<<>>", False),
    ("title", "<<The\nRiver>>", False),
    ("title", "<The River>", False),
    ("sections", "Section 1\nLong.\nSection 2\nCold.", True),
    ("sections", "Section1 long Section2 cold", True),
    ("sections", "Section 1\nLong and cold.", False),
    ("sections", "SECTION 1\nLong.\nSECTION 2\nCold.", False),
    ("sections", "Section one. Section two.", False),
    ("quotation", '"The river is long."', True),
    ("quotation", ' \n"The river is long."\n', True),
    ("quotation", '"The river is long.', False),
    ("quotation", "\u201cThe river is long.\u201d", False),
    ("quotation", '"', False),
    ("highlights", "*The river* is *long*.", True),
    ("highlights", "**The river** is *long*.", True),
    ("highlights", "*The river* is long.", False),
    ("highlights", "The river is long. ** ** * *", False),
    ("highlights", "*The\nriver* is *long*", False),
]


@pytest.mark.parametrize(("task", "response", "expected"), CASES)
def test_each_checker_decides_as_ifeval_describes(task: str, response: str, expected: bool) -> None:
    assert follows(task, response) is expected


@pytest.mark.parametrize(("task", "response", "expected"), CASES)
def test_the_ifeval_id_and_its_kwargs_name_the_same_check(task: str, response: str, expected: bool) -> None:
    kind = INSTRUCTIONS[task]
    assert follows(kind.ifeval_id, response, kind.kwargs) is expected


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("response", ["", " ", "\n\t\n"])
@pytest.mark.parametrize("loose", [False, True])
def test_a_blank_response_never_follows(task: str, response: str, loose: bool) -> None:
    assert not follows(task, response, loose=loose)


@pytest.mark.parametrize(
    ("task", "response"),
    [
        ("capitals", "Sure:\nTHE RIVER IS LONG AND COLD.\nBye"),
        ("no-comma", "Sure, here it is:\nThe river is long."),
        ("no-comma", "The river is long.\nWell, bye."),
        ("quotation", 'Here:\n"The river is long."'),
        ("quotation", '*"The river is long."*'),
    ],
)
def test_loose_forgives_a_first_line_a_last_line_and_asterisks(task: str, response: str) -> None:
    assert not follows(task, response)
    assert follows(task, response, loose=True)


def test_loose_accepts_whatever_strict_accepts() -> None:
    assert all(follows(task, response, loose=True) for task, response, expected in CASES if expected)


def test_given_kwargs_replace_those_of_the_built_in_set() -> None:
    response = "PART 1\n*a*\nPART 2\n*b*\nPART 3\n*c*"
    assert not follows("sections", response)
    assert follows("sections", response, {"section_spliter": "PART", "num_sections": 3, "num_highlights": None})
    assert not follows("sections", response, {"section_spliter": "PART", "num_sections": 4})
    assert follows("highlights", response, {"num_highlights": 3.0})
    assert not follows("highlights", response, {"num_highlights": 4})


def test_an_unknown_type_is_named_together_with_the_known_ones() -> None:
    with pytest.raises(
        PromptError, match=r"no checker for the instruction type 'haiku': the known ones are capitals \("
    ):
        follows("haiku", "text")


@pytest.mark.parametrize("response", ["", "text"])
@pytest.mark.parametrize(
    ("task", "kwargs", "message"),
    [
        ("highlights", {}, "num_highlights is None: this instruction needs a whole number"),
        ("highlights", {"num_highlights": "2"}, "num_highlights is '2'"),
        ("highlights", {"num_highlights": 1.5}, "num_highlights is 1.5"),
        ("sections", {"section_spliter": "Section"}, "num_sections is None"),
        ("sections", {"num_sections": 2}, "section_spliter is None: sections need the word"),
        ("sections", {"section_spliter": "(", "num_sections": 2}, r"section_spliter '\(' is no regular expression"),
    ],
)
def test_a_wrong_argument_is_an_error_and_no_verdict(
    task: str, kwargs: dict[str, object], message: str, response: str
) -> None:
    with pytest.raises(PromptError, match=message):
        follows(task, response, kwargs)


@pytest.mark.parametrize(("seed", "n"), [(1, 300), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_verdicts_agree_with_if_verifiable_on_random_strings(
    seed: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)
    atoms = ["<<", ">>", "<", ">", "**", "*", '"', " ", "\n", "Section 1", "Section", "SECTION 2", "2"]
    atoms += [" a", "river", "THE RIVER IS LONG", "EL R\u00cdO ES LARGO", ",", "."]
    draw = random.Random(seed)
    # It strips the response before anything else and gives no verdict on a blank one, which IFEval itself does not do.
    responses = ["".join(draw.choices(atoms, k=draw.randint(1, 9))).strip() for _ in range(n)]
    for response in filter(None, responses):
        for kind in INSTRUCTIONS.values():
            sample = if_verifiable.IFEvalSample(
                key=0, prompt="", instruction_id_list=[kind.ifeval_id], kwargs=[dict(kind.kwargs)]
            )
            (expected,), _ = if_verifiable.evaluate_output_for_sample("ifeval", sample, response)
            found = (follows(kind.task, response), follows(kind.task, response, loose=True))
            assert found == (expected.strict_pass, expected.loose_pass), (kind.task, response)
