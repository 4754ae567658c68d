"""What is merged and how it is measured: a base, experts with their runs, problems of each expert, plain texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.generation import generate
from weightpatch.merging.inputs import Inputs
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts, tokenize
from weightpatch.residuals import evaluating, pad
from weightpatch.run import Run, RunConfig
from weightpatch.stages import fit_anchors, measure_effects, start

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt and what its answer has to be."""

    prompt: str
    passes: Callable[[str], bool]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Experts of one base, with what they are measured on.

    Attributes:
        name: Of the case.
        folder: Where its results lie.
        shared: Where prompts and runs of its experts lie, which other cases may have too.
        base: Reference of the base.
        experts: Name -> reference.
        problems: Split (`validation` or `test`) -> expert -> its problems.
        plain: Prompts and answers that no expert is about: what a merge should not forget.
        model: The base.
        tokenizer: Its tokenizer.
        inputs: Base and experts.
        units: What is scored.
        batch_size: Problems that are answered side by side.
    """

    name: str
    folder: Path
    shared: Path
    base: str
    experts: Mapping[str, str]
    problems: Mapping[str, Mapping[str, Sequence[Problem]]]
    plain: Sequence[tuple[str, str]]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    inputs: Inputs
    units: str = "heads,kvs,mlps"
    batch_size: int = 160
    _cache: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """The base's parameters, which stay what they are while the model has others."""
        if "weights" not in self._cache:
            self._cache["weights"] = {name: self.inputs.weights(name).clone() for name in self.inputs.ours.shapes}
        found: Weights = self._cache["weights"]
        return found

    def changes(self) -> dict[str, dict[str, Tensor]]:
        """Expert -> parameter -> difference, float32."""
        if "changes" not in self._cache:
            self._cache["changes"] = {
                expert: {name: self.inputs.change(expert, name) for name in self.inputs.ours.shapes}
                for expert in self.experts
            }
        found: dict[str, dict[str, Tensor]] = self._cache["changes"]
        return found

    def runs(self, *, scored: bool = True) -> dict[str, Run]:
        """Expert -> its run, made when it is not there yet: anchors and, unless not asked for, exact effects."""
        return {expert: self._run(expert, scored=scored) for expert in self.experts}

    def pair(self, expert: str) -> ModelPair:
        """Of the base and an expert."""
        return self.inputs.pair(expert, self.model)

    def _run(self, expert: str, *, scored: bool) -> Run:
        out = self.shared / f"{expert}-run"
        prompts = self.shared / f"{expert}-prompts.jsonl"
        config = RunConfig(
            base=self.base, specialized=self.experts[expert], prompts=str(prompts), units=self.units, gates="readout"
        )
        pair = self.pair(expert)
        run = start(config, pair, ContrastPrompts.load(prompts), out)
        for stage in (fit_anchors, measure_effects) if scored else (fit_anchors,):
            for _ in stage(run, pair):
                pass
        return run

    def measure(self, weights: Weights, split: str) -> dict[str, Any]:
        """Every expert's problems answered greedily by a merged model, and on test its loss on the plain answers."""
        self._put(weights)
        try:
            passed = self._answers(self.problems[split])
            return {"passed": passed} | ({"plain_loss": self.plain_loss()} if split == "test" else {})
        finally:
            self._put(self.weights)

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        for name, weight in weights.items():
            self.model.get_parameter(name).copy_(weight)

    def _answers(self, problems: Mapping[str, Sequence[Problem]]) -> dict[str, list[int]]:
        """Experts whose answers may have the same length are answered side by side."""
        passed: dict[str, list[int]] = {}
        for most in dict.fromkeys(problem.max_new_tokens for every in problems.values() for problem in every):
            asked = [(name, one) for name, every in problems.items() for one in every if one.max_new_tokens == most]
            prompts = [tokenize(self.tokenizer, problem.prompt) for _, problem in asked]
            found = generate(self.model, self.tokenizer, prompts, max_new_tokens=most, batch_size=self.batch_size)
            for (name, problem), one in zip(asked, found, strict=True):
                passed.setdefault(name, []).append(int(problem.passes(one.text)))
        return {name: passed[name] for name in problems}

    def plain_loss(self) -> float:
        """Mean negative log-likelihood of the tokens of the plain answers, in nats."""
        total, count = 0.0, 0
        with evaluating(self.model):
            for start_ in range(0, len(self.plain), 32):
                rows = [
                    (tokenize(self.tokenizer, prompt), self.tokenizer.encode(answer, add_special_tokens=False))
                    for prompt, answer in self.plain[start_ : start_ + 32]
                ]
                tokens = pad([(*before, *after) for before, after in rows], self.model.device)
                logits = self.model(input_ids=tokens, use_cache=False).logits
                for row, (before, after) in enumerate(rows):
                    places = slice(len(before) - 1, len(before) + len(after) - 1)
                    wanted = torch.tensor(after, device=logits.device)
                    total += float(functional.cross_entropy(logits[row, places].float(), wanted, reduction="sum"))
                    count += len(after)
        return total / count


def logits_with(model: PreTrainedModel, weights: Weights, tokens: Tensor) -> Tensor:
    """Logits with other weights in place, with their gradient."""
    found: Tensor = functional_call(model, dict(weights), (), {"input_ids": tokens, "use_cache": False}).logits
    return found
