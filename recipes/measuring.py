"""What the recipes of the experts share after the training: held-out answers of base and expert, and their table."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from training import find_base, log, read_base, write_atomically
from weightpatch.checkpoint import find, load
from weightpatch.generation import generate
from weightpatch.prompts import tokenize
from weightpatch.statistics import pass_rate


def answer_held_out(
    expert: str, prompts: Sequence[str], *, out: Path, work: Path, max_new_tokens: int, batch_size: int = 36
) -> dict[str, list[str]]:
    """Greedy answers of base and expert, by name; what the work folder holds is not generated again."""
    base, tokenizer = read_base(dtype=torch.float32)
    asked = hashlib.sha256(json.dumps([prompts, max_new_tokens]).encode()).hexdigest()[:12]
    answers: dict[str, list[str]] = {}
    for name in ("base", expert):
        weights = find_base() if name == "base" else out / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        path = work / "evaluation" / f"{name}-{digest}-{asked}.jsonl"
        if not path.is_file():
            started = time.monotonic()
            model = base if name == "base" else load(find(out), dtype=torch.float32, base=base)
            ids = [tokenize(tokenizer, prompt) for prompt in prompts]
            found = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size)
            rows = [{"prompt": prompt, "answer": one.text} for prompt, one in zip(prompts, found, strict=True)]
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            log(f"{name}: {len(prompts)} answers in {time.monotonic() - started:.0f} s")
        answers[name] = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    return answers


def print_rates(title: str, groups: Mapping[str, Sequence[int]], passed: Mapping[str, Sequence[bool]]) -> None:
    """A markdown table on stdout: a row for each group of places, a column for each model."""
    print(f"| {title} | {' | '.join(passed)} |\n| --- |{' --- |' * len(passed)}")
    for group, places in groups.items():
        cells = []
        for verdicts in passed.values():
            n_passed = sum(verdicts[place] for place in places)
            rate = pass_rate(n_passed, len(places))
            cells.append(f"{n_passed}/{len(places)} = {rate.estimate:.2f} [{rate.low:.2f}, {rate.high:.2f}]")
        print(f"| {group} | {' | '.join(cells)} |")
