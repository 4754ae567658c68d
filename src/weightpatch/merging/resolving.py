"""From experts and their runs to coefficients: what each policy needs is read, nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.component import Component, components
from weightpatch.errors import MergeError
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.experts import Expert, anchors_of, doubts_of, open_run, read_scores, read_sources, units_of
from weightpatch.merging.inputs import Inputs, versions
from weightpatch.merging.learning import Blend, Bookmark, Step, Training, Weights, learn
from weightpatch.merging.policies import SHARE, TEMPERATURE, Policy, check_numbers, only, weigh
from weightpatch.merging.restoring import Aim, Weighing, aim, restoring, restoring_states
from weightpatch.residuals import BATCH_TOKENS

if TYPE_CHECKING:
    from weightpatch.run import Run

Learned = Literal["anchors", "streams", "outputs", "streams+outputs"]
STATES: Mapping[Learned, Weighing] = {
    "streams": Weighing(streams=1.0),
    "outputs": Weighing(outputs=1.0),
    "streams+outputs": Weighing(streams=10.0, outputs=1.0),
}
"""Policy -> what of the experts' states it restores. Ten was chosen on small experts (LOG.md, 2026-11-28)."""
LEARNED_UNITS = "heads,kvs,neurons"
"""What learning gives coefficients to by default: finer than that nothing is, and coarser ones restore less."""
Choice = Literal["uniform", "soft", "top", "owner", "sources", Learned]
"""`uniform`: every coefficient is the expert's weight (task arithmetic); `soft`, `top`, `owner`: by ranks of recovery
(`policies.weigh`); `sources`: the components with this role; `anchors`: learned, so that all anchors are restored;
`streams`, `outputs`, `streams+outputs`: learned, so that residual streams, or the next token, or both, are restored
where anchors are read."""
Rest = Literal["task-arithmetic", "base"]
"""What becomes of everything that no component with a coefficient owns."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How coefficients are found.

    Attributes:
        policy: The way.
        units: Units that get coefficients; None: those that all runs measured, and `LEARNED_UNITS` for what is learned.
        rest: What becomes of the rest.
        temperature: Of `soft`.
        share: Of `top`.
        training: Of what is learned: these policies start from the experts' weights and stay near them.
    """

    policy: Choice = "streams+outputs"
    units: str | None = None
    rest: Rest = "task-arithmetic"
    temperature: float = TEMPERATURE
    share: float = SHARE
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Check names and numbers.

        Raises:
            MergeError: an unknown name, a number out of range, or answers for anchors, which are not read along them.
        """
        check_numbers(self.temperature, self.share)
        for name, value, known in (("policy", self.policy, Choice), ("rest", self.rest, Rest)):
            if value not in get_args(known):
                raise MergeError(f"unknown {name} {value!r} of a merge. Choose one of {', '.join(get_args(known))}.")
        if self.policy == "anchors" and self.training.answer_tokens:
            raise MergeError(
                "anchors are restored at their own positions, not along answers. Leave answer_tokens out, or choose "
                f"another policy: {', '.join(STATES)}."
            )


@dataclass(frozen=True, kw_only=True)
class Restored:
    """How far one anchor is restored, as shares of its gap, on prompts that coefficients were not learned from.

    Attributes:
        expert: Its name.
        task: Of its run.
        before: With the coefficients that learning started from.
        after: With those that were learned.
    """

    expert: str
    task: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Resolved:
    """What a rule came to.

    Attributes:
        coefficients: Of every parameter.
        weights: Expert -> component -> coefficient; empty where components play no part.
        unscored: Expert -> components with coefficients that its run says nothing of.
        restored: Every anchor with a gap on held-out prompts, where coefficients were learned.
        doubts: Expert -> task of its run that has no part in this, or a doubtful one -> why.
    """

    coefficients: Coefficients
    weights: Mapping[str, Mapping[Component, float]] = field(default_factory=dict)
    unscored: Mapping[str, tuple[Component, ...]] = field(default_factory=dict)
    restored: tuple[Restored, ...] = ()
    doubts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def resolve(
    inputs: Inputs,
    experts: Mapping[str, Expert],
    rule: Rule,
    *,
    batch_tokens: int = BATCH_TOKENS,
    bookmark: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Resolved:
    """Find the coefficients of a merge.

    Args:
        inputs: Base and experts.
        experts: The same experts, with their runs.
        rule: How.
        batch_tokens: Of what is learned: most tokens of one forward pass.
        bookmark: Of what is learned: a file that keeps every step, for the same call to go on from.
        on_step: Of what is learned: called with every step.

    Raises:
        MergeError: a run that is missing, of other models, or without what the policy needs, or a bookmark of another
            merge.
        ComponentError: unknown units.
    """
    weights = {name: expert.weight for name, expert in experts.items()}
    if rule.policy == "uniform":
        return Resolved(coefficients=Coefficients.uniform(inputs.architecture, weights))
    rest = weights if rule.rest == "task-arithmetic" else dict.fromkeys(weights, 0.0)
    prints = inputs.fingerprints()
    runs = {name: open_run(name, expert, inputs.base.reference, prints) for name, expert in experts.items()}
    is_learned = rule.policy in get_args(Learned)
    doubts = {name: doubts_of(run, learned=is_learned) for name, run in runs.items()}
    if is_learned:
        found = _learned(
            inputs,
            runs,
            components(inputs.architecture, rule.units or LEARNED_UNITS),
            what=cast("Learned", rule.policy),
            training=rule.training,
            weights=weights,
            rest=rest,
            batch_tokens=batch_tokens,
            bookmark=bookmark,
            on_step=on_step,
        )
        return replace(found, doubts=doubts)
    chosen = components(inputs.architecture, rule.units or units_of(runs))
    scores = {name: read_scores(run, set(chosen)) for name, run in runs.items()}
    if rule.policy == "sources":
        shares = only(
            {name: read_sources(run) for name, run in runs.items()}, {name: [*own] for name, own in scores.items()}
        )
    else:
        shares = weigh(scores, cast("Policy", rule.policy), temperature=rule.temperature, share=rule.share)
    scaled = {name: {one: weights[name] * share for one, share in own.items()} for name, own in shares.items()}
    return Resolved(
        coefficients=Coefficients.by_component(inputs.architecture, scaled, rest=rest),
        weights=scaled,
        unscored={name: tuple(one for one in chosen if one not in own) for name, own in scaled.items()},
        doubts=doubts,
    )


def _learned(
    inputs: Inputs,
    runs: Mapping[str, Run],
    chosen: Sequence[Component],
    *,
    what: Learned,
    training: Training,
    weights: Mapping[str, float],
    rest: Mapping[str, float],
    batch_tokens: int,
    bookmark: Path | None,
    on_step: Callable[[Step], None] | None,
) -> Resolved:
    model, learned_from, held_out = read_aims(inputs, runs, answer_tokens=training.answer_tokens)
    changes = {name: {one: inputs.change(name, one).to(model.device) for one in inputs.ours.shapes} for name in runs}
    blend = Blend.of(model, changes, chosen)
    start = blend.table({name: dict.fromkeys(chosen, weight) for name, weight in weights.items()}, rest)
    if what == "anchors":
        losses = restoring(model, learned_from, batch_tokens=batch_tokens)
    else:
        losses = restoring_states(
            model,
            learned_from,
            lambda name: {one: blend.base[one] + own for one, own in changes[name].items()},
            STATES[what],
            batch_tokens=batch_tokens,
        )
    kept = None
    if bookmark:
        key = _key(inputs, learned_from, chosen, start, what=what, training=training, batch_tokens=batch_tokens)
        kept = Bookmark(file=bookmark, key=key)
    behind = kept.read() if kept else None
    table = behind.table.to(start.device) if behind else start
    for step in learn(blend, losses, start, training, behind=behind):
        table = step.table
        if kept:
            kept.write(step)
        if on_step:
            on_step(step)
    before, after = (_recoveries(model, held_out, blend.weights(one), batch_tokens) for one in (start, table))
    found = blend.by_component(table)
    return Resolved(
        coefficients=Coefficients.by_component(inputs.architecture, found, rest=rest),
        weights=found,
        restored=tuple(
            Restored(expert=one.expert, task=one.task, before=first, after=last)
            for one, first, last in zip(held_out, before, after, strict=True)
        ),
    )


def _key(
    inputs: Inputs,
    aims: Sequence[Aim],
    chosen: Sequence[Component],
    start: Tensor,
    *,
    what: Learned,
    training: Training,
    batch_tokens: int,
) -> str:
    """Of everything that decides what is learned."""
    digest = hashlib.sha256(start.cpu().numpy().tobytes())
    for one in aims:
        digest.update(one.anchor.direction.cpu().numpy().tobytes())
    settings = {
        "what": what,
        "components": [str(one) for one in chosen],
        "training": asdict(training),
        "batch_tokens": batch_tokens,
        "files": inputs.fingerprints(),
        "versions": versions(),
        "aims": [
            (one.expert, one.task, one.anchor.layer, one.anchor.positions, one.token_ids, one.answers) for one in aims
        ],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def read_aims(
    inputs: Inputs, runs: Mapping[str, Run], *, answer_tokens: int = 0
) -> tuple[PreTrainedModel, list[Aim], list[Aim]]:
    """The base, and every anchor of every expert's run on two splits: to learn from, and held out.

    Learned from are prompts that effects were measured on, held out those of the split `validate`, where the expert
    reads higher on them than the base; anchors were fitted on others. Those to learn from come with so many tokens of
    the expert's answers.

    Raises:
        MergeError: a run without anchors, answers without a tokenizer, or a base that lies on several devices.
    """
    model = inputs.load_base()
    if len(devices := sorted({str(one.device) for one in model.parameters()})) > 1:
        raise MergeError(
            f"coefficients are learned on one device, and the base lies on {', '.join(devices)}. Name one that has "
            f"room for {len(runs) + 3} models: --device-map cpu, say."
        )
    learned_from: list[Aim] = []
    held_out: list[Aim] = []
    for name, run in runs.items():
        pair = inputs.pair(name, model)
        for task, anchor in anchors_of(run).items():
            prompts = run.prompts().of_task(task)
            for split, aims, n in (("localize", learned_from, answer_tokens), ("validate", held_out, 0)):
                aims.append(aim(pair, prompts.split(split), anchor, expert=name, task=task, answer_tokens=n))
    return model, learned_from, [one for one in held_out if one.gap > 0]


def _recoveries(model: PreTrainedModel, aims: Iterable[Aim], weights: Weights, batch_tokens: int) -> list[float]:
    return [one.recovery(model, weights, batch_tokens=batch_tokens) for one in aims]
