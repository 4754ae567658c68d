"""The stage `validate`: joint patches of the leading components of a run, more and more of them, beside controls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from weightpatch.behaviour import MAX_NEW_TOKENS, Answering, can_judge
from weightpatch.component import Component, encloses
from weightpatch.engine.activations import has_output
from weightpatch.errors import NoGapError, RunError
from weightpatch.files import file_digest, write_whole
from weightpatch.jsonable import known
from weightpatch.pair import ModelPair
from weightpatch.patch import Recipient
from weightpatch.prompts import ContrastPrompts
from weightpatch.recording import read_effects
from weightpatch.robustness import robustness
from weightpatch.run import Progress, Run
from weightpatch.stability import areas
from weightpatch.statistics import check_gap, orientation
from weightpatch.validation import (
    SHARES,
    JointPatch,
    by_difference,
    by_effects,
    layer_matched_like,
    leading_like,
    measure_patch,
    random_like,
    rank,
    read_references,
)

CONTROLS = ("random", "layer-matched", "largest differences", "activation", "bottom")
"""Sets beside the leading ones, each with as many components of every unit."""

ANSWERED = ("top", "random 1")
"""Sets that are always answered with, unless none is: answers are by far the dearest."""


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """What a validation measures.

    Attributes:
        recipients: `base`: is it enough to patch these; `specialized`: is it lost without them.
        shares: Shares of the measured components that are patched together, the leading ones first.
        ranking: Whose order: of the run's `effects`, or of its `screen`: exact where it patched, else estimated.
        controls: Sets measured beside each, out of `CONTROLS`, with as many components of every unit as it has:
            `random` ones; `layer-matched`, random with as many in every layer too; those with the `largest
            differences` of weights; the leading ones by `activation` patching, where the run has its effects; those
            at the `bottom` of the same order.
        n_random: How many of each random kind.
        n_prompts: Prompts of the split `validate`, at most.
        answers: With which sets answers are generated and judged, where the prompts name a checker: `all`, `top` (the
            leading ones and the first random ones), or `none`.
        max_new_tokens: Most tokens of an answer.

    Raises:
        RunError: an unknown control.
    """

    recipients: tuple[Recipient, ...] = ("base", "specialized")
    shares: tuple[float, ...] = SHARES
    ranking: Literal["effects", "screen"] = "effects"
    controls: tuple[str, ...] = CONTROLS
    n_random: int = 1
    n_prompts: int = 24
    answers: Literal["all", "top", "none"] = "top"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        if unknown := [name for name in self.controls if name not in CONTROLS]:
            raise RunError(f"unknown controls: {', '.join(map(repr, unknown))}. Name some of {', '.join(CONTROLS)}.")


@dataclass(frozen=True, kw_only=True)
class _Point:
    recipient: Recipient
    arm: str
    patch: tuple[Component, ...]
    n_pool: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.recipient, self.arm, len(self.patch)


def validate(run: Run, pair: ModelPair, settings: CurveSettings, *, tasks: Sequence[str] = ()) -> Iterator[Progress]:
    """Measure the curves of every task that has effects, and write them to `validation.json` point by point.

    Goes on where an earlier call with the same settings stopped. When all points of a task are there, its record gets
    `areas`, those of each curve f over the share k of components by `stability.areas`, and `stability`, that of the
    run's ranking by `robustness` (null for a run that only has a screening). For the recipient `base`, f is what was
    recovered. For `specialized`, f is necessity, what was lost: 1 - recovery, since a `JointPatch` has recovery 1 at
    the specialized model whoever received weights. So f is 0 with nothing patched either way, and 1 when the patched
    components make the recipient read like the donor.

    Args:
        run: The run.
        pair: The two models.
        settings: What to measure.
        tasks: Which tasks; none named: all.

    Raises:
        RunError: a validation with other settings or of other effects is there, or effects are missing.
        NoGapError: in some task the models do not differ on the prompts of the split; the others are done first.
    """
    failures = []
    for task in run.chosen(tasks):
        if run.failure(task):
            continue
        if settings.ranking == "effects":
            run.check_measured(task)
        file = run.folder(task) / "validation.json"
        found = run.validation(task)
        wanted = _settings(run, task, settings)
        _check_same(file, found.get("settings", wanted), wanted)
        record: dict[str, Any] = {"settings": wanted, "points": found["points"]}
        ranked = rank(run.effects(task)) if settings.ranking == "effects" else _screened(run, task)
        orders = _orders(run, pair, task, ranked, settings)
        points = _plan(ranked, orders, settings, seed=run.config.seed)
        known = {(point["recipient"], point["arm"], point["k"]): set(point["patch"]) for point in record["points"]}
        if any({str(one) for one in point.patch} != known.get(point.key) for point in points if point.key in known):
            raise RunError(f"{file} holds sets by another ranking: effects changed since. Delete the file to go on.")
        yield Progress(stage="validate", task=task, done=len(known), total=len(points))
        missing = [point for point in points if point.key not in known]
        try:
            for done, point, measured in _measure(run, pair, task, missing, settings):
                record["points"].append(_line(point, measured))
                write_whole(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
                yield Progress(stage="validate", task=task, done=len(known) + done, total=len(points))
        except NoGapError as error:
            failures.append(f"{task}: {error}")
            continue
        if missing or "stability" not in found:
            record["areas"] = _areas(record["points"])
            has_effects = bool(read_effects(run.folder(task) / "effects.jsonl"))
            record["stability"] = found.get("stability") or (robustness(run, pair, task) if has_effects else None)
            write_whole(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if failures:
        raise NoGapError(" ".join(failures))


def _settings(run: Run, task: str, settings: CurveSettings) -> dict[str, Any]:
    """Settings as JSON gives them back, with digests of the anchor and of the effects or the screening followed."""
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    followed = {"effects": "effects.jsonl", "screen": "screen.parquet"}[settings.ranking]
    for name in ("anchor.safetensors", followed):
        if (file := run.folder(task) / name).is_file():
            wanted[name] = file_digest(file)[:12]
    return wanted


def _check_same(file: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if changes:
        raise RunError(
            f"{file} was measured with other settings ({'; '.join(changes)}). Repeat them, or delete the file."
        )


def _measure(
    run: Run, pair: ModelPair, task: str, points: Sequence[_Point], settings: CurveSettings
) -> Iterator[tuple[int, _Point, JointPatch]]:
    """Measure some points one after another, each with its number from 1 on."""
    if not points:
        return
    prompts = ContrastPrompts(run.prompts().of_task(task).split("validate").rows[: settings.n_prompts])
    answering = None
    if settings.answers != "none" and can_judge(pair, prompts):
        answering = Answering(max_new_tokens=settings.max_new_tokens)
    references = read_references(pair, prompts, run.anchor(task), batch_tokens=run.pass_tokens)
    check_gap((references.specialized - references.base).numpy(), groups=[row.query for row in prompts])
    for number, point in enumerate(points, 1):
        measured = measure_patch(
            pair,
            references,
            point.patch,
            recipient=point.recipient,
            answering=answering if settings.answers == "all" or point.arm in ANSWERED else None,
            batch_tokens=run.pass_tokens,
            seed=run.config.seed,
        )
        yield number, point, measured


def _screened(run: Run, task: str) -> tuple[Component, ...]:
    """The components of a screening, the highest recovery first.

    Raises:
        RunError: it was not screened.
    """
    file = run.folder(task) / "screen.parquet"
    if not file.is_file():
        raise RunError(f"{run.path} has no screening of {task!r}. Do it first: weightpatch screen {run.path}")
    if (run.screening(task) or {}).get("settings", {}).get("estimation", {}).get("grad_drop"):
        raise RunError(f"{run.path} was screened with grad-drop, whose sizes rank no direction. Screen it without.")
    table = pd.read_parquet(file, columns=["component", "recovery", "exact_recovery"])
    best = table["exact_recovery"].fillna(table["recovery"])
    order = best.sort_values(ascending=False, kind="stable").index
    ranked = [Component.parse(address) for address in table["component"][order]]
    units = {one.unit for one in ranked}
    return tuple(one for one in ranked if not any(encloses(one.unit, unit) for unit in units))


def _orders(
    run: Run, pair: ModelPair, task: str, ranked: Sequence[Component], settings: CurveSettings
) -> dict[str, Sequence[Component]]:
    """Control -> another order of the ranked components, of which the first are taken."""
    found: dict[str, Sequence[Component]] = {}
    if "largest differences" in settings.controls:
        found["largest differences"] = by_difference(pair, ranked)
    wanted = "activation" in settings.controls
    lines = read_effects(run.folder(task) / "activation.jsonl") if wanted else {}
    if lines and all(str(one) in lines for one in ranked if has_output(one)):  # it goes layer by layer: no part ranks
        readouts = run.reference(task)
        sign = orientation(np.subtract(readouts["specialized"], readouts["base"]))
        found["activation"] = by_effects(ranked, lines, sign=sign, seed=run.config.seed)
    if "bottom" in settings.controls:
        found["bottom"] = ranked[::-1]
    return found


def _plan(
    ranked: Sequence[Component], orders: Mapping[str, Sequence[Component]], settings: CurveSettings, *, seed: int
) -> list[_Point]:
    counts = {0, *(max(1, round(share * len(ranked))) for share in settings.shares)}
    points = []
    for recipient in settings.recipients:
        for count in sorted(counts):
            top = _Point(recipient=recipient, arm="top", patch=tuple(ranked[:count]), n_pool=len(ranked))
            points.append(top)
            if 0 < count < len(ranked):
                beside = _controls(top.patch, ranked, orders, settings, seed=seed)
                points += [replace(top, arm=arm, patch=patch) for arm, patch in beside.items()]
    return points


def _controls(
    chosen: Sequence[Component],
    ranked: Sequence[Component],
    orders: Mapping[str, Sequence[Component]],
    settings: CurveSettings,
    *,
    seed: int,
) -> dict[str, tuple[Component, ...]]:
    """Arm -> components, in the order of `CONTROLS`."""
    draws = {name: like for name, like in _DRAWS.items() if name in settings.controls}
    random_sets = {
        f"{name} {draw + 1}": like(chosen, ranked, seed=seed + draw)
        for name, like in draws.items()
        for draw in range(settings.n_random)
    }
    return random_sets | {name: leading_like(chosen, order) for name, order in orders.items()}


_DRAWS = {"random": random_like, "layer-matched": layer_matched_like}


def _areas(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Areas of every arm's curve; none where not all components were patched. None and all are shared by all arms."""
    found = []
    for recipient in dict.fromkeys(point["recipient"] for point in points):
        own = [point for point in points if point["recipient"] == recipient]
        for arm in dict.fromkeys(point["arm"] for point in own):
            curve = [point for point in own if point["arm"] == arm or point["share"] in (0, 1)]
            shares = np.array([float(point["share"]) for point in curve])
            if not (shares == 1).any():
                continue
            recovered = {
                "recovery": np.array([float(point["recovery"]["estimate"]) for point in curve]),
                "kl_recovery": np.array([float(point["kl_recovery"]) for point in curve]),
            }
            for measure, values in recovered.items():
                area = areas(shares, values if recipient == "base" else 1 - values)
                found.append({"recipient": recipient, "arm": arm, "measure": measure, **asdict(area)})
    return found


def _line(point: _Point, measured: JointPatch) -> dict[str, Any]:
    return {
        "recipient": point.recipient,
        "arm": point.arm,
        "k": len(point.patch),
        "share": len(point.patch) / point.n_pool,
        "recovery": known(asdict(measured.recovery)),
        "kl": known(asdict(measured.kl)),
        "kl_recovery": measured.kl_recovery,
        "passed": known(asdict(measured.passed)) if measured.passed else None,
        "n_passed": measured.n_passed,
        "n_prompts": measured.n_prompts,
        "patch": list(measured.patch),
    }
