"""Standard benchmarks, run by EleutherAI's `lm-eval` (the extra `eval`) on a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.errors import PromptError

BENCHMARKS: Mapping[str, str] = {
    "ifeval": "ifeval",
    "gsm8k": "gsm8k",
    "humaneval": "humaneval_instruct",
    "mbpp": "mbpp_instruct",
    "mmlu": "mmlu",
}
"""Our name of a benchmark -> the task of `lm-eval` that it is."""

_RUNS_CODE = ("humaneval", "mbpp")


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What `lm-eval` found.

    Attributes:
        name: The benchmark.
        metrics: Its metrics by the names that `lm-eval` gives them, standard errors included.
        n: Problems that were used.
    """

    name: str
    metrics: Mapping[str, float]
    n: int


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    n: int | None = None,
    batch_size: int = 8,
    run_unsafe_code: bool = False,
    tasks_folder: str | Path | None = None,
) -> BenchmarkResult:
    """Run one benchmark. Its data comes from the Hugging Face hub, once, through `datasets`.

    Args:
        model: The model, with whatever is patched into it.
        tokenizer: Its tokenizer; its chat template is applied where there is one.
        name: One of `BENCHMARKS`, or any task of `lm-eval`.
        n: Problems (of each of its subtasks), at most; None: all. With a limit the figures are no benchmark results.
        batch_size: Of its requests.
        run_unsafe_code: Agree that code written by the model is run in this process, as `humaneval` and `mbpp` do.
        tasks_folder: Where to look for task files of your own besides `lm-eval`'s.

    Raises:
        PromptError: `lm-eval` is not installed or knows no such task, its data cannot be fetched, or it would run code
            without your consent.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PromptError(
            f"the benchmark {name!r} is run by lm-eval, which is not installed ({error}). "
            "pip install 'weightpatch[eval]'"
        ) from error
    if name in _RUNS_CODE and not run_unsafe_code:
        raise PromptError(
            f"{name} runs code that the model wrote, without a sandbox. Where that is acceptable, say so: "
            "--run-unsafe-code, and set HF_ALLOW_CODE_EVAL=1, which its metric asks for."
        )
    task = BENCHMARKS.get(name, name)
    manager = TaskManager(include_path=str(tasks_folder) if tasks_folder else None)
    if not manager.match_tasks([task]):
        raise PromptError(f"lm-eval has no task {task!r}. Benchmarks named here: {', '.join(BENCHMARKS)}.")
    try:
        found: dict[str, Any] = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task],
            task_manager=manager,
            limit=n,
            apply_chat_template=bool(tokenizer.chat_template),
            confirm_run_unsafe_code=run_unsafe_code,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
    except ConnectionError as error:
        raise PromptError(
            f"the data of {name} could not be fetched: {error}. Connect once; it is then cached."
        ) from error
    own = found["results"][task]
    counts = found.get("n-samples", {})
    return BenchmarkResult(
        name=name,
        metrics={key: float(value) for key, value in own.items() if isinstance(value, int | float)},
        n=sum(int(count["effective"]) for count in counts.values()),
    )
