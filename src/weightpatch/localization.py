"""One entry for every method of localization: which parameters move the readout, and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor

from weightpatch import coalitions
from weightpatch.anchor import Anchor
from weightpatch.component import Component, components
from weightpatch.effects import ComponentEffect, Effects
from weightpatch.engine import Measured, suffix, swap
from weightpatch.engine.activations import Source, Where, check_outputs
from weightpatch.engine.deliveries import Deliveries
from weightpatch.engine.walking import walking
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.estimation import Estimates, Estimation, estimate_effects
from weightpatch.flows import Flow
from weightpatch.outputs import Divergence, Margin
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target, check_target, contrasted, inputs, reference
from weightpatch.residuals import BATCH_TOKENS, tokens_per_call
from weightpatch.statistics import orientation

Method = Literal["exact", "first-order", "activation", "necessity", "shapley", "addition", "removal"]
Engine = Literal["suffix", "swap"]

_IN_COMPANY: tuple[Method, ...] = ("shapley", "addition", "removal")
"""Methods that patch sets of components."""
ALL_TARGETS = "all"
"""Stands for everything that writes to the residual stream: the embedding, heads, biases of attentions, and MLPs."""


def localize(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    *,
    units: str | Sequence[str | Component] = "heads,mlps",
    method: Method = "exact",
    engine: Engine = "suffix",
    estimation: Estimation | None = None,
    budget: int | None = None,
    seed: int = 0,
    at: Where = "all",
    targets: str | Sequence[str | Component] = (),
    batch_tokens: int | None = None,
    on_effect: Callable[[ComponentEffect], None] | None = None,
) -> Effects:
    """Patch each component in turn and measure what the anchor's readout does, or estimate it.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read: an anchor, or what the output says (`weightpatch.outputs`: `Margin`, `Divergence`).
        units: Units (`heads`, `kvs`, `mlps`, ...) and addresses (`L5.N812`), in one string with commas or a sequence.
        method: `exact`, weight patching: the base receives the component's specialized weights. `first-order`: the same
            for all components at once, from one forward and one backward pass; see `weightpatch.screening` for how good
            that is on a pair. `activation`, activation patching: the base receives what the component puts out in the
            specialized model's own run on the same prompt; its weights stay. `necessity`: the specialized model
            receives the component's base weights (all of its weights are in memory meanwhile). The other three patch
            sets of components' weights and say what each is worth in company (`weightpatch.coalitions`): `shapley`,
            Shapley values; `addition` and `removal`, greedy search from the base up or from all components down.
        engine: `suffix` (fast) or `swap` (writes weights and runs the whole model; the oracle), for weights.
        estimation: How to estimate, for `first-order` (None: by outputs); with `activation` and `necessity`: estimate
            them too instead of patching.
        budget: Most sets that are patched for `shapley`, `addition` and `removal`; None: ten for every component.
        seed: Of the orders that `shapley` draws.
        at: Where activations are patched: at `all` tokens, or at the `readouts`, the anchor's positions.
        targets: Whose writes along the anchor's direction are read while the patched model runs: units and addresses,
            or `"all"`, which is everything that writes. Costs no further forward pass. See `Effects.per_target`.
        batch_tokens: Most tokens of one forward call; None: as many as suit the model and its device. Changes speed
            and memory, not the numbers beyond rounding.
        on_effect: Called with each component's effects as they are measured, for progress.

    Returns:
        The effects, in the order of layers and units.

    Raises:
        ComponentError: an unknown unit, address or method, or a component without an output to patch.
        AnchorError: the anchor does not fit the pair, nothing asked for lies below it, or it is no projection but
            targets are asked for.
        PromptError: text without a tokenizer, or tokens outside the vocabulary.

    Source:
        Weight patching and its activation counterpart on the same anchor: Sun et al. 2026 (arXiv:2604.13694), in our
        reading. Necessity with exchanged roles, targets, and what counts as a component's output are our choice.
    """
    if isinstance(anchor, Anchor) and anchor.report is not None and not anchor.report.stable:
        failed = ", ".join(gate.name for gate in anchor.report.gates if not gate.passed)
        warnings.warn(f"the anchor is unstable: it failed {failed}; recoveries on it may mean little", stacklevel=2)
    below, past = plan(pair, anchor, units)
    estimated = estimation or (Estimation() if method == "first-order" else None)
    read = targets_of(pair, anchor, targets)
    per_span: Mapping[str, Tensor] = {}
    per_target = torch.zeros(len(below), 0, len(prompts), dtype=torch.float64)
    if estimated:
        _check(pair, below, anchor, method=method, engine=engine, estimation=estimated, at=at, targets=read)
        estimates = _estimate(
            pair, prompts, anchor, below, method=method, how=estimated, at=at, batch_tokens=batch_tokens
        )
        per_prompt, per_span = estimates.per_prompt, estimates.per_span
    else:
        found: list[ComponentEffect] = []
        for effect in sweep(
            pair,
            prompts,
            anchor,
            below,
            method=method,
            engine=engine,
            budget=budget,
            seed=seed,
            at=at,
            targets=read,
            batch_tokens=batch_tokens,
        ):
            found.append(effect)
            if on_effect:
                on_effect(effect)
        per_prompt = torch.stack([effect.per_prompt for effect in found])
        if read:
            per_target = torch.stack([effect.per_target for effect in found if effect.per_target is not None])
    base, specialized = reference(pair, prompts, anchor, batch_tokens=batch_tokens or BATCH_TOKENS)
    return Effects(
        components=below,
        per_prompt=per_prompt,
        base=base,
        specialized=specialized,
        prompt_ids=tuple(row.id for row in prompts),
        queries=tuple(row.query for row in prompts),
        past_anchor=past,
        anchor=anchor,
        method=method,
        engine=estimated.name if estimated else engine,
        per_span=per_span,
        targets=read,
        per_target=per_target,
        delivered=deliver(pair, prompts, anchor, read, batch_tokens=batch_tokens),
    )


def plan(
    pair: ModelPair, anchor: Target, units: str | Sequence[str | Component]
) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """What a sweep would patch: components that can reach the anchor, and those at or past it, which cannot.

    Raises:
        ComponentError: an unknown unit or address.
        AnchorError: the anchor does not fit the pair, or nothing lies below it.
    """
    if isinstance(anchor, Anchor):
        anchor.check(pair)
    wanted = components(pair.architecture, units)
    below = tuple(component for component in wanted if reaches(component, anchor))
    past = tuple(component for component in wanted if not reaches(component, anchor))
    if not below:
        raise AnchorError(
            f"nothing to measure: all {len(wanted)} components of {units} lie at or past the anchor (layer "
            f"{anchor.layer}), where their effect on it is 0 by construction. Name components below it."
        )
    return below, past


def reaches(component: Component, anchor: Target) -> bool:
    """Whether what a component writes, or one member of a set, can reach what is read."""
    if component.members:
        return any(reaches(member, anchor) for member in component.members)
    if isinstance(anchor, Margin | Divergence):
        return True
    return component.address == "embed" if component.layer is None else component.layer < anchor.layer


def targets_of(pair: ModelPair, anchor: Target, targets: str | Sequence[str | Component]) -> tuple[Component, ...]:
    """The targets that some units and addresses name, as far as they lie below the anchor; none for nothing.

    Raises:
        ComponentError: an unknown unit or address, or one that writes nothing of its own.
        AnchorError: a readout that is not the sum of writes: a cosine, or of the output.
    """
    if not targets:
        return ()
    if not isinstance(anchor, Anchor) or anchor.readout == "cosine":
        raise AnchorError(
            "only a projection is the sum of what components write along a direction, so only an anchor with the "
            "readout projection or contrast has targets. Choose such a readout, or leave targets out."
        )
    if targets == ALL_TARGETS:
        named = components(pair.architecture, "embed,heads,rests,mlps")
        named = tuple(one for one in named if not one.address.endswith(".mlp.rest"))  # an MLP's write holds its bias
    else:
        named = components(pair.architecture, targets)
    Deliveries(pair=pair, targets=named, direction=anchor.direction)
    return tuple(one for one in named if reaches(one, anchor))


def deliver(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    targets: Sequence[Component],
    *,
    batch_tokens: int | None = None,
) -> Tensor:
    """What targets write along the anchor's direction in the base and in the specialized model: `(2, target, prompt)`.

    Args:
        pair: The two models.
        prompts: All of them are used.
        anchor: Where it is read, and along what.
        targets: From `targets_of`.
        batch_tokens: As in `localize`.
    """
    if not targets or not isinstance(anchor, Anchor):
        return torch.zeros(2, 0, len(prompts), dtype=torch.float64)
    found = suffix.delivered(
        pair,
        inputs(pair, prompts, anchor),
        anchor,
        Deliveries(pair=pair, targets=tuple(targets), direction=anchor.direction),
        batch_tokens=batch_tokens or tokens_per_call(pair.base),
    )
    return contrasted(torch.stack(found), anchor)


def sweep(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    below: Sequence[Component],
    *,
    method: Method = "exact",
    engine: Engine = "suffix",
    estimation: Estimation | None = None,
    budget: int | None = None,
    seed: int = 0,
    at: Where = "all",
    targets: Sequence[Component] = (),
    batch_tokens: int | None = None,
    skip: Set[Component] = frozenset(),
) -> Iterator[ComponentEffect]:
    """The effects of components below the anchor one after another; what `localize` collects and a run records.

    Args:
        pair: The two models.
        prompts: All of them are used, with their instruction.
        anchor: What to read.
        below: What to patch, ordered by layer, as `plan` returns it.
        method: As in `localize`.
        engine: As in `localize`.
        estimation: As in `localize`.
        budget: As in `localize`.
        seed: As in `localize`.
        at: As in `localize`.
        targets: From `targets_of`.
        batch_tokens: As in `localize`.
        skip: Components already known. They may come again where they share a forward call with others.
    """
    estimation = estimation or (Estimation() if method == "first-order" else None)
    _check(pair, below, anchor, method=method, engine=engine, estimation=estimation, at=at, targets=targets)
    if estimation:
        estimates = _estimate(
            pair, prompts, anchor, below, method=method, how=estimation, at=at, batch_tokens=batch_tokens
        )
        for component, effects in zip(below, estimates.per_prompt, strict=True):
            yield ComponentEffect(component=component, per_prompt=effects)
        return
    check_target(pair, prompts, anchor)
    if method in _IN_COMPANY:
        values = _in_company(
            pair,
            prompts,
            anchor,
            below,
            method=method,
            budget=coalitions.BUDGET_PER_PLAYER * len(below) if budget is None else budget,
            seed=seed,
            batch_tokens=batch_tokens,
        )
        for component, effects in zip(below, values, strict=True):
            yield ComponentEffect(component=component, per_prompt=effects)
        return
    token_ids = inputs(pair, prompts, anchor)
    width = batch_tokens or (tokens_per_call(pair.base) if engine == "suffix" else BATCH_TOKENS)
    with ExitStack() as stack:
        recipient = stack.enter_context(pair.exchanged()) if method == "necessity" else pair
        found: Iterator[Measured]
        if engine == "swap":
            found = swap.sweep(recipient, token_ids, anchor, below, batch_tokens=width, skip=skip)
        else:
            deliveries = None
            if targets and isinstance(anchor, Anchor):
                deliveries = Deliveries(pair=recipient, targets=tuple(targets), direction=anchor.direction)
            found = suffix.sweep(
                recipient,
                token_ids,
                anchor,
                below,
                batch_tokens=width,
                skip=skip,
                source="activations" if method == "activation" else "weights",
                where=at,
                deliveries=deliveries,
            )
        sign = -1 if method == "necessity" else 1
        for measured in found:
            change = sign * (measured.readout - measured.base)
            delivered = None if measured.delivered is None else contrasted(sign * measured.delivered, anchor)
            yield ComponentEffect(
                component=measured.component, per_prompt=contrasted(change, anchor), per_target=delivered
            )


def _in_company(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    below: Sequence[Component],
    *,
    method: Method,
    budget: int,
    seed: int,
    batch_tokens: int | None,
) -> Tensor:
    """Values of components from joint patches of sets of them, shape `(component, prompt)`."""
    if isinstance(anchor, Flow):
        raise ComponentError(f"{method} reads an anchor or the output, not what single components write.")
    width = batch_tokens or tokens_per_call(pair.base)
    with walking(pair, inputs(pair, prompts, anchor), anchor, below, batch_tokens=width) as read:
        nobody = read(frozenset())

        def measure(sets: Sequence[frozenset[int]]) -> Tensor:
            return torch.stack([contrasted(read(own) - nobody, anchor) for own in sets])

        if method == "shapley":
            return coalitions.shapley(measure, len(below), budget=budget, seed=seed)
        base, specialized = reference(pair, prompts, anchor, batch_tokens=batch_tokens or BATCH_TOKENS)
        search = coalitions.addition if method == "addition" else coalitions.removal
        return search(measure, len(below), budget=budget, sign=orientation((specialized - base).numpy()))


def _estimate(
    pair: ModelPair,
    prompts: ContrastPrompts,
    anchor: Target,
    below: Sequence[Component],
    *,
    method: Method,
    how: Estimation,
    at: Where,
    batch_tokens: int | None,
) -> Estimates:
    source: Source = "activations" if method == "activation" else "weights"
    if method != "necessity":
        return estimate_effects(pair, prompts, anchor, below, how, source=source, where=at, batch_tokens=batch_tokens)
    with pair.exchanged() as recipient:
        found = estimate_effects(recipient, prompts, anchor, below, how, batch_tokens=batch_tokens)
    sign = 1 if how.grad_drop else -1
    return Estimates(
        per_prompt=sign * found.per_prompt,
        per_span={span: sign * values for span, values in found.per_span.items()},
    )


def _check(
    pair: ModelPair,
    below: Sequence[Component],
    anchor: Target,
    *,
    method: str,
    engine: str,
    estimation: Estimation | None,
    at: str,
    targets: Sequence[Component],
) -> None:
    """Raise unless the method can measure these components with this engine."""
    if method not in get_args(Method):
        raise ComponentError(f"unknown method {method!r}. Choose one of {', '.join(get_args(Method))}.")
    if engine not in get_args(Engine):
        raise ComponentError(f"unknown engine {engine!r}. Choose one of {', '.join(get_args(Engine))}.")
    if engine == "swap" and (method == "activation" or targets):
        raise ComponentError(
            'engine="swap" writes weights and reads the anchor, no more: activations and targets need engine="suffix".'
        )
    if estimation and method == "exact":
        raise ComponentError('exact effects are not estimated: leave estimation out, or use method="first-order".')
    if (estimation or targets) and method in _IN_COMPANY:
        raise ComponentError(f"{method} patches sets of components: leave estimation and targets out.")
    if estimation and targets:
        raise ComponentError("an estimate has no targets: they are read while a patched model runs. Leave one of both.")
    if estimation and method == "activation" and estimation.approximation != "outputs":
        raise ComponentError(
            f"activations are estimated by outputs, not by {estimation.approximation}: their weights stay as they are."
        )
    if at not in get_args(Where):
        raise ComponentError(f"activations are patched at all tokens or at the readouts, not at {at!r}.")
    if at != "all" and method != "activation":
        raise ComponentError(f"at={at!r} says where activations are patched: weights act at all tokens. Leave it out.")
    if method == "activation":
        check_outputs(below)
    if estimation or engine == "suffix":
        _check_head(pair, below, anchor)


def _check_head(pair: ModelPair, below: Sequence[Component], anchor: Target) -> None:
    """Raise for components behind the last layer, where what is read is read through them."""
    if not isinstance(anchor, Margin | Divergence):
        return
    tied = not pair.architecture.parameters_under(pair.architecture.family.unembed)
    head = {"norm", "unembed", *(("embed",) if tied else ())}
    if named := [str(one) for one in below if head & {part.address for part in one.members or (one,)}]:
        raise ComponentError(
            f"{', '.join(named[:4])}: the output is read through the base's norm and head, which only "
            f'engine="swap" patches. Leave {"it" if len(named) == 1 else "them"} out, or use that.'
        )
