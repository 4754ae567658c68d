"""The report: one HTML file made from a run folder alone, which opens without a network."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from weightpatch.files import write_whole
from weightpatch.graph import Graph
from weightpatch.report import behaviour, figures, hierarchy, maps, screening
from weightpatch.report.contents import N_TOP, TaskResult, command, count_words, read_tasks, short_name
from weightpatch.report.sharing import SERVING_RECOVERY, share
from weightpatch.report.style import span_color, unit_style
from weightpatch.report.tokens import MOST_TOKENS, token_figure
from weightpatch.report.verdict import verdict
from weightpatch.run import Run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["render", "write_report"]

_SMALL = ("heads", "heads.q", "heads.o", "kvs", "experts", "neurons")
"""Units that lie inside others; the summary shows them apart from the modules that contain them."""


def write_report(run: Run) -> Path:
    """Write a run's report into its folder, whole or not at all.

    Args:
        run: The run, finished or not.

    Returns:
        The file.
    """
    write_whole(run.report, render(run))
    return run.report


def render(run: Run) -> str:
    """The report as one HTML document, the same for the same run folder.

    Args:
        run: The run, finished or not; what is missing is said.
    """
    tasks = read_tasks(run)
    drawn = _Figures()
    tables = {task.name: task.table for task in tasks if task.table is not None}
    drawn_tasks = [(task, _task_figures(task, run, drawn)) for task in tasks]
    traces = {task.name: found for task in tasks if (found := _trace(task, run, drawn)) is not None}
    screens = {task.name: screen for task in tasks if (screen := _screening(task, run, drawn)) is not None}
    styles = ["style.css", "hierarchy.css", *(["screening.css"] if screens else [])]
    scripts = {"plotly": get_plotlyjs(), "figures": _resource("figures.js")}
    return _template().render(
        run=run,
        config=run.config,
        manifest=run.manifest,
        base=short_name(run.config.base),
        specialized=short_name(run.config.specialized),
        command=command(run),
        parameters=count_words(int(run.manifest["architecture"]["n_parameters"])),
        tasks=drawn_tasks,
        difference_figure=_difference_figure(run, drawn),
        task_figures=_shared_figures(tables, drawn),
        sharing=share(tables) if len(tables) > 1 else [],
        n_compared_tasks=len(tables),
        serving=SERVING_RECOVERY,
        small=_SMALL,
        n_top=N_TOP,
        unit_style=unit_style,
        screens=screens,
        traces=traces,
        words={task.name: verdict(run, task.name) for task in tasks},
        joint={task.name: run.validation(task.name) for task in tasks},
        span_color=span_color,
        css=Markup("".join(map(_resource, styles))),  # noqa: S704 - ours
        scripts={name: Markup(text) for name, text in scripts.items()},  # noqa: S704 - plotly's and ours
        policy=_policy(list(scripts.values())),
    )


class _Figures:
    """Numbers the figures of a document and makes them safe to stand in it."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, figure: go.Figure) -> dict[str, object]:
        """What the template needs of a figure; its title moves to the caption, where it wraps."""
        self.count += 1
        title = str(figure.layout.title.text or "")
        figure.update_layout(title_text=None)
        text = str(figure.to_json())
        for mark, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
            text = text.replace(mark, escaped)
        return {
            "id": f"figure-{self.count}",
            "title": title,
            "height": figure.layout.height,
            "json": Markup(text),  # noqa: S704 - escaped above
        }


def _difference_figure(run: Run, drawn: _Figures) -> dict[str, object] | None:
    import pandas as pd

    table = pd.DataFrame(run.manifest["differences"])
    if table.empty or not table["component"].str.fullmatch(r"L\d+\.(attn|mlp)").any():
        return None
    return drawn.add(figures.difference_figure(table))


def _shared_figures(tables: dict[str, pd.DataFrame], drawn: _Figures) -> list[dict[str, object]]:
    """Two maps of the leading components by task, so that modules do not pale the heads inside them."""
    if len(tables) < 2:
        return []
    units = list(dict.fromkeys(unit for table in tables.values() for unit in table["unit"]))
    groups = [[unit for unit in units if unit not in _SMALL], [unit for unit in units if unit in _SMALL]]
    return [drawn.add(maps.task_map(tables, group)) for group in groups if group]


def _task_figures(task: TaskResult, run: Run, drawn: _Figures) -> dict[str, dict[str, object]]:
    found: dict[str, go.Figure] = {}
    n_layers = int(run.manifest["architecture"]["n_layers"])
    if task.anchor is not None and task.anchor.report is not None:
        found["levels"] = figures.level_figure(task.anchor)
        if task.anchor.report.behaviour is not None:
            found["search"] = behaviour.steering_figure(task.anchor)
        elif len(task.anchor.report.search) > 1:
            found["search"] = figures.search_figure(task.anchor)
    if task.anchor is not None and task.table is not None:
        units = set(task.table["unit"])
        if units & set(maps.INDEXED):
            found["heads"] = maps.head_map(task.table, n_layers=n_layers, anchor_layer=task.anchor.layer)
        if units & {*figures.MODULES}:
            found["layers"] = figures.layer_figure(task.table, n_layers=n_layers, anchor_layer=task.anchor.layer)
        found["forest"] = figures.forest_figure(task.top)
    points = run.validation(task.name)["points"]
    for recipient in dict.fromkeys(point["recipient"] for point in points):
        found[f"curve_{recipient}"] = behaviour.curve_figure(points, recipient=recipient)
    return {name: drawn.add(figure) for name, figure in found.items()}


