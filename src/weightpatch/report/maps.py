"""Maps of recovery: heads and groups by layer, and components by task. A table is what `Effects.table` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightpatch.component import UNITS, Component
from weightpatch.report.figures import layer_tick, mark_past_anchor
from weightpatch.report.scores import Score, read_scores
from weightpatch.report.sharing import serves
from weightpatch.report.style import GREY, color_axis, plain, styled, unit_style

if TYPE_CHECKING:
    import pandas as pd

INDEXED = ("heads", "heads.q", "heads.o", "kvs", "experts")
"""Units of which a layer has a few, so that a map of layers can show them."""

MOST_WITH_TEXT = 12
"""Layers up to which a map has room for numbers in its cells."""

Grid = list[list[Score | None]]

_LETTERS = {"heads": "H{}", "heads.q": "H{}.q", "heads.o": "H{}.o", "kvs": "KV{}", "experts": "E{}"}
_GAP = 22

SMALLEST_SCALE = 0.01
"""Recovery at the end of a colour scale when everything is smaller."""


def head_map(table: pd.DataFrame, *, n_layers: int, anchor_layer: int) -> go.Figure:
    """Recovery of every head and key/value group: layers from left to right, one row for each index.

    All units share one diverging scale, centred on 0 and as wide as the largest value on either side.

    Args:
        table: Of one task, with at least one of the units in `INDEXED`.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
    """
    present = [unit for unit in INDEXED if (table["unit"] == unit).any()]
    grids = [_grid(read_scores(table[table["unit"] == unit]), n_layers=n_layers) for unit in present]
    sizes = [len(grid) for grid in grids]
    cell = 30 if max(sizes) <= 10 else 20 if max(sizes) <= 20 else 14
    inner = cell * sum(sizes) + _GAP * (len(sizes) - 1)
    figure = make_subplots(
        rows=len(present),
        shared_xaxes=True,
        row_heights=[float(size) for size in sizes],
        vertical_spacing=_GAP / inner if len(sizes) > 1 else 0,
    )
    for row, (unit, grid) in enumerate(zip(present, grids, strict=True), 1):
        trace = {
            **_cells(grid),
            "x": list(range(n_layers)),
            "y": [_LETTERS[unit].format(index) for index in range(len(grid))],
            "texttemplate": "%{text}" if n_layers <= MOST_WITH_TEXT else "",
            "textfont": {"size": 10},
            "hovertemplate": "<b>%{customdata[0]}</b><br>recovery %{z:.3f}<br>%{customdata[1]}<extra></extra>",
        }
        figure.add_trace(trace, row=row, col=1)
        dtick = 1 if len(grid) <= 20 else 4
        figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, dtick=dtick, row=row, col=1)
    mark_past_anchor(figure, n_layers=n_layers, anchor_layer=anchor_layer)
    figure.update_xaxes(range=[-0.5, n_layers - 0.5], dtick=layer_tick(n_layers), showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="layer", row=len(present), col=1)
    figure.update_layout(coloraxis=_scale(grids))
    words = " and ".join(unit_style(unit).one for unit in present)
    return styled(figure, title=f"Recovery of every {words}, by layer", height=inner + 96, top=8)


def task_map(tables: Mapping[str, pd.DataFrame], units: Sequence[str], *, per_unit: int = 6) -> go.Figure:
    """Recovery of the leading components in every task; bold where a component serves the task.

    Args:
        tables: Task -> its table.
        units: Which units to show.
        per_unit: Components of each unit: those with the highest recovery in any task.
    """
    chosen = leading(tables, units, per_unit=per_unit)
    found = [{score.address: score for score in read_scores(table)} for table in tables.values()]
    serving = [set(table["component"][serves(table)]) for table in tables.values()]
    grid = [[scores.get(address) for scores in found] for address in chosen]
    texts = [
        ["" if score is None else f"<b>{score.text}</b>" if score.address in those else score.text
         for score, those in zip(row, serving, strict=True)]
        for row in grid
    ]  # fmt: skip
    figure = go.Figure()
    trace = {
        **_cells(grid),
        "x": [plain(task) for task in tables],
        "y": chosen,
        "text": texts,
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertemplate": "<b>%{y}</b> in %{x}<br>recovery %{z:.3f}<br>%{customdata[1]}<extra></extra>",
    }
    figure.add_trace(trace)
    figure.update_layout(coloraxis=_scale([grid]), plot_bgcolor=GREY)
    figure.update_xaxes(showgrid=False, tickangle=-35)
    figure.update_yaxes(autorange="reversed", showgrid=False, dtick=1)
    shown_units = dict.fromkeys(Component.parse(address).unit for address in chosen)
    words = [unit_style(unit).many for unit in shown_units]
    title = f"Recovery of the leading {' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))} in every task"
    return styled(figure, title=title, height=138 + 23 * len(chosen), top=8)


def leading(tables: Mapping[str, pd.DataFrame], units: Sequence[str], *, per_unit: int) -> list[str]:
    """Addresses with the highest recovery in any task, so many of each unit, ordered by unit, layer and index."""
    best: dict[Component, float] = {}
    for table in tables.values():
        for score in read_scores(table[table["unit"].isin(list(units))]):
            best[score.component] = max(score.recovery, best.get(score.component, score.recovery))
    found: list[str] = []
    for unit in UNITS:
        own = sorted((member for member in best if member.unit == unit), key=lambda member: -best[member])[:per_unit]
        found += [member.address for member in sorted(own, key=lambda member: (member.layer or 0, member.index or 0))]
    return found


def _grid(scores: Sequence[Score], *, n_layers: int) -> Grid:
    """Scores by index and layer; None where nothing was measured."""
    n_indices = 1 + max(score.component.index or 0 for score in scores)
    grid: Grid = [[None] * n_layers for _ in range(n_indices)]
    for score in scores:
        grid[score.component.index or 0][score.component.layer or 0] = score
    return grid


def _cells(grid: Grid) -> dict[str, object]:
    """What every map of scores has in common."""
    return {
        "type": "heatmap",
        "z": [[None if score is None else score.recovery for score in row] for row in grid],
        "text": [["" if score is None else score.text for score in row] for row in grid],
        "customdata": [
            [["", ""] if score is None else [score.address, score.interval] for score in row] for row in grid
        ],
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
    }


def _scale(grids: Sequence[Grid]) -> dict[str, object]:
    """A diverging scale centred on 0 that reaches the largest value on both sides, and never colours mere rounding."""
    sizes = (abs(score.recovery) for grid in grids for row in grid for score in row if score is not None)
    limit = max(max(sizes, default=0.0), SMALLEST_SCALE)
    return color_axis(limit)
