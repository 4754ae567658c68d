"""Coding tasks whose tests accept the reference and nothing cheaper, and the code taken from a response."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator

import pytest

from weightpatch.coding import FAMILIES
from weightpatch.errors import PromptError
from weightpatch.programming import REQUEST, CodingTask, coding_tasks, extract_code
from weightpatch.sandbox import run_tests

TRAIN = coding_tasks("train", n=1000)
HELD_OUT = coding_tasks("held-out", n=400)
ALL = (*TRAIN, *HELD_OUT)
ONE_OF_EACH = tuple({task.family: task for task in ALL}.values())
DISTINCT = tuple({task.solution.partition(":")[2]: task for task in ALL}.values())

# Runs many candidates in one process: prints the places of those that pass their tests.
HARNESS = """
def passes(source, tests):
    namespace = {}
    try:
        exec(source, namespace)
        exec(tests, namespace)
    except Exception:
        return False
    return True
"""


def find_passing(candidates: list[tuple[str, str]]) -> list[int]:
    code = f"{HARNESS}\nprint([place for place, pair in enumerate({candidates!r}) if passes(*pair)])"
    outcome = run_tests(code, "assert True", seconds=20)
    assert outcome.passed, outcome.reason
    places: list[int] = ast.literal_eval(outcome.output)
    return places


def test_there_are_60_families_and_more_every_one_with_a_task() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 60
    assert len(ONE_OF_EACH) == len(FAMILIES)


def test_every_reference_passes_its_tests() -> None:
    code = f"{HARNESS}\nresults = [passes(*pair) for pair in {[(task.solution, task.tests) for task in ALL]!r}]"
    outcome = run_tests(code, f"assert len(results) == {len(ALL)} and all(results)", seconds=20)
    assert outcome.passed, outcome.reason


def test_no_answer_without_thought_passes() -> None:
    candidates, names = [], []
    for task in DISTINCT:
        head = task.solution.split("\n", 1)[0]
        first = head.partition("(")[2].partition(":")[0]
        example = task.prompt.split("\n")[-3].strip()
        for answer in ("None", "[]", "{}", "0", "1", "''", "True", "False", first, example):
            candidates.append((f"{head}\n    return {answer}\n", task.tests))
            names.append(f"{task.family}: return {answer}")
    assert [names[place] for place in find_passing(candidates)] == []


def test_no_answer_with_one_slip_passes() -> None:
    slips = [(task, slip) for task in DISTINCT for slip in list_slips(task)]
    assert len(slips) > 1500
    passing = find_passing([(slip, task.tests) for task, slip in slips])
    surprising = [slips[place][1] for place in passing if not is_right(slips[place][0].family, slips[place][1])]
    assert surprising == []


def is_right(family: str, slip: str) -> bool:
    """The slips that change nothing: n + 1 is no divisor of n, and a sum is the same with one more zero in it."""
    zeros = any(text in slip for text in (">= 0", "<= 0", "if n < 1)", "n // 2 for n in numbers if n > 1"))
    return (family == "divisors" and "n + 2" in slip) or (family == "sum-of-selected" and zeros)


WRONG = {
    "keep-greater": "[n for n in numbers if n >= {k}]",
    "unique": "sorted(set(numbers))",
    "palindrome": "text[0] == text[-1]",
    "longest-word": "sorted(words, key=len)[-1]",
    "count-words": "text.count(' ') + 1",
    "initials": "''.join(word[0].upper() for word in text.split())",
    "rotate": "numbers[-{k}:] + numbers[:-{k}]",
    "merge": "{{**b, **a}}",
    "second-smallest": "sorted(numbers)[-2]",
    "digit-sum": "sum(range(n + 1))",
    "common": "list(set(a) & set(b))",
    "reverse-words": "text[::-1]",
    "is-sorted": "all(a < b for a, b in zip(numbers, numbers[1:]))",
    "prime": "n % 2 == 1",
    "best-name": "max(scores)",
    "largest-k": "sorted(numbers)[-{k}:]",
    "get-or": "scores.get(name) or {k}",
}


def read_number(task: CodingTask) -> str:
    """The first number of the docstring's words."""
    numbers = re.findall(r"\d+", task.prompt.split('"""')[1].split(">>>")[0])
    return str(numbers[0]) if numbers else ""


