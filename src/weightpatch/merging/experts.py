"""Experts of a merge: checkpoints with the runs that scored them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from weightpatch.component import Component, disjoint
from weightpatch.errors import AnchorError, MergeError, RunError

if TYPE_CHECKING:
    from weightpatch.anchor import Anchor
    from weightpatch.effects import Effects
    from weightpatch.run import Run


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One specialized model that enters a merge.

    Attributes:
        specialized: Hub id, folder, GGUF file or PEFT adapter folder.
        run: The folder of a run of base and expert; None where nothing of it is needed.
        weight: What all its coefficients are multiplied by.
    """

    specialized: str
    run: Path | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight.

        Raises:
            MergeError: it is no number.
        """
        if not math.isfinite(self.weight):
            raise MergeError(f"weight {self.weight} of {self.specialized} is no number to multiply by.")

    @classmethod
    def parse(cls, text: str) -> Expert:
        """Read `SPECIALIZED[=RUN][:weight]`.

        Of several `=` the last one counts after which there is a run, or the last one; none counts in the path of a
        checkpoint that is there.

        Raises:
            MergeError: no checkpoint in it.
        """
        found = re.fullmatch(
            r"(?P<whole>.*?)(?::(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?", text.strip(), re.DOTALL
        )
        whole = found["whole"] if found else ""
        specialized, run = _split(whole)
        if not found or not specialized or run == "":
            raise MergeError(f"cannot read the expert {text!r}. Write SPECIALIZED=RUN or SPECIALIZED=RUN:0.7")
        return cls(
            specialized=specialized,
            run=None if run is None else Path(run),
            weight=float(found["weight"]) if found["weight"] else 1.0,
        )


def _split(text: str) -> tuple[str, str | None]:
    """Checkpoint and run of `SPECIALIZED[=RUN]`."""
    parts = text.split("=")
    ways = [("=".join(parts[:place]), "=".join(parts[place:])) for place in range(len(parts) - 1, 0, -1)]
    if not ways or Path(text).expanduser().exists():
        return text, None
    return next((way for way in ways if (Path(way[1]).expanduser() / "manifest.json").is_file()), ways[0])


def named(experts: Sequence[Expert]) -> dict[str, Expert]:
    """Each expert under the last part of its reference, numbered where two are alike.

    Raises:
        MergeError: none, or one checkpoint twice.
    """
    if not experts:
        raise MergeError("a merge needs at least one expert: --expert SPECIALIZED=RUN")
    given = [one.specialized for one in experts]
    if twice := [one for place, one in enumerate(given) if any(_same(one, other) for other in given[:place])]:
        raise MergeError(f"{', '.join(twice)} is named as an expert more than once. Name it once, with a weight.")
    shorts = [re.split(r"[/\\:]", one.rstrip("/\\"))[-1] or one for one in given]
    found: dict[str, Expert] = {}
    for short, expert in zip(shorts, experts, strict=True):
        free = (name for number in count(1) if (name := f"{short}-{number}") not in {*shorts, *found})
        found[short if shorts.count(short) == 1 else next(free)] = expert
    return found


def open_run(name: str, expert: Expert, base: str, fingerprints: Mapping[str, str]) -> Run:
    """The run of an expert.

    Args:
        name: Of the expert.
        expert: The expert.
        base: As the merge names it.
        fingerprints: Of the files of `base` and of `expert NAME`, as they are now.

    Raises:
        MergeError: none was named, or it is one of other models, or of other weights than these have now.
        RunError: no run can be read there.
    """
    if expert.run is None:
        raise MergeError(
            f"the expert {name} has no run to take scores from. Make one (weightpatch run {base} {expert.specialized} "
            f"--out RUN) and name it: --expert {expert.specialized}=RUN. Only --policy uniform needs none."
        )
    from weightpatch.run import Run  # takes a second, and merges without runs need none of it

    run = Run.open(expert.run)
    for side, then, now in (
        ("base", run.config.base, base),
        ("specialized model", run.config.specialized, expert.specialized),
    ):
        if not _same(then, now):
            raise MergeError(
                f"{expert.run} is a run with the {side} {then!r}; the merge has {now!r}. Name the run of this very "
                "expert, or the models as the run names them."
            )
    then = run.manifest.get("fingerprints", {})  # none of a run of modules in memory
    for side, reference, key in (("base", base, "base"), ("specialized", expert.specialized, f"expert {name}")):
        if side in then and then[side] != fingerprints[key]:
            raise MergeError(
                f"{expert.run} is a run of other weights than {reference} holds now. Make it again (weightpatch run "
                f"{base} {expert.specialized} --out RUN), or name the very files that it was made with."
            )
    return run


def anchors_of(run: Run) -> dict[str, Anchor]:
    """Task -> its anchor, of the tasks of a run that have one.

    Raises:
        MergeError: none.
    """
    found: dict[str, Anchor] = {}
    reasons = []
    for task in run.tasks:
        try:
            found[task] = run.anchor(task)
        except AnchorError as error:
            reasons.append(str(error))
    if not found:
        raise MergeError(f"{run.path} has no anchor of any task: {'; '.join(reasons)}")
    return found


def measured(run: Run) -> dict[str, Effects]:
    """Task -> effects, of the tasks of a run that have some.

    Raises:
        MergeError: none, or not all that were planned.
    """
    found: dict[str, Effects] = {}
    reasons = []
    for task in run.tasks:
        try:
            found[task] = run.effects(task)
            n_missing = run.n_missing(task)
        except (AnchorError, RunError) as error:
            reasons.append(str(error))
            continue
        if n_missing:
            raise MergeError(
                f"{run.path} is measured in part: {n_missing} components of {task} have no effects yet, so ranks would "
                f"be those of the others. Go on: weightpatch localize {run.path}"
            )
    if not found:
        raise MergeError(f"{run.path} has no effects of any task: {'; '.join(reasons)}")
    return found


def doubts_of(run: Run, *, learned: bool) -> dict[str, str]:
    """Task of a run that has no part in a merge, or a doubtful one -> why.

    Args:
        run: Of an expert.
        learned: Coefficients are learned, for which anchors are needed; otherwise effects are.
    """
    found: dict[str, str] = {}
    for task in run.tasks:
        try:
            anchor = run.anchor(task)
            if not learned:
                run.effects(task)
        except (AnchorError, RunError) as error:
            found[task] = f"left out: {error}"
            continue
        if anchor.report is not None and not anchor.report.stable:
            failed = ", ".join(gate.name for gate in anchor.report.gates if not gate.passed)
            found[task] = f"counts, but its anchor is unstable: it failed {failed}"
    return found


def read_scores(run: Run, chosen: Set[Component]) -> dict[Component, float]:
    """Component -> its mean recovery over the tasks of a run, measured below every task's anchor.

    Args:
        run: Of an expert.
        chosen: Which components count.

    Raises:
        MergeError: no task has effects, or none of these components.
    """
    every: list[dict[Component, float]] = []
    for effects in measured(run).values():
        shares = effects.per_prompt.mean(dim=1) / effects.gap.mean()
        every.append(dict(zip(effects.components, shares.tolist(), strict=True)))
    common = [one for one in every[0] if one in chosen and all(one in own for own in every)]
    if not common:
        units = ", ".join(dict.fromkeys(one.unit for own in every for one in own))
        raise MergeError(f"{run.path} has scores of {units}, of none of the units asked for. Choose with --units.")
    return {one: sum(own[one] for own in every) / len(every) for one in common}


def read_sources(run: Run) -> set[Component]:
    """Components that have the role source in any task of a run.

    Raises:
        MergeError: a task was not traced.
    """
    found: set[Component] = set()
    for task in measured(run):
        roles = run.roles(task)
        if roles is None:
            raise MergeError(f"{run.path} has no roles of {task}. Trace it first: weightpatch trace {run.path}")
        found |= {Component.parse(one) for one in roles.loc[roles["role"] == "source", "component"]}
    return found


def units_of(runs: Mapping[str, Run]) -> str:
    """Units that all runs measured, the finest where one holds another.

    Raises:
        MergeError: they have none in common.
    """
    every = [[unit.strip() for unit in run.config.units.split(",")] for run in runs.values()]
    common = [unit for unit in every[0] if all(unit in own for own in every)]
    if not common:
        listed = "; ".join(f"{name}: {run.config.units}" for name, run in runs.items())
        raise MergeError(f"the runs measured no unit in common ({listed}). Localize again with the same units.")
    return ",".join(disjoint(common))


def _same(one: str, other: str) -> bool:
    paths = [Path(reference).expanduser() for reference in (one, other)]
    alike = paths[0] == paths[1]
    return alike or (all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve())
