from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from weightpatch import ModelPair
from weightpatch.benchmarks import BENCHMARKS, run_benchmark
from weightpatch.errors import PromptError

pytestmark = pytest.mark.slow

TASK = """
task: titled
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "<<"
generation_kwargs:
  until: []
  max_gen_toks: 24
  do_sample: false
filter_list:
  - name: title
    filter:
      - function: regex
        regex_pattern: "(<<)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


@pytest.mark.filterwarnings("default")
def test_lm_eval_runs_a_task_on_a_model_in_memory(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [f"Tell me about the {topic}. {ask}" for topic in ("river", "moon") for ask in ("", "Add a title.")]
    wanted = "Your answer must contain a title wrapped in double angular brackets such as <<title>>."
    rows = [{"question": question.replace("Add a title.", wanted)} for question in questions]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "titled.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    assert pair.tokenizer is not None
    found = {
        side: run_benchmark(model, pair.tokenizer, "titled", tasks_folder=tmp_path)
        for side, model in (("base", pair.base), ("specialized", pair.specialized))
    }
    assert {side: result.metrics["exact_match,title"] for side, result in found.items()} == {
        "base": 0.0,
        "specialized": 0.5,
    }
    assert found["base"].n == 4


@pytest.mark.filterwarnings("default")
def test_an_unknown_benchmark_and_one_that_runs_code_unasked_are_refused(pair: ModelPair) -> None:
    assert pair.tokenizer is not None
    with pytest.raises(PromptError, match=r"no task 'poems'.*ifeval, gsm8k"):
        run_benchmark(pair.base, pair.tokenizer, "poems")
    with pytest.raises(PromptError, match="--run-unsafe-code"):
        run_benchmark(pair.base, pair.tokenizer, "humaneval")


@pytest.mark.filterwarnings("default")
def test_every_benchmark_named_here_is_a_task_of_lm_eval() -> None:
    assert set(TaskManager().match_tasks(list(BENCHMARKS.values()))) == set(BENCHMARKS.values())
