"""First-order estimates on prompts: by prompt, and by span of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.engine.activations import Source, Where
from weightpatch.engine.first_order import N_STEPS, Approximation, estimate
from weightpatch.errors import ComponentError
from weightpatch.outputs import Divergence, Margin
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, check_target, inputs
from weightpatch.residuals import BATCH_TOKENS
from weightpatch.spans import SPANS, token_spans


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """How effects are estimated; see `engine.first_order.estimate`.

    Attributes:
        approximation: `outputs`, `weights` or `ig` (integrated gradients).
        n_steps: Points between the two models, for `ig`.
        grad_drop: Sizes of effects, without those that cancel being overlooked: for finding candidates, not for adding
            up.
    """

    approximation: Approximation = "outputs"
    n_steps: int = N_STEPS
    grad_drop: bool = False

    @property
    def name(self) -> str:
        """What `Effects.engine` says of such estimates."""
        return f"{self.approximation}, sizes" if self.grad_drop else self.approximation


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimates:
    """What was estimated.

    Attributes:
        per_prompt: Shape `(component, prompt)`, float64, in the readout's unit.
        per_span: Span -> mean over prompts of what acts at its tokens, shape `(component,)`; only spans that occur.
            Empty where effects are no sums over the tokens of these prompts.
    """

    per_prompt: Tensor
    per_span: Mapping[str, Tensor]


def estimate_effects(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    below: Sequence[Component],
    how: Estimation,
    *,
    source: Source = "weights",
    where: Where = "all",
    batch_tokens: int | None = None,
) -> Estimates:
    """Estimate the effects of all components at once.

    Args:
        pair: The two models.
        prompts: All of them are used.
        anchor: What is read.
        below: Components that reach it, ordered by layer.
        how: The approximation.
        source: What is patched: components' weights, or what they put out (by `outputs` only).
        where: At which tokens activations are patched: all, or the readout positions.
        batch_tokens: Most tokens of one forward and backward pass; None: `residuals.BATCH_TOKENS`.

    Raises:
        ComponentError: an unknown approximation, or `grad_drop` with a contrast readout.
        PromptError: prompts that the models cannot read.
    """
    if anchor.is_difference and how.grad_drop:
        raise ComponentError(
            "grad_drop gives sizes, which cannot be subtracted: use a projection, cosine or divergence."
        )
    check_target(pair, prompts, anchor)
    token_ids = inputs(pair, prompts, anchor)
    n = len(prompts)
    spans = [] if how.grad_drop else _spans(pair, prompts, anchor, token_ids)
    names = [span for span in SPANS if any(span in row for row in spans)]
    sums = []
    for place, ids in enumerate(token_ids):
        rows = torch.zeros(n + len(names), len(ids), dtype=torch.float64)
        sign = 1 if place < n else -1
        rows[place % n] = sign
        for number, name in enumerate(names):
            rows[n + number] = torch.tensor(
                [sign * float(span == name) / n for span in spans[place]], dtype=torch.float64
            )
        sums.append(rows)
    found = estimate(
        pair,
        token_ids,
        anchor,
        below,
        sums=sums,
        approximation=how.approximation,
        n_steps=how.n_steps,
        grad_drop=how.grad_drop,
        source=source,
        where=where,
        batch_tokens=batch_tokens or BATCH_TOKENS,
    )
    return Estimates(
        per_prompt=found[:, :n].contiguous(),
        per_span={name: found[:, n + number].contiguous() for number, name in enumerate(names)},
    )


def _spans(
    pair: ModelPair, prompts: ContrastPrompts, target: Target, token_ids: Sequence[Sequence[int]]
) -> list[tuple[str, ...]]:
    """The span of every token of each sequence; none where a second one is not the same prompt, as in a contrast."""
    if not isinstance(target, Margin | Divergence):
        return [] if target.is_difference else [*token_spans(prompts, pair.tokenizer)]
    known = token_spans(prompts.without_responses(), pair.tokenizer)
    return [
        (*known[place % len(known)], *["response"] * (len(ids) - len(known[place % len(known)])))
        for place, ids in enumerate(token_ids)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenEstimates:
    """Where in one prompt components act.

    Attributes:
        per_token: Estimated effects, shape `(component, token)`, float64; a row adds up to the effect on this prompt.
        texts: The tokens as text; as numbers without a tokenizer.
        spans: The span of each token.
    """

    per_token: Tensor
    texts: tuple[str, ...]
    spans: tuple[str, ...]


def estimate_tokens(
    pair: ModelPair, prompts: ContrastPrompts, anchor: Target, chosen: Sequence[Component], how: Estimation
) -> TokenEstimates:
    """Split the effects of some components on one prompt by token.

    Args:
        pair: The two models.
        prompts: A single prompt.
        anchor: What is read: an anchor without contrast.
        chosen: Components that reach it, in any order.
        how: The approximation, without `grad_drop`.

    Raises:
        ComponentError: more than one prompt, a contrast, or `grad_drop`.
    """
    if len(prompts) != 1 or not isinstance(anchor, Anchor) or anchor.is_difference or how.grad_drop:
        raise ComponentError("effects are split by token for one prompt, an anchor without contrast, no grad_drop.")
    (ids,) = inputs(pair, prompts, anchor)
    found = estimate(
        pair,
        [ids],
        anchor,
        chosen,
        sums=[torch.eye(len(ids))],
        approximation=how.approximation,
        n_steps=how.n_steps,
        batch_tokens=max(BATCH_TOKENS, len(ids)),
    )
    decode = pair.tokenizer.decode if pair.tokenizer else str
    return TokenEstimates(
        per_token=found,
        texts=tuple(str(decode(token)) for token in ids),
        spans=token_spans(prompts, pair.tokenizer)[0],
    )
