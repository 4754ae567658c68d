"""A run's findings in words, each with its numbers, and what they say about the hierarchy that the paper claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weightpatch.run import Run

if TYPE_CHECKING:
    import pandas as pd

Answer = Literal["agrees", "disagrees", "open"]

N_NAMED = 5
OVERLAP_AT = 50
LEVEL = 0.05
MAJORITY = 0.5
MIDDLE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of the paper, as we read it, beside what a run measured.

    Attributes:
        statement: In words.
        measured: In words with numbers.
        answer: Whether the measurement agrees; `open` where it does not tell.
    """

    statement: str
    measured: str
    answer: Answer


def verdict(run: Run, task: str) -> tuple[str, ...]:
    """What a run found on one task, in paragraphs of plain text; none before it was traced."""
    record, table = run.trace(task), run.roles(task)
    if record is None or table is None:
        return ()
    paragraphs = [_anchor(run, task), _sources(table, record), _routers(table), _depth(record)]
    paragraphs += [_graph(record), _executors(table, record), _joint(run, task)]
    found = claims(run, task)
    counts = {answer: sum(claim.answer == answer for claim in found) for answer in ("agrees", "disagrees", "open")}
    paragraphs.append(
        f"Beside the paper's hierarchy (8B and 13B models; our reading of its claims): {counts['agrees']} of "
        f"{len(found)} statements agree, {counts['disagrees']} disagree, {counts['open']} stay open. "
        + " ".join(f"{claim.statement}: {claim.answer} ({claim.measured})." for claim in found)
    )
    return tuple(paragraph for paragraph in paragraphs if paragraph)


def claims(run: Run, task: str) -> tuple[Claim, ...]:
    """The paper's claims beside what a run measured on one task; none before it was traced.

    The claims are the abstract's, in our reading; what counts as agreement is ours: a permutation test at 5 %, more
    than half of what sources (routers) restore, or an overlap that chance gives in less than 5 % and that is larger
    than the control's.
    """
    record, table = run.trace(task), run.roles(task)
    if record is None or table is None:
        return ()
    return (
        _claim_of_depth(record),
        _claim_of_sources(run, table),
        _claim_of_routers(run, table),
        _claim_of_overlap(record),
    )


def _anchor(run: Run, task: str) -> str:
    anchor, found = run.anchor(task), run.reference(task)
    n_layers = int(run.manifest["architecture"]["n_layers"])
    n_prompts = len(found["prompts"])
    text = f"The anchor reads the stream that enters layer {anchor.layer} of {n_layers}, on {n_prompts} prompts"
    if anchor.report is None:
        return f"{text}; it was not tested."
    failed = [gate.name for gate in anchor.report.gates if not gate.passed]
    if failed:
        return f"{text}. It is unstable: it failed {', '.join(failed)}. What follows may mean little."
    return f"{text}; it passed every gate ({', '.join(gate.name for gate in anchor.report.gates)})."


def _sources(table: pd.DataFrame, record: dict[str, Any]) -> str:
    below = table[table["recovery"].notna()]
    own = _leading(below, "source", "recovery")
    rule = record["rule"]
    null = f"{rule['n_shuffles']} shuffles of the weights' difference, {rule['level']:.0%} false discoveries"
    if own.empty:
        return f"None of {len(below)} components below the anchor is a source ({null})."
    beyond = ", more than on the same queries without the instruction" if rule["plain"] else ""
    return (
        f"{len(own)} of {len(below)} components below the anchor are sources: their specialized weights alone restore "
        f"more of the anchor's gap than {null}{beyond}, and at least {rule['share']:.0%} of what their activation "
        f"does. The leading ones: {_named(own, 'recovery', 'ci_low', 'ci_high')}."
    )