@pytest.mark.parametrize(("family", "wrong"), WRONG.items(), ids=WRONG)
def test_a_plausible_wrong_answer_fails(family: str, wrong: str) -> None:
    task = next(task for task in ALL if task.family == family and "or 0 if" not in task.prompt)
    code = f"{task.solution.splitlines()[0]}\n    return {wrong.format(k=read_number(task))}\n"
    outcome = run_tests(code, task.tests)
    assert "AssertionError" in outcome.reason or "IndexError" in outcome.reason


# What the words of a docstring ask for, worked out by hand: the reference itself may be wrong.
BY_HAND = {
    "increase": ("5", "5 + {k}"),
    "cap": ("{k} + 1", "{k}"),
    "sum-multiples": ("0", "0"),
    "factorial": ("6", "720"),
    "digit-sum": ("907", "16"),
    "n-digits": ("1234", "4"),
    "prime": ("91", "False"),
    "greatest-divisor": ("84, 36", "12"),
    "distance": ("-4, -9", "5"),
    "sign": ("-70", "-1"),
    "divisors": ("10", "[1, 2, 5, 10]"),
    "reverse-digits": ("5030", "305"),
    "count-down": ("3", "[3, 2, 1]"),
    "first-greater": ("[]", "-1"),
    "chunks": ("[1]", "[[1]]"),
    "range": ("[-3, 4, 0]", "7"),
    "running-totals": ("[2, 2, 2]", "[2, 4, 6]"),
    "differences": ("[7, 4, 6]", "[-3, 2]"),
    "unique": ("[2, 1, 2]", "[2, 1]"),
    "flatten": ("[[1], [], [2, 3]]", "[1, 2, 3]"),
    "swap-ends": ("[5, 6, 7, 8]", "[8, 6, 7, 5]"),
    "place-of-largest": ("[3, 30, 4]", "1"),
    "count-vowels": ("'banana'", "3"),
    "remove-vowels": ("'banana'", "'bnn'"),
    "word-lengths": ("['four', 'to']", "[4, 2]"),
    "shortest-word": ("['four', 'to', 'no']", "'to'"),
    "initials": ("'as soon as'", "'asa'"),
    "extract-digits": ("'10 to 4'", "'104'"),
    "count-capitals": ("'New York'", "2"),
    "anagram": ("'night', 'thing'", "True"),
    "sort-letters": ("'cab'", "'abc'"),
    "count-items": ("['x', 'y', 'x']", "{{'x': 2, 'y': 1}}"),
    "count-letters": ("'noon'", "{{'n': 2, 'o': 2}}"),
    "best-name": ("{{'a': 1, 'b': 3, 'c': 2}}", "'b'"),
    "worst-name": ("{{'a': 2, 'b': 3, 'c': 1}}", "'c'"),
    "sorted-names": ("{{'b': 1, 'a': 2}}", "['a', 'b']"),
    "swap": ("{{'a': 1}}", "{{1: 'a'}}"),
    "pair-up": ("['a'], [1]", "{{'a': 1}}"),
    "group-by-length": ("['a', 'bc', 'd']", "{{1: ['a', 'd'], 2: ['bc']}}"),
}


def test_references_do_what_the_words_say() -> None:
    checks = []
    for family, (arguments, expected) in BY_HAND.items():
        task = next(task for task in ALL if task.family == family)
        k = read_number(task)
        call = f"{task.entry_point}({arguments.format(k=k)})"
        checks.append((task.solution, f"assert {call} == {expected.format(k=k)}"))
    assert find_passing(checks) == list(range(len(checks)))


def test_a_prompt_shows_the_head_the_docstring_and_an_example_that_is_no_hidden_test() -> None:
    for task in ALL:
        request, _, code = task.prompt.partition("\n\n```python\n")
        assert request == REQUEST
        function = ast.parse(code.removesuffix("\n```")).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == task.entry_point
        assert task.solution.startswith(code.split("\n", 1)[0])
        example = re.search(r">>> (.*)\n", code)
        assert example is not None
        assert f"assert {example.group(1)} " not in task.tests
        assert task.tests.count("assert ") >= 2
        assert "$" not in task.solution.replace('"$$"', "") + task.tests.replace("'$$", "")


