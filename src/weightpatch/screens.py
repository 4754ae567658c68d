"""The stage `screen`: estimates of every component of a run's tasks, exact patches of some, and what both say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.errors import NoGapError
from weightpatch.estimation import Estimation, estimate_tokens
from weightpatch.files import write_whole
from weightpatch.jsonable import known
from weightpatch.localization import localize, sweep
from weightpatch.outputs import fit_divergence, fit_margin
from weightpatch.pair import ModelPair
from weightpatch.prompts import ContrastPrompts
from weightpatch.reading import Target
from weightpatch.recording import append_effects, read_effects
from weightpatch.run import Progress, Run, settle
from weightpatch.screening import BUDGET, CONFIDENCE, Screened, Screening, choose, compare, how_far, to_measure
from weightpatch.statistics import check_gap

N_SHOWN = 12
"""Components of the map of tokens."""


@dataclass(frozen=True, kw_only=True)
class ScreenSettings:
    """What a screening does; see `weightpatch.screening.screen`.

    Attributes:
        units: Units and addresses, with commas.
        budget: Components to patch exactly, in every task.
        readout: What is read: the run's `anchor`, or the output: its `margin` or `divergence`, fitted on the prompts.
        estimation: How to estimate.
        threshold: Recovery by size that should not be missed; None: the tenth of each unit's top list.
        confidence: Of the bound on what was missed.
    """

    units: str = "neurons,heads,kvs"
    budget: int = BUDGET
    readout: Literal["anchor", "margin", "divergence"] = "anchor"
    estimation: Estimation = field(default_factory=Estimation)
    threshold: float | None = None
    confidence: float = CONFIDENCE


def screen_run(run: Run, pair: ModelPair, settings: ScreenSettings) -> Iterator[Progress]:
    """Screen every task that has an anchor and a measurable gap, on the `localize` split.

    Writes `screen.jsonl` (exact effects, line by line), `screen.parquet` (the table) and `screen.json` (verdicts, and
    where in one prompt the leading components act). Goes on where an earlier call with the same settings stopped.

    Raises:
        RunError: a screening with other settings is there, or nothing was measured yet.
        NoGapError: in some task the models do not differ in the readout; the others are screened first.
    """
    failures = []
    for task in run.tasks:
        if run.failure(task):
            continue
        yield Progress(stage="screen", task=task)
        run.anchor(task)
        if settle(run, task, "screen", asdict(settings)):
            continue
        prompts = run.prompts().of_task(task).split("localize")
        anchor = _target(run, task, pair, prompts, settings)
        estimates = localize(
            pair,
            prompts,
            anchor,
            units=settings.units,
            method="first-order",
            estimation=settings.estimation,
            batch_tokens=run.pass_tokens,
        )
        try:
            check_gap(estimates.gap.numpy(), groups=estimates.queries)
        except NoGapError as error:
            failures.append(f"{task}: {error}")
            continue
        choices = choose(estimates, budget=settings.budget, seed=run.config.seed)
        measured = to_measure(estimates, choices)
        file = run.folder(task) / "screen.jsonl"
        lines = read_effects(file, repair=True)
        known = frozenset(one for one in measured if str(one) in lines)
        yield Progress(stage="screen", task=task, done=len(known), total=len(measured))
        names = set(lines)
        found_now = sweep(
            pair,
            prompts,
            anchor,
            measured,
            engine=run.config.engine,
            batch_tokens=run.batch_tokens if run.config.engine == "suffix" else run.pass_tokens,
            skip=known,
        )
        for effect in append_effects(file, found_now, names):
            lines[str(effect.component)] = effect.per_prompt.tolist()
            yield Progress(stage="screen", task=task, done=len(lines), total=len(measured))
        found = {one: torch.tensor(lines[str(one)], dtype=torch.float64) for one in measured}
        screening = compare(
            estimates,
            choices,
            found,
            engine=run.config.engine,
            moved=how_far(
                float(row["relative_norm"])
                for row in run.manifest["differences"]
                if Component.parse(row["component"]).unit in ("attns", "mlps")
            ),
            threshold=settings.threshold,
            confidence=settings.confidence,
        )
        tokens = _tokens(pair, prompts, settings, screening)
        _write(run, task, settings, screening, tokens)
    if failures:
        raise NoGapError(" ".join(failures))


def _target(run: Run, task: str, pair: ModelPair, prompts: ContrastPrompts, settings: ScreenSettings) -> Target:
    match settings.readout:
        case "margin":
            return fit_margin(pair, prompts)
        case "divergence":
            return fit_divergence(pair, prompts)
        case _:
            return run.anchor(task)


def _write(run: Run, task: str, settings: ScreenSettings, screening: Screening, tokens: dict[str, Any] | None) -> None:
    folder = run.folder(task)
    table = screening.table(seed=run.config.seed)
    if screening.estimates.per_span:
        spans = screening.estimates.by_span().set_index("component")
        for name in screening.estimates.per_span:
            table[f"span.{name}"] = spans[name].to_numpy()
    partial = folder / "screen.parquet.partial"
    table.to_parquet(partial, index=False)
    partial.replace(folder / "screen.parquet")
    record = {
        "settings": asdict(settings),
        "units": {unit: _verdict(screened) for unit, screened in screening.units.items()},
        "tokens": tokens,
    }
    write_whole(folder / "screen.json", json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _verdict(screened: Screened) -> dict[str, Any]:
    return {
        "n": len(screened.choice.members),
        "n_top": len(screened.choice.top),
        "n_random": len(screened.choice.random),
        "top": known(asdict(screened.on_top)),
        "random": known(asdict(screened.on_random)),
        "is_poor": screened.is_poor,
        "is_beyond": screened.is_beyond,
        "moved": screened.moved,
        "poor_layers": [known(asdict(one)) for one in screened.poor_layers],
        "threshold": screened.threshold,
        "missed_at_most": screened.missed_at_most,
        "confidence": screened.confidence,
        "verdict": str(screened),
    }


def _tokens(
    pair: ModelPair, prompts: ContrastPrompts, settings: ScreenSettings, screening: Screening
) -> dict[str, Any] | None:
    """Where the components with the largest exact effects act in the first prompt; None where that is not defined."""
    estimates = screening.estimates
    if not estimates.per_span or not isinstance(estimates.anchor, Anchor):
        return None
    sizes = screening.exact.per_prompt.mean(dim=1).abs()
    leading: list[Component] = [
        screening.exact.components[place] for place in sizes.argsort(descending=True, stable=True)[:N_SHOWN].tolist()
    ]
    one = ContrastPrompts(prompts.rows[:1])
    acting = estimate_tokens(pair, one, estimates.anchor, leading, settings.estimation)
    gap = check_gap(estimates.gap.numpy(), groups=estimates.queries).estimate
    return {
        "prompt": one.rows[0].id,
        "texts": list(acting.texts),
        "spans": list(acting.spans),
        "components": [str(component) for component in leading],
        "values": (acting.per_token / gap).tolist(),
    }
