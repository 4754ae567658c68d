"""Methods that are scored on plants: each gives every component one number, higher for likelier carriers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from weightpatch.anchor import Anchor
from weightpatch.architecture import embedding_weight
from weightpatch.component import Component, slices
from weightpatch.engine.activations import has_output
from weightpatch.errors import RunError
from weightpatch.estimation import Estimation
from weightpatch.localization import Method, reaches, sweep
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import reference
from weightpatch.statistics import Floats, orientation

SETS_PER_COMPONENT = 3
"""Sets of components that `shapley`, `addition` and `removal` patch on a plant, for every component."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One plant, ready to be scored.

    Attributes:
        pair: The base and the plant.
        prompts: What is measured on; never those that the anchor was fitted on.
        anchor: Fitted on others.
        components: What is scored, by layer.
        seed: Of what is drawn.
    """

    pair: ModelPair
    prompts: ContrastPrompts
    anchor: Anchor
    components: tuple[Component, ...]
    seed: int

    def effects(self, method: Method, estimation: Estimation | None = None) -> Floats:
        """Mean effect of each component in the direction of the gap; 0 where it cannot reach the anchor."""
        chosen = [
            one for one in self.components if reaches(one, self.anchor) and (method != "activation" or has_output(one))
        ]
        found = dict.fromkeys(self.components, 0.0)
        for effect in sweep(
            self.pair,
            self.prompts,
            self.anchor,
            chosen,
            method=method,
            estimation=estimation,
            budget=SETS_PER_COMPONENT * len(chosen),
            seed=self.seed,
        ):
            found[effect.component] = float(effect.per_prompt.mean())
        return self.sign * np.array([found[one] for one in self.components])

    @cached_property
    def sign(self) -> int:
        """1, or -1 where the plant reads lower than the base."""
        base, specialized = reference(self.pair, self.prompts, self.anchor)
        return orientation((specialized - base).numpy())

    @cached_property
    def sufficiency(self) -> Floats:
        """Exact weight patching."""
        return self.effects("exact")

    @cached_property
    def necessity(self) -> Floats:
        """The same with the roles exchanged."""
        return self.effects("necessity")

    def norms(self, *, relative: bool) -> Floats:
        """Norm of each component's difference, or its share of the norm of the base's weights."""
        return np.array([self._norm(one, relative=relative) for one in self.components])

    def _norm(self, component: Component, *, relative: bool) -> float:
        changed = whole = 0.0
        for piece in slices(self.pair.architecture, component):
            ours = piece.of(self.pair.base.get_parameter(piece.parameter).detach())
            theirs = piece.of(self.pair.specialized_weight(piece.parameter))
            changed += float((theirs - ours).square().sum())
            whole += float(ours.square().sum())
        found: float = (changed / whole if relative else changed) ** 0.5
        return found

    def gradients(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Floats:
        """What a measure of (weight, gradient) adds up to in each component, mean over prompts.

        The gradient is that of the plant's log-probability of its own next token behind each prompt.
        """
        with self.pair.materialized() as model, torch.enable_grad():
            parameters = dict(model.named_parameters())
            names = {piece.parameter for one in self.components for piece in slices(self.pair.architecture, one)}
            wanted = {name: parameters[name] for name in sorted(names)}
            asked = {name: parameter.requires_grad for name, parameter in wanted.items()}
            found = np.zeros(len(self.components))
            try:
                for parameter in wanted.values():
                    parameter.requires_grad_()
                for ids in self.prompts.tokenize(self.pair.tokenizer).with_instruction:
                    inputs = torch.tensor([ids], device=embedding_weight(model).device)
                    logits = model(inputs, use_cache=False).logits[0, -1]
                    chosen = functional.log_softmax(logits.float(), dim=-1).max()
                    gradients = torch.autograd.grad(chosen, list(wanted.values()))
                    parts = {
                        name: measure(parameter.detach(), gradient)
                        for (name, parameter), gradient in zip(wanted.items(), gradients, strict=True)
                    }
                    found += [self._summed(one, parts) for one in self.components]
            finally:
                for name, parameter in wanted.items():
                    parameter.requires_grad_(asked[name])
        return found / len(self.prompts)

    def _summed(self, component: Component, parts: Mapping[str, Tensor]) -> float:
        return sum(float(piece.of(parts[piece.parameter]).sum()) for piece in slices(self.pair.architecture, component))


Score = Callable[[Case], Floats]


def _combined(case: Case) -> Floats:
    """Mean of sufficiency and necessity: both are shares of one gap."""
    return (case.sufficiency + case.necessity) / 2


METHODS: Mapping[str, Score] = {
    "exact": lambda case: case.sufficiency,
    "necessity": lambda case: case.necessity,
    "exact and necessity": _combined,
    "first-order outputs": lambda case: case.effects("first-order", Estimation(approximation="outputs")),
    "first-order weights": lambda case: case.effects("first-order", Estimation(approximation="weights")),
    "first-order ig": lambda case: case.effects("first-order", Estimation(approximation="ig")),
    "activation": lambda case: case.effects("activation"),
    "shapley": lambda case: case.effects("shapley"),
    "addition": lambda case: case.effects("addition"),
    "removal": lambda case: case.effects("removal"),
    "|delta|": lambda case: case.norms(relative=False),
    "|delta| relative": lambda case: case.norms(relative=True),
    "gradient x weight": lambda case: case.gradients(lambda weight, gradient: (weight * gradient).abs()),
    "Fisher": lambda case: case.gradients(lambda _, gradient: gradient.square()),
    "random": lambda case: np.random.default_rng(case.seed).random(len(case.components)),
}
"""Name in the table -> how it scores. A new method is one more line."""


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods of some names.

    Raises:
        RunError: an unknown one.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise RunError(f"unknown methods {', '.join(unknown)}. Choose from {', '.join(METHODS)}.")
    return tuple(names)
