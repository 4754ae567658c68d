"""Sets of components patched together: what comes back of the anchor's readout, of the output and of the behaviour."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightpatch.anchor import Anchor
from weightpatch.behaviour import Answering, Bench
from weightpatch.component import Component, components, encloses
from weightpatch.difference import weight_differences
from weightpatch.effects import Effects
from weightpatch.errors import PromptError
from weightpatch.generation import generate
from weightpatch.outputs import forced_log_probs
from weightpatch.pair import ModelPair
from weightpatch.patch import Recipient, patched
from weightpatch.prompts import ContrastPrompts, TokenIds
from weightpatch.reading import readouts
from weightpatch.residuals import BATCH_TOKENS
from weightpatch.statistics import Floats, Interval, mean_interval, orientation, pass_rate, recovery

N_RESPONSE_TOKENS = 24
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the components that are patched together: most of them few, where a ranking has to show what it knows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """What every patched model is compared with; made once by `read_references`.

    Attributes:
        prompts: What the models are asked, with the instruction.
        token_ids: Tokens of each.
        responses: The specialized model's own greedy answer to each, its first tokens.
        log_probs: Its next-token log-probabilities there, `(token, vocabulary)` for each prompt: one for every token
            of the response, the first being predicted from the prompt alone.
        base_kl: KL(specialized || base) at the same places, mean over tokens, nats, shape `(prompt,)`.
        anchor: What is read.
        base: Its readout in the base, shape `(prompt,)`.
        specialized: The same in the specialized model.
    """

    prompts: ContrastPrompts
    token_ids: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]
    log_probs: tuple[Tensor, ...]
    base_kl: Floats
    anchor: Anchor
    base: Tensor
    specialized: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class JointPatch:
    """A set of components patched together, measured.

    Attributes:
        patch: Addresses.
        recipient: Who received weights.
        recovery: Share of the anchor's gap that the patched model stands above the base, with a bootstrap 95 %
            interval over queries. 0: the base's readout; 1: the specialized model's, whoever received weights.
        kl: KL(specialized || patched) on the specialized model's responses, nats to a token, with Student's interval.
        kl_recovery: 1 - mean KL over the base's mean KL: 0, as far from the specialized model as the base; 1, equal.
        passed: Share of answers that follow their instruction and do not repeat themselves, Wilson's interval; None
            where nothing was generated.
        n_passed: How many; None likewise.
        n_prompts: Prompts.
    """

    patch: tuple[str, ...]
    recipient: Recipient
    recovery: Interval
    kl: Interval
    kl_recovery: float
    passed: Interval | None
    n_passed: int | None
    n_prompts: int


def read_references(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Anchor,
    *,
    n_response_tokens: int = N_RESPONSE_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> References:
    """Run both models once, untouched.

    Args:
        pair: The two models; with a tokenizer, since the specialized one answers.
        prompts: All of them are used.
        anchor: What to read.
        n_response_tokens: Most tokens of the responses that output is compared on. Memory: prompts x tokens x
            vocabulary x 4 bytes.
        batch_tokens: Most tokens of one forward pass.

    Raises:
        PromptError: no tokenizer.
    """
    if pair.tokenizer is None:
        raise PromptError("joint patches are compared on generated responses: give the pair a tokenizer.")
    token_ids = prompts.without_responses().tokenize(pair.tokenizer).with_instruction
    with pair.materialized() as model:
        answers = generate(model, pair.tokenizer, token_ids, max_new_tokens=n_response_tokens)
    responses = tuple(answer.ids for answer in answers)
    base, specialized = (
        readouts(model, pair, prompts, anchor, batch_tokens=batch_tokens) for model in (pair.base, pair.specialized)
    )
    log_probs = tuple(forced_log_probs(pair.specialized, token_ids, responses, batch_tokens=batch_tokens))
    own = forced_log_probs(pair.base, token_ids, responses, batch_tokens=batch_tokens)
    return References(
        prompts=prompts,
        token_ids=token_ids,
        responses=responses,
        log_probs=log_probs,
        base_kl=_divergences(log_probs, own),
        anchor=anchor,
        base=base,
        specialized=specialized,
    )


def measure_patch(
    pair: ModelPair,
    references: References,
    patch: str | Iterable[str | Component],
    *,
    recipient: Recipient = "base",
    answering: Answering | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
) -> JointPatch:
    """Patch a set of components for real, over any layers, and measure readout, output and, if wanted, behaviour.

    Args:
        pair: The two models.
        references: From `read_references` for the same pair.
        patch: Components, addresses or units, as for `patched`.
        recipient: `base` receives specialized weights (sufficiency), `specialized` receives base ones (necessity).
        answering: How answers are generated and judged; None: nothing is generated.
        batch_tokens: Most tokens of one forward pass.
        seed: Of the bootstrap.

    Raises:
        ComponentError: an address or unit that this architecture does not have, or an unknown recipient.
        NoGapError: the two models do not differ measurably in the readout.
    """
    prompts, queries = references.prompts, [row.query for row in references.prompts]
    members = list(patch) if not isinstance(patch, str) else patch
    with patched(pair, members, recipient=recipient) as model:
        readout = readouts(model, pair, prompts, references.anchor, batch_tokens=batch_tokens)
        log_probs = forced_log_probs(model, references.token_ids, references.responses, batch_tokens=batch_tokens)
        divergence = _divergences(references.log_probs, log_probs)
        n_passed = None
        if answering is not None:
            bench = Bench(pair=pair, prompts=prompts, positions=(-1,), answering=answering)
            n_passed = int(bench.judge(model, [(place, None) for place in range(len(prompts))]).passed.sum())
    gap = (references.specialized - references.base).numpy()
    share = recovery((readout - references.base).numpy()[None], gap, groups=queries, seed=seed)
    return JointPatch(
        patch=tuple(str(member) for member in (components(pair.architecture, members) if members else ())),
        recipient=recipient,
        recovery=Interval(estimate=float(share.ratio[0]), low=float(share.low[0]), high=float(share.high[0])),
        kl=mean_interval(divergence, groups=queries),
        kl_recovery=1 - float(divergence.mean() / references.base_kl.mean()),
        passed=pass_rate(n_passed, len(prompts)) if n_passed is not None else None,
        n_passed=n_passed,
        n_prompts=len(prompts),
    )


def _divergences(reference: Iterable[Tensor], found: Iterable[Tensor]) -> Floats:
    """KL(reference || found) for each prompt, mean over its tokens, in nats; in float64, being a small difference."""
    return np.array(
        [
            float((own.double().exp() * (own.double() - other.double())).sum(dim=-1).mean())
            for own, other in zip(reference, found, strict=True)
        ]
    )


def rank(effects: Effects) -> tuple[Component, ...]:
    """The measured components, the one with the highest mean effect in the gap's direction first.

    Units that enclose another measured one are left out (blocks where their MLPs are there), so that no weight is
    patched twice and the sets grow by what their number says.
    """
    order = (orientation(effects.gap.numpy()) * effects.per_prompt.mean(dim=1)).argsort(descending=True, stable=True)
    units = {member.unit for member in effects.components}
    ranked = (effects.components[place] for place in order.tolist())
    return tuple(member for member in ranked if not any(encloses(member.unit, unit) for unit in units))


def random_like(chosen: Sequence[Component], pool: Sequence[Component], *, seed: int) -> tuple[Component, ...]:
    """As many components of each unit as were chosen, drawn from the pool: so of equal size in parameters too."""
    draw = random.Random(seed)  # noqa: S311  no secret
    by_unit: Mapping[str, list[Component]] = {
        unit: [member for member in pool if member.unit == unit] for unit in dict.fromkeys(one.unit for one in chosen)
    }
    return tuple(
        member
        for unit, members in by_unit.items()
        for member in draw.sample(members, sum(one.unit == unit for one in chosen))
    )


def layer_matched_like(chosen: Sequence[Component], pool: Sequence[Component], *, seed: int) -> tuple[Component, ...]:
    """As many components of each unit in every layer as were chosen, drawn from the others of the pool.

    Where a layer has fewer others of that unit than it needs, the rest is drawn from those that are left in the
    nearest layers, and only when no others are left anywhere from the chosen themselves. So the counts of every unit
    are equal always, and those of every layer too if at most half of each layer's were chosen.

    Args:
        chosen: What is to be matched, each once.
        pool: All components that may be drawn; `chosen` are among them.
        seed: Of the draws.

    Source:
        Our choice: it tells a ranking that knows components from one that only knows depths.
    """
    draw = random.Random(seed)  # noqa: S311  no secret
    top = set(chosen)
    others: dict[tuple[str, int], list[Component]] = {}
    for one in pool:
        if one not in top:
            others.setdefault((one.unit, _depth(one)), []).append(one)
    needed = Counter((one.unit, _depth(one)) for one in chosen)
    drawn: dict[Component, None] = {}
    for place, count in needed.items():
        own = others.get(place, [])
        found = draw.sample(own, min(count, len(own)))
        drawn |= dict.fromkeys(found)
        needed[place] -= len(found)
    for (unit, depth), count in (+needed).items():  # what is still needed
        left = [one for one in pool if one.unit == unit and one not in drawn]
        draw.shuffle(left)
        left.sort(key=lambda one: (one in top, abs(_depth(one) - depth)))
        drawn |= dict.fromkeys(left[:count])
    return tuple(drawn)


def _depth(component: Component) -> int:
    """Its layer; the embedding stands before the first."""
    return -1 if component.layer is None else component.layer


def by_difference(pair: ModelPair, pool: Sequence[Component]) -> tuple[Component, ...]:
    """The components of a pool, the one whose weights moved farthest first (norm of specialized minus base)."""
    moved = weight_differences(pair, pool)
    return tuple(one.component for one in sorted(moved, key=lambda one: -one.norm))


def by_effects(
    pool: Sequence[Component], effects: Mapping[str, Sequence[float]], *, sign: int = 1, seed: int = 0
) -> tuple[Component, ...]:
    """The components of a pool, the one with the highest mean effect first.

    Args:
        pool: In any order.
        effects: Address -> effects on each prompt. Components that it lacks come last, in random order, so that no
            other ranking enters through them.
        sign: 1 or -1: the direction of the gap.
        seed: Of that order.
    """
    lacking = [one for one in pool if str(one) not in effects]
    random.Random(seed).shuffle(lacking)  # noqa: S311  no secret
    known = [one for one in pool if str(one) in effects]
    return (*sorted(known, key=lambda one: -sign * float(np.mean(effects[str(one)]))), *lacking)


def leading_like(chosen: Sequence[Component], ranked: Sequence[Component]) -> tuple[Component, ...]:
    """The first of each unit in another ranking, as many as were chosen of it: so of equal size in parameters too."""
    counts = Counter(one.unit for one in chosen)
    return tuple(one for unit, count in counts.items() for one in [own for own in ranked if own.unit == unit][:count])
