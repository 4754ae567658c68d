"""Word problems whose answers are right, and the check that reads an answer."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from weightpatch.arithmetic import ANSWER_FORMAT, WordProblem, solves, word_problems
from weightpatch.arithmetic_templates import TEMPLATES
from weightpatch.errors import PromptError

TRAIN = word_problems("train", n=1500)
HELD_OUT = word_problems("held-out", n=400)
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def work_out(left: str, operation: str, right: str) -> float:
    x, y = int(left), int(right)
    return {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[operation]


@pytest.mark.parametrize("problem", [TRAIN, HELD_OUT], ids=["train", "held-out"])
def test_every_equation_of_a_solution_is_true_and_the_last_gives_the_answer(problem: tuple[WordProblem, ...]) -> None:
    for one in problem:
        equations = EQUATION.findall(one.solution)
        assert len(equations) == one.n_steps
        assert all(work_out(*equation[:3]) == int(equation[3]) for equation in equations), one.solution
        assert int(equations[-1][3]) == one.answer
        assert one.solution.endswith(f"\n#### {one.answer}")
        assert solves(one.answer, one.solution)


def test_every_number_of_a_question_is_used_and_none_is_invented() -> None:
    for one in HELD_OUT:
        question = one.prompt.removesuffix(ANSWER_FORMAT)
        operands = [number for left, _, right, _ in EQUATION.findall(one.solution) for number in (left, right)]
        results = [result for *_, result in EQUATION.findall(one.solution)]
        assert sorted(re.findall(r"\d+", question)) == sorted(
            operands if one.n_steps == 1 else remove_once(operands, results[0])
        ), one


def remove_once(values: list[str], value: str) -> list[str]:
    place = values.index(value, 2)  # the result of the first step is used by the second
    return values[:place] + values[place + 1 :]


def test_there_are_25_templates_and_more_of_one_and_of_two_steps_and_every_operation() -> None:
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 25
    assert sum(len(template.steps) == 1 for template in TEMPLATES) >= 12
    assert sum(len(template.steps) == 2 for template in TEMPLATES) >= 12
    assert {operation for template in TEMPLATES for _, operation, _ in template.steps} == set("+-*/")


def test_numbers_are_of_everyday_size_and_texts_are_complete() -> None:
    for one in (*TRAIN, *HELD_OUT):
        assert 2 <= one.answer <= 200
        assert "{" not in one.prompt + one.solution
        assert one.prompt.endswith(f"? {ANSWER_FORMAT}")


def test_held_out_combinations_of_numbers_names_and_objects_are_never_trained_on() -> None:
    def combination(one: WordProblem) -> tuple[str, ...]:
        capitalized = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+|^[A-Z][a-z]+", one.prompt.removesuffix(ANSWER_FORMAT))
        return (one.template, *re.findall(r"\d+", one.prompt), *capitalized, one.prompt)

    other_seed = word_problems("train", n=1500, seed=7)
    assert not {combination(one) for one in (*TRAIN, *other_seed)} & {combination(one) for one in HELD_OUT}


def test_some_templates_are_held_out_as_a_whole_and_marked() -> None:
    assert not any(one.is_new_template for one in TRAIN)
    new = {one.template for one in HELD_OUT if one.is_new_template}
    assert len(new) >= 3
    assert not new & {one.template for one in TRAIN}
    assert {one.template for one in TRAIN} | new == {template.name for template in TEMPLATES}


def test_templates_have_equal_shares() -> None:
    problems = word_problems("held-out", n=2 * len(TEMPLATES), seed=3)
    counts = [sum(one.template == template.name for one in problems) for template in TEMPLATES]
    assert set(counts) == {2}


def test_the_same_seed_gives_the_same_problems_and_no_prompt_comes_twice() -> None:
    assert word_problems("train", n=1500) == TRAIN
    assert word_problems("train", n=50, seed=1) != TRAIN[:50]
    assert len({one.prompt for one in TRAIN}) == len({one.id for one in TRAIN}) == 1500


def test_problems_never_change() -> None:
    assert (TRAIN[0].id, HELD_OUT[0].id) == ("unit-price-aa706441", "difference-19d2fe1e")


@pytest.mark.parametrize(
    ("answer", "response", "strict", "loose"),
    [
        (42, "3 * 14 = 42\n#### 42", True, True),
        (42, "#### 42.", True, True),
        (42, "####42", True, True),
        (42, "####\n42", True, True),
        (42, "#### **42**", True, True),
        (42, "#### $42", True, True),
        (42, "#### 42.00 dollars", True, True),
        (42, "#### 42 apples", True, True),
        (1234, "#### 1,234", True, True),
        (1234, "#### $ 1 234.", True, True),
        (42, "#### 7\nNo, wait.\n#### 42", True, True),
        (42, "#### 42\nSo #### 7", False, False),
        (42, "#### 42.5", False, False),
        (42, "#### 420", False, False),
        (42, "#### -42", False, False),
        (42, "The answer is 42.", False, True),
        (42, "She has 3 + 39 = 42 apples", False, True),
        (42, "42 of 50", False, False),
        (42, "### 42", False, True),
        (42, "", False, False),
        (42, "#### forty-two", False, False),
        (42, "#### Answer\nIt is 42.", False, True),
    ],
)
def test_the_last_number_after_the_mark_is_the_answer(answer: int, response: str, strict: bool, loose: bool) -> None:
    assert solves(answer, response) is strict
    assert solves(answer, response, loose=loose) is loose


def test_an_unknown_split_or_number_is_refused() -> None:
    with pytest.raises(PromptError, match="unknown split 'test': use one of train, held-out"):
        word_problems("test", n=1)
    with pytest.raises(PromptError, match="at least one"):
        word_problems("train", n=0)


def test_nothing_of_torch_is_imported() -> None:
    code = (
        "import sys, weightpatch.arithmetic as a, weightpatch.programming as p, weightpatch.sandbox\n"
        "a.word_problems('train', n=2), p.coding_tasks('train', n=2)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