def test_no_setting_of_a_family_is_in_both_splits_in_any_wording() -> None:
    def settings(tasks: tuple[CodingTask, ...]) -> set[tuple[str, str]]:
        return {(task.family, task.solution.partition(":")[2]) for task in tasks}

    other_seed = coding_tasks("train", n=1000, seed=9)
    assert not settings((*TRAIN, *other_seed)) & settings(HELD_OUT)


def test_some_families_are_held_out_as_a_whole_and_marked() -> None:
    assert not any(task.is_new_family for task in TRAIN)
    new = {task.family for task in HELD_OUT if task.is_new_family}
    assert len(new) >= 10
    assert not new & {task.family for task in TRAIN}
    assert new == {family.name for family in FAMILIES if family.held_out}


def test_held_out_tasks_spread_over_the_families() -> None:
    tasks = coding_tasks("held-out", n=60)
    assert len({task.family for task in tasks}) == 60
    assert 5 <= sum(task.is_new_family for task in tasks) <= 20


def test_the_same_seed_gives_the_same_tasks_and_none_comes_twice() -> None:
    assert coding_tasks("train", n=1000) == TRAIN
    assert coding_tasks("train", n=20, seed=1) != TRAIN[:20]
    assert len({task.prompt for task in ALL}) == len({task.id for task in ALL}) == len(ALL)


def test_tasks_never_change() -> None:
    assert (TRAIN[0].id, HELD_OUT[0].id) == ("linear-a8926419", "sort-letters-19e2c20c")


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(PromptError, match="unknown split 'test': use one of train, held-out"):
        coding_tasks("test", n=1)
    with pytest.raises(PromptError, match="n=0, but the split train has"):
        coding_tasks("train", n=0)
    with pytest.raises(PromptError, match="n=100000, but the split held-out has"):
        coding_tasks("held-out", n=100000)


FUNCTION = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"Sure:\n```python\n{FUNCTION}```\nDone.", FUNCTION),
        (f"```\n{FUNCTION}```", FUNCTION),
        (f"```py\nf(3)\n```\n```python\nimport re\n\n{FUNCTION}```", f"import re\n\n{FUNCTION}"),
        (f"```python\n{FUNCTION}", FUNCTION),
        (f"```python\n{FUNCTION}```\n```python\ndef f(x):\n    return 0\n```", FUNCTION),
        (f"Here it is.\n{FUNCTION}\nIt returns x.", FUNCTION),
        (f"{FUNCTION}\ndef g(x):\n    return f(x)\nThat is all.", f"{FUNCTION}\ndef g(x):\n    return f(x)\n"),
        ("def f(\n    x,\n):\n    return x", "def f(\n    x,\n):\n    return x\n"),
        ("```python\ndef g(x):\n    return x\n```", ""),
        ("def f2(x):\n    return x", ""),
        ("return x", ""),
        ("", ""),
    ],
)
def test_the_code_of_a_response_is_found(response: str, expected: str) -> None:
    assert extract_code(response, "f") == expected


def test_the_reference_in_a_code_block_passes_from_response_to_verdict() -> None:
    task = HELD_OUT[0]
    assert run_tests(extract_code(f"```python\n{task.solution}```", task.entry_point), task.tests).passed


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Gt: ast.GtE,
    ast.Lt: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Pow: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
NAMES = {
    **{"min": "max", "max": "min", "any": "all", "all": "any", "upper": "lower", "lower": "upper", "sorted": "list"},
    **{"startswith": "endswith", "endswith": "startswith", "keys": "values", "isupper": "islower", "sum": "max"},
}


def list_slips(task: CodingTask) -> Iterator[str]:
    """The reference with one operator, number, piece of text or name exchanged."""
    tree = ast.parse(task.solution)
    for place, node in enumerate(ast.walk(tree)):
        changed = copy.deepcopy(tree)
        target = list(ast.walk(changed))[place]
        match node:
            case ast.Compare(ops=[operator]) if type(operator) in SWAPS:
                target.ops = [SWAPS[type(operator)]()]
            case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in SWAPS:
                target.op = SWAPS[type(operator)]()
            case ast.Constant(value=bool()):
                target.value = not node.value
            case ast.Constant(value=int()):
                target.value = node.value + 1
            case ast.Constant(value=str()):
                target.value = node.value + "q"
            case ast.Name(id=name) if name in NAMES:
                target.id = NAMES[name]
            case ast.Attribute(attr=name) if name in NAMES:
                target.attr = NAMES[name]
            case _:
                continue
        yield ast.unparse(changed)
