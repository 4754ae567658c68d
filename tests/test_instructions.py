"""The built-in prompt set: what its rows promise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from weightpatch import instructions
from weightpatch.errors import PromptError
from weightpatch.instructions import INSTRUCTIONS, SPLITS, TASKS, held_out_queries, instruction_rows, training_queries


def test_the_six_tasks_carry_their_ifeval_ids() -> None:
    assert {kind.task: kind.ifeval_id for kind in INSTRUCTIONS.values()} == {
        "capitals": "change_case:english_capital",
        "no-comma": "punctuation:no_comma",
        "title": "detectable_format:title",
        "sections": "detectable_format:multiple_sections",
        "quotation": "startend:quotation",
        "highlights": "detectable_format:number_highlighted_sections",
    }
    assert tuple(INSTRUCTIONS) == TASKS


def test_each_instruction_has_six_different_paraphrases_and_the_text_agrees_with_the_kwargs() -> None:
    for kind in INSTRUCTIONS.values():
        assert len(set(kind.paraphrases)) == len(kind.paraphrases) >= 6
    for text in INSTRUCTIONS["sections"].paraphrases:
        assert "Section 1" in text
    for text in INSTRUCTIONS["highlights"].paraphrases:
        assert "2" in text


def test_training_and_held_out_queries_are_disjoint_and_share_every_template_and_topic() -> None:
    training, held_out = training_queries(), held_out_queries()
    assert len(set(training) | set(held_out)) == len(training) + len(held_out) == 480
    assert len(held_out) == 160
    assert {query.rstrip(".?").split()[-1] for query in training} == {
        query.rstrip(".?").split()[-1] for query in held_out
    }
    assert {query.split()[0] for query in training} == {query.split()[0] for query in held_out}


def test_held_out_queries_never_change() -> None:
    assert held_out_queries()[:2] == ("Tell me about the river.", "What is special about the river?")
    assert held_out_queries()[-1] == "Give me a short description of cooking."


def test_a_row_holds_all_that_a_prompt_file_needs() -> None:
    row = next(row for row in instruction_rows(["sections"]) if row["paraphrase"] == 2)
    assert row == {
        "id": f"sections-{row['query']}-p2",
        "task": "sections",
        "prompt": row["prompt"],
        "instruction": INSTRUCTIONS["sections"].paraphrases[2],
        "split": "fit",
        "query": row["query"],
        "paraphrase": 2,
        "type": "detectable_format:multiple_sections",
        "kwargs": {"section_spliter": "Section", "num_sections": 2},
    }
    assert row["prompt"] in held_out_queries()


def test_rows_survive_json() -> None:
    rows = instruction_rows()
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(("n_queries", "n_paraphrases_per_query"), [(24, 1), (6, 1), (10, 3), (53, 6), (1, 1)])
def test_splits_are_equal_in_size_and_share_no_query(n_queries: int, n_paraphrases_per_query: int) -> None:
    rows = instruction_rows(n_queries=n_queries, n_paraphrases_per_query=n_paraphrases_per_query)
    assert len({row["id"] for row in rows}) == len(rows)
    sizes = Counter((row["task"], row["split"]) for row in rows)
    assert sizes == {(task, split): n_queries * n_paraphrases_per_query for task in TASKS for split in SPLITS}
    queries = {split: {row["query"] for row in rows if row["split"] == split} for split in SPLITS}
    assert all(len(queries[split]) == n_queries for split in SPLITS)
    assert len(set.union(*queries.values())) == 3 * n_queries


@pytest.mark.parametrize(("n_queries", "n_paraphrases_per_query"), [(24, 1), (6, 1), (3, 2), (1, 6)])
def test_every_paraphrase_occurs_in_every_split(n_queries: int, n_paraphrases_per_query: int) -> None:
    rows = instruction_rows(n_queries=n_queries, n_paraphrases_per_query=n_paraphrases_per_query)
    for task in TASKS:
        for split in SPLITS:
            found = {row["instruction"] for row in rows if (row["task"], row["split"]) == (task, split)}
            assert found == set(INSTRUCTIONS[task].paraphrases)


def test_tasks_share_their_queries_and_keep_the_order_asked_for() -> None:
    rows = instruction_rows(("title", "capitals"), n_queries=4)
    assert [row["task"] for row in rows] == ["title"] * 12 + ["capitals"] * 12
    assert [(row["query"], row["split"]) for row in rows[:12]] == [(row["query"], row["split"]) for row in rows[12:]]


def test_the_seed_decides_the_split_and_nothing_else_does() -> None:
    assert instruction_rows(seed=3) == instruction_rows(seed=3)
    assert instruction_rows(seed=3) != instruction_rows(seed=4)
    assert instruction_rows(["title"], n_queries=2)[0]["id"] == "title-q414-p0"


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["haiku"], {}, "unknown instruction task 'haiku': the known names are capitals, no-comma, title"),
        ("haiku", {}, "unknown instruction task 'haiku'"),
        ([], {}, "no task was named: name at least one of capitals"),
        (["title", "title"], {}, "task 'title' is named more than once: name each task once"),
        (["title"], {"n_queries": 54}, "n_queries=54, but the bank has 160 queries for 3 splits: use 1 to 53"),
        (["title"], {"n_queries": 0}, "n_queries=0"),
        (["title"], {"n_paraphrases_per_query": 7}, "each instruction has 6 paraphrases: use 1 to 6"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_would_do(
    tasks: list[str] | str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        instruction_rows(tasks, **settings)


def test_all_faults_of_a_request_are_told_at_once() -> None:
    with pytest.raises(PromptError) as caught:
        instruction_rows(["haiku"], n_queries=0, n_paraphrases_per_query=9)
    assert all(part in str(caught.value) for part in ("haiku", "n_queries=0", "n_paraphrases_per_query=9"))


def test_a_lone_task_name_means_that_task() -> None:
    assert instruction_rows("title") == instruction_rows(["title"])


def test_the_prompt_set_and_the_checkers_do_not_import_torch() -> None:
    # An empty package stands in for ours, so that only what these two modules import themselves is seen.
    folder = str(Path(instructions.__file__).parent)
    code = f"""
import sys, types
package = types.ModuleType("weightpatch")
package.__path__ = [{folder!r}]
sys.modules["weightpatch"] = package
import weightpatch.checkers, weightpatch.instructions
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