def _routers(table: pd.DataFrame) -> str:
    own = _leading(table, "router", "activation")
    if own.empty:
        return "No component passes on much more than its own weights explain: there is no router."
    named = ", ".join(
        f"{row['component']} {_percent(row['activation'])} (its weights {_percent(row['recovery'])})"
        for _, row in own.head(N_NAMED).iterrows()
    )
    return (
        f"{len(own)} are routers: they restore by their activation what their own weights do not. The leading: {named}."
    )


def _depth(record: dict[str, Any]) -> str:
    depth = record["depth"]
    if depth["p"] is None:
        return "Depths of sources and routers cannot be compared: one of the two is missing."
    way = "above" if depth["difference"] > 0 else "below"
    return (
        f"Sources lie at a mean depth of {depth['mean']['source']:.2f}, routers at {depth['mean']['router']:.2f} "
        f"(0 is the bottom, 1 the top): routers lie {abs(depth['difference']):.2f} {way} sources, "
        f"p = {depth['p']:.2g} by permuting the two roles."
    )


def _graph(record: dict[str, Any]) -> str:
    rounds = record.get("rounds")
    if not rounds:
        return ""
    first = rounds[0]
    if not first["suppliers"]:
        return f"No suppliers of the leading routers were found: {first['stopped']}."
    joint = first["joint"]
    text = (
        f"Of {first['n_candidates']} candidates the {len(first['suppliers'])} best suppliers of "
        f"{len(first['targets'])} routers, patched together, restore {_percent(joint['value'])} "
        f"({_percent(joint['low'])} to {_percent(joint['high'])}) of what these write to the anchor."
    )
    overlap = next((one for one in record["overlaps"] if one["k"] == OVERLAP_AT), None)
    if overlap:
        control = next((one for one in record["control"] if one["k"] == OVERLAP_AT), None)
        beside = f"; of as many others in the same layers {control['n_common']}" if control else ""
        text += (
            f" Among the {OVERLAP_AT} best suppliers by estimate, {overlap['n_common']} are among the {OVERLAP_AT} "
            f"components with the largest effects of weights (chance: {overlap['expected']:.1f}, p = {overlap['p']:.1g}"
            f"{beside})."
        )
    return text


def _executors(table: pd.DataFrame, record: dict[str, Any]) -> str:
    about = record["executors"]
    if about is None:
        return "Nothing past the anchor was held, so there are no executors."
    if about["restored"] <= 0:
        return (
            "Steering the base to the specialized readout does not bring its next tokens nearer to the specialized "
            f"model's (KL, {about['n_prompts']} prompts: {_percent(about['restored'])} of the way), so no executors "
            "can be told."
        )
    own = _leading(table, "executor", "loss")
    text = (
        f"With the base steered to the specialized readout, its next tokens come {_percent(about['restored'])} of the "
        f"way to the specialized model's (KL, {about['n_prompts']} prompts)."
    )
    if own.empty:
        return f"{text} None of {about['n_components']} components past the anchor is needed for it by itself."
    named = _named(own, "loss", "loss_low", "loss_high")
    return f"{text} Executors, {len(own)} in all, lose part of that when held: {named}."


def _joint(run: Run, task: str) -> str:
    points = run.validation(task)["points"]
    sentences = []
    for recipient, words in (
        ("base", "Patched into the base together"),
        ("specialized", "Taken out of the specialized"),
    ):
        own = [point for point in points if point["recipient"] == recipient and 0 < point["share"] < 1]
        top = max((point for point in own if point["arm"] == "top"), key=lambda point: int(point["k"]), default=None)
        if top is None:
            continue
        others = [point for point in own if point["k"] == top["k"] and point["arm"] != "top"]
        beside = "; ".join(f"{point['arm']} {_percent(_restored(point))}" for point in others)
        what = "restore" if recipient == "base" else "lose"
        sentences.append(
            f"{words}, the leading {top['k']} components ({top['share']:.0%}) {what} {_percent(_restored(top))} of the "
            f"anchor's gap" + (f" ({beside})." if beside else ".")
        )
    return " ".join(sentences)


