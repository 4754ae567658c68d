"""The stage `validate`: joint patches of the leading components of a run, more and more of them, beside random ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pandas as pd

from weightpatch.behaviour import MAX_NEW_TOKENS, Answering, can_judge
from weightpatch.component import Component, encloses
from weightpatch.errors import RunError
from weightpatch.pair import ModelPair
from weightpatch.patch import Recipient
from weightpatch.prompts import ContrastPrompts
from weightpatch.run import Progress, Run, write_whole
from weightpatch.statistics import Interval
from weightpatch.validation import (
    SHARES,
    JointPatch,
    by_difference,
    leading_like,
    measure_patch,
    random_like,
    rank,
    read_references,
)

MANY = 1000
"""From so many components on the curve begins at `FEW` and ends, but for all of them, at `MOST_OF_MANY`."""

FEW = 10
MOST_OF_MANY = 0.1


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """What a validation measures.

    Attributes:
        recipients: `base`: is it enough to patch these; `specialized`: is it lost without them.
        shares: Shares of the measured components that are patched together, the leading ones first.
        ranking: Whose order: of the run's `effects`, or of its `screen`: exact where it patched, else estimated.
        n_random: Random sets beside each, with as many components of every unit.
        largest_differences: Also sets of those whose weights moved most, with as many components of every unit.
        n_prompts: Prompts of the split `validate`, at most.
        answers: Whether answers are generated and judged, where the prompts name a checker.
        max_new_tokens: Most tokens of an answer.
    """

    recipients: tuple[Recipient, ...] = ("base",)
    shares: tuple[float, ...] = SHARES
    ranking: Literal["effects", "screen"] = "effects"
    n_random: int = 1
    largest_differences: bool = False
    n_prompts: int = 24
    answers: bool = True
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True, kw_only=True)
class _Point:
    recipient: Recipient
    arm: str
    patch: tuple[Component, ...]
    n_pool: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.recipient, self.arm, len(self.patch)


def validate(run: Run, pair: ModelPair, settings: CurveSettings) -> Iterator[Progress]:
    """Measure the curves of every task that has effects, and write them to `validation.json` point by point.

    Goes on where an earlier call with the same settings stopped.

    Raises:
        RunError: a validation with other settings is there.
    """
    for task in run.tasks:
        if run.failure(task):
            continue
        file = run.folder(task) / "validation.json"
        found = run.validation(task)
        wanted = json.loads(json.dumps(asdict(settings)))
        if settings.ranking == "screen" and (table := run.folder(task) / "screen.parquet").is_file():
            wanted["screening"] = hashlib.sha256(table.read_bytes()).hexdigest()[:12]
        then = json.loads(json.dumps(asdict(CurveSettings()))) | found.get("settings", wanted)
        if then != wanted:
            raise RunError(
                f"{file} was measured with other settings ({found['settings']}). Repeat them, or delete the file."
            )
        record: dict[str, Any] = {"settings": wanted, "points": found["points"]}
        ranked = rank(run.effects(task)) if settings.ranking == "effects" else _screened(run, task)
        moved = by_difference(pair, ranked) if settings.largest_differences else ()
        points = _plan(ranked, moved, settings, seed=run.config.seed)
        known = {(point["recipient"], point["arm"], point["k"]) for point in record["points"]}
        yield Progress(stage="validate", task=task, done=len(known), total=len(points))
        missing = [point for point in points if point.key not in known]
        if not missing:
            continue
        prompts = ContrastPrompts(run.prompts().of_task(task).split("validate").rows[: settings.n_prompts])
        answering = None
        if settings.answers and can_judge(pair, prompts):
            answering = Answering(max_new_tokens=settings.max_new_tokens)
        references = read_references(pair, prompts, run.anchor(task), batch_tokens=run.pass_tokens)
        for done, point in enumerate(missing, len(known) + 1):
            measured = measure_patch(
                pair,
                references,
                point.patch,
                recipient=point.recipient,
                answering=answering,
                batch_tokens=run.pass_tokens,
                seed=run.config.seed,
            )
            record["points"].append(_line(point, measured))
            write_whole(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
            yield Progress(stage="validate", task=task, done=done, total=len(points))


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


def _plan(
    ranked: Sequence[Component], moved: Sequence[Component], settings: CurveSettings, *, seed: int
) -> list[_Point]:
    many = len(ranked) >= MANY
    shares = [share for share in settings.shares if not many or share <= MOST_OF_MANY]
    counts = {0, *(max(1, round(share * len(ranked))) for share in shares)}
    counts |= {FEW, len(ranked)} if many else set()
    points = []
    for recipient in settings.recipients:
        for count in sorted(counts):
            top = _Point(recipient=recipient, arm="top", patch=tuple(ranked[:count]), n_pool=len(ranked))
            points.append(top)
            if 0 < count < len(ranked) and moved:
                like = leading_like(top.patch, moved)
                points.append(replace(top, arm="largest differences", patch=like))
            if 0 < count < len(ranked):
                points += [
                    replace(top, arm=f"random {draw + 1}", patch=random_like(top.patch, ranked, seed=seed + draw))
                    for draw in range(settings.n_random)
                ]
    return points


def _line(point: _Point, measured: JointPatch) -> dict[str, Any]:
    return {
        "recipient": point.recipient,
        "arm": point.arm,
        "k": len(point.patch),
        "share": len(point.patch) / point.n_pool,
        "recovery": _interval(measured.recovery),
        "kl": _interval(measured.kl),
        "kl_recovery": measured.kl_recovery,
        "passed": _interval(measured.passed) if measured.passed else None,
        "n_passed": measured.n_passed,
        "n_prompts": measured.n_prompts,
        "patch": list(measured.patch),
    }


def _interval(found: Interval) -> dict[str, float | None]:
    """JSON knows no NaN: null stands for an unknown bound."""
    return {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
