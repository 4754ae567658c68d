from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightpatch import ContrastPrompts, ModelPair
from weightpatch.errors import PromptError
from weightpatch.prompts import SPLITS, ContrastPrompt


def write(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


def test_queries_are_dealt_to_disjoint_splits_that_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"Query {q}", "instruction": f"Way {p}"} for q in range(12) for p in range(5)]
    file = write(tmp_path, *rows)
    prompts = ContrastPrompts.load(file)
    queries = {split: {row.query for row in prompts.split(split)} for split in SPLITS}
    assert [len(found) for found in queries.values()] == [4, 4, 4]
    assert len(set.union(*queries.values())) == 12
    assert ContrastPrompts.load(file).rows == prompts.rows
    assert ContrastPrompts.load(file, seed=1).rows != prompts.rows


def test_each_tasks_queries_are_dealt_evenly_whatever_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"{task} {n}", "instruction": "i", "task": task} for task in "ab" for n in range(12)]
    shared = [{"prompt": f"a {n}", "instruction": "i", "task": "c"} for n in range(6)]
    for seed in range(10):
        prompts = ContrastPrompts.load(write(tmp_path, *rows, *shared), seed=seed)
        assert [len(prompts.of_task(task).split(split)) for task in "ab" for split in SPLITS] == [4] * 6
        splits = {(row.query, row.split) for row in prompts}
        assert len(splits) == 24


def test_a_query_named_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "instruction": str(n), "split": SPLITS[n]} for n in range(2)]
    with pytest.raises(PromptError, match="the query 'q' is in two splits"):
        ContrastPrompts.load(write(tmp_path, *rows))


def test_line_separators_inside_a_prompt_are_part_of_it(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    file = write(tmp_path, json.dumps({"prompt": text, "instruction": "i"}, ensure_ascii=False))
    assert ContrastPrompts.load(file).rows[0].prompt == text
    with pytest.raises(PromptError, match="half a surrogate pair"):
        ContrastPrompts.load(write(tmp_path, '{"prompt": "x\\ud800", "instruction": "i"}'))


def test_splits_and_tasks_that_the_file_names_are_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "instruction": "i", "task": "b" if n % 2 else "a", "split": SPLITS[n % 3], "id": f"x{n}"}
        for n in range(6)
    ]
    prompts = ContrastPrompts.load(write(tmp_path, *rows))
    assert prompts.tasks == ("a", "b")
    assert [row.id for row in prompts.of_task("b").split("localize")] == ["x1"]


def test_every_line_that_cannot_be_used_is_named_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "fine", "instruction": "fine"},
        "{not json",
        {"prompt": "no instruction"},
        {"prompt": " ", "instruction": "x"},
        ["a list"],
        {"prompt": "q", "instruction": "i", "split": "train"},
        {"prompt": "q", "instruction": "i", "task": "../elsewhere"},
    )
    with pytest.raises(PromptError) as caught:
        ContrastPrompts.load(file)
    for part in (
        "6 of the lines",
        "line 2: no JSON object",
        "line 3: 'instruction' is missing",
        "line 4: 'prompt' is not a text",
        "line 5: not a JSON object",
        "line 6: split 'train' is none of fit, localize, validate",
        "line 7: task '../elsewhere' names a folder",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "instruction"])
def test_a_source_that_is_not_there_is_refused_with_the_built_in_name(source: str) -> None:
    with pytest.raises(PromptError, match="Name a JSONL file, or the built-in set 'instructions'"):
        ContrastPrompts.load(source)


def test_repeated_ids_half_named_splits_and_empty_files_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "q", "instruction": "i", "id": "same"}
    with pytest.raises(PromptError, match="ids must be unique; repeated: same"):
        ContrastPrompts.load(write(tmp_path, row, row))
    with pytest.raises(PromptError, match="1 of 2 prompts name a split"):
        ContrastPrompts.load(write(tmp_path, {**row, "split": "fit"}, {**row, "id": "other"}))
    with pytest.raises(PromptError, match="holds no prompts"):
        ContrastPrompts.load(write(tmp_path, ""))


def test_token_ids_need_one_of_each_for_every_prompt() -> None:
    with pytest.raises(PromptError, match="2 prompts with an instruction and 1 without"):
        ContrastPrompts.from_token_ids(with_instruction=[[1], [2]], without_instruction=[[1]])
    with pytest.raises(PromptError, match="prompt 0 has no tokens"):
        ContrastPrompts.from_token_ids(with_instruction=[[]], without_instruction=[[1]])


def test_the_built_in_set_has_six_tasks_each_in_three_disjoint_splits() -> None:
    prompts = ContrastPrompts.load("instructions", n_queries=10)
    assert len(prompts.tasks) == 6
    for task in prompts.tasks:
        own = prompts.of_task(task)
        queries = [{row.query for row in own.split(split)} for split in SPLITS]
        assert [len(found) for found in queries] == [10, 10, 10]
        assert len(set.union(*queries)) == 30
        assert len({row.instruction for row in own.split("fit")}) >= 5
    assert ContrastPrompts.load("instructions:title").tasks == ("title",)


def test_the_digest_changes_with_any_prompt(tmp_path: Path) -> None:
    one = ContrastPrompts.load(write(tmp_path, {"prompt": "q", "instruction": "i"}))
    same = ContrastPrompts.load(write(tmp_path, {"prompt": "q", "instruction": "i"}))
    other = ContrastPrompts.load(write(tmp_path, {"prompt": "q", "instruction": "j"}))
    assert one.digest() == same.digest() != other.digest()


def test_token_ids_can_stand_in_a_file_too(tmp_path: Path) -> None:
    rows = [{"with_instruction": [n, 2, 3], "without_instruction": [n, 2]} for n in range(3)]
    prompts = ContrastPrompts.load(write(tmp_path, *rows))
    assert [row.with_instruction for row in prompts] == [(n, 2, 3) for n in range(3)]
    assert {row.split for row in prompts} == set(SPLITS)
    with pytest.raises(PromptError, match="line 1: 'with_instruction' is not a list of token ids"):
        ContrastPrompts.load(write(tmp_path, {"with_instruction": ["x"], "without_instruction": [1]}))


def test_a_template_that_knows_no_system_message_says_so() -> None:
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized")
    row = ContrastPrompt(id="a", prompt="Tell me about rivers.", instruction="Use a title.", system="Be brief.")
    with pytest.raises(PromptError, match="refuses a conversation with a system message: this model knows the roles"):
        ContrastPrompts((row,)).tokenize(pair.tokenizer)