def _restored(point: dict[str, Any]) -> float:
    """What a set restores in the base, or what the specialized model loses without it."""
    value = float(point["recovery"]["estimate"])
    return value if point["recipient"] == "base" else 1 - value


def _claim_of_depth(record: dict[str, Any]) -> Claim:
    depth = record["depth"]
    statement = "Routers lie deeper than sources"
    if depth["p"] is None:
        return Claim(statement=statement, measured="one of the two roles is missing", answer="open")
    answer: Answer = "open"
    if depth["p"] < LEVEL:
        answer = "agrees" if depth["difference"] > 0 else "disagrees"
    measured = f"difference {depth['difference']:+.2f} of the depth, p = {depth['p']:.2g}"
    return Claim(statement=statement, measured=measured, answer=answer)


def _claim_of_sources(run: Run, table: pd.DataFrame) -> Claim:
    statement = "Sources are shallow MLPs"
    own = table[(table["role"] == "source") & table["unit"].isin(("heads", "kvs", "mlps"))]
    total = float(own["recovery"].sum())
    if total <= 0 or not {"heads", "mlps"} <= set(table["unit"]):
        return Claim(statement=statement, measured="no sources among heads and MLPs", answer="open")
    shallow = own[(own["unit"] == "mlps") & (_depths(run, own) < MAJORITY)]
    share = float(shallow["recovery"].sum()) / total
    measured = f"MLPs of the lower half have {share:.0%} of what sources restore one by one"
    return Claim(statement=statement, measured=measured, answer="agrees" if share > MAJORITY else "disagrees")


def _claim_of_routers(run: Run, table: pd.DataFrame) -> Claim:
    statement = "Routers are middle and late heads"
    own = table[(table["role"] == "router") & table["unit"].isin(("heads", "mlps"))]
    total = float(own["activation"].sum())
    if total <= 0:
        return Claim(statement=statement, measured="no routers among heads and MLPs", answer="open")
    late = own[(own["unit"] == "heads") & (_depths(run, own) >= MIDDLE)]
    share = float(late["activation"].sum()) / total
    measured = f"heads from a third of the depth on have {share:.0%} of what routers restore one by one"
    return Claim(statement=statement, measured=measured, answer="agrees" if share > MAJORITY else "disagrees")


def _claim_of_overlap(record: dict[str, Any]) -> Claim:
    statement = "The routers' suppliers are the components with the largest effects of weights"
    overlap = next((one for one in record.get("overlaps", ()) if one["k"] == OVERLAP_AT), None)
    control = next((one for one in record.get("control", ()) if one["k"] == OVERLAP_AT), None)
    if overlap is None or control is None:
        return Claim(statement=statement, measured="too few candidates, or no control", answer="open")
    agrees = overlap["p"] < LEVEL and overlap["n_common"] > control["n_common"]
    measured = (
        f"{overlap['n_common']} of {OVERLAP_AT} in common, chance {overlap['expected']:.1f}, other components of the "
        f"same layers {control['n_common']}"
    )
    return Claim(statement=statement, measured=measured, answer="agrees" if agrees else "disagrees")


def _depths(run: Run, table: pd.DataFrame) -> pd.Series[float]:
    depths: pd.Series[float] = table["layer"].astype(float) / int(run.manifest["architecture"]["n_layers"])
    return depths


def _leading(table: pd.DataFrame, role: str, column: str) -> pd.DataFrame:
    return table[table["role"] == role].sort_values(column, ascending=False, kind="stable")


def _named(table: pd.DataFrame, value: str, low: str, high: str) -> str:
    return ", ".join(
        f"{row['component']} {_percent(row[value])} ({_percent(row[low])} to {_percent(row[high])})"
        for _, row in table.head(N_NAMED).iterrows()
    )


def _percent(value: Any) -> str:
    if value is None or value != value:  # noqa: PLR0124  NaN
        return "unknown"
    return f"{100 * float(value):.1f} %" if abs(value) < 0.1 else f"{100 * float(value):.0f} %"