def _screening(task: TaskResult, run: Run, drawn: _Figures) -> dict[str, object] | None:
    """What the template needs of a task's screening; None where there is none. Its table is let go of here."""
    record = run.screening(task.name)
    if record is None:
        return None
    table = run.screen_table(task.name)
    settings, units = record["settings"], list(record["units"])
    n_layers = int(run.manifest["architecture"]["n_layers"])
    of_anchor = task.anchor is not None and settings.get("readout", "anchor") == "anchor"
    place = {"n_layers": n_layers, "anchor_layer": task.anchor.layer if task.anchor and of_anchor else n_layers}
    found: dict[str, go.Figure] = {}
    if (unit := screening.largest_unit(table)) is not None:
        found["spread"] = screening.spread_figure(table, unit, **place)
    if not settings["estimation"]["grad_drop"]:  # sizes that ignore cancelling are not for adding up
        found["sums"] = screening.sum_figure(table)
    found["concentration"] = screening.concentration_figure(table)
    most = screening.MOST_POINTS // max(1, len(units))
    panels = [screening.agreement_figure(table, unit, most=most) for unit in units]
    if unit is not None and screening.span_names(table):
        found["spans"] = screening.span_figure(table, unit, **place)
    if record["tokens"] is not None and record["tokens"]["components"] and record["tokens"]["texts"]:
        found["tokens"] = token_figure(record["tokens"])
    return {
        **record,
        "approximation": screening.approximation(settings),
        "figures": {name: drawn.add(figure) for name, figure in found.items()},
        "panels": [drawn.add(figure) for figure in panels],
        "largest": unit,
        "per_layer": screening.PER_LAYER,
        "best": screening.best_patched(table, N_TOP),
        "n_patched": int(table["exact_recovery"].notna().sum()),
        "is_shortened": "tokens" in found and len(record["tokens"]["texts"]) > MOST_TOKENS,
        "shown_spans": list(dict.fromkeys(record["tokens"]["spans"])) if "tokens" in found else [],
    }


def _trace(task: TaskResult, run: Run, drawn: _Figures) -> dict[str, object] | None:
    """What the template needs of a task's trace; None where there is none."""
    record, table = run.trace(task.name), run.roles(task.name)
    if record is None or table is None or task.anchor is None:
        return None
    record = {"rounds": [], "overlaps": [], "control": [], **record}
    place = {"n_layers": int(run.manifest["architecture"]["n_layers"]), "anchor_layer": task.anchor.layer}
    about: dict[str, object] = {
        "n_prompts": len(run.reference(task.name)["prompts"]),
        "n_without": int((table["recovery"].notna() & table["activation"].isna()).sum()),
        "null": hierarchy.null_of_roles(_read_lines(run.folder(task.name) / "null.jsonl")),
    }
    found: dict[str, go.Figure] = {}
    if (table["recovery"].notna() & table["activation"].notna()).any():
        found["roles"] = hierarchy.roles_figure(table, share=record["rule"]["share"])
    found["depth"] = hierarchy.depth_figure(table, means=record["depth"]["mean"], **place)
    if record.get("edges"):
        graph = Graph.from_record(record)
        found["graph"] = hierarchy.graph_figure(graph, **place)
        kept = hierarchy.strongest(graph)
        about |= {"n_drawn": len(kept), "n_left_out": len(graph.edges) - len(kept)}
    matrix = run.matrix(task.name)
    if matrix is not None and (rows := hierarchy.rows_of_matrix(matrix, table)):
        found["delivery"] = hierarchy.delivery_figure(matrix, rows=rows)
        recoveries = table.set_index("component")["recovery"].loc[rows]
        about |= {
            "rows": rows,
            "are_sources": bool((table.loc[table["component"].isin(rows), "role"] == "source").all()),
            "deviation": float((matrix.loc[rows].sum(axis=1) - recoveries).abs().max()),
        }
    if record.get("executors") and table["loss"].notna().any():
        file = run.folder(task.name) / "executors.json"
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        about["null_of_losses"] = behaviour.null_of_losses(held)
        about["n_directions"] = len(held.get("null", ()))
        found["executors"] = behaviour.executors_figure(table, null=behaviour.null_of_losses(held))
    return {**record, **about, "figures": {name: drawn.add(figure) for name, figure in found.items()}}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file. A half line at its end is left out."""
    whole = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]


def _policy(scripts: list[str]) -> str:
    """A content security policy: no network at all, and no script but these."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _resource(name: str) -> str:
    return files("weightpatch.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource("template.html.j2"))
