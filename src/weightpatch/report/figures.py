"""The figures of a report, each a pure function of a table of effects or of an anchor; for notebooks as well.

A table is what `Effects.table` returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from weightpatch.anchor import Anchor
from weightpatch.component import Component
from weightpatch.report.scores import Score, read_scores
from weightpatch.report.style import BASE, GREY, RECOVERY, SPECIALIZED, styled, unit_style

if TYPE_CHECKING:
    import pandas as pd

MODULES = ("blocks", "attns", "mlps")
"""Units of which a layer has one, so that a line over layers can show them."""

MOST_GROUPS = 4
"""Key/value groups to a layer up to which each is drawn beside the modules; beyond it the map alone shows them."""


def difference_figure(differences: pd.DataFrame) -> go.Figure:
    """Where the weights of the pair differ: relative norm of attention and MLP, layer by layer.

    Args:
        differences: Columns component and relative_norm, as in a run's manifest.
    """
    figure = go.Figure()
    found = [Component.parse(str(address)) for address in differences["component"]]
    norms = dict(zip(found, differences["relative_norm"].astype(float), strict=True))
    for unit in ("attns", "mlps"):
        members = [component for component in found if component.unit == unit]
        look = unit_style(unit)
        trace = {
            "type": "scatter",
            "x": [member.layer for member in members],
            "y": [_finite(norms[member]) for member in members],
            "customdata": [[member.address] for member in members],
            "name": look.one,
            "mode": "lines+markers",
            "line": {"color": look.color, "width": 1.5},
            "marker": {"color": look.color, "symbol": look.symbol, "size": 7},
            "hovertemplate": "%{customdata[0]}: %{y:.4f}<extra></extra>",
        }
        figure.add_trace(trace)
    n_layers = 1 + max((member.layer or 0 for member in found), default=0)
    figure.update_xaxes(title_text="layer", dtick=layer_tick(n_layers), range=[-0.5, n_layers - 0.5], zeroline=False)
    figure.update_yaxes(title_text="relative norm", rangemode="tozero")
    return styled(figure, title="How far the weights moved, layer by layer", height=220, top=34)


def search_figure(anchor: Anchor) -> go.Figure:
    """How strongly the two models differ at every layer that was searched, and which layer the anchor took.

    Args:
        anchor: One with a report.
    """
    found = dict(anchor.report.search) if anchor.report else {}
    layers = sorted(found)
    figure = go.Figure()
    trace = {
        "type": "scatter",
        "x": layers,
        "y": [_finite(found[layer]) for layer in layers],
        "mode": "lines+markers",
        "line": {"color": "#7F7F7F", "width": 1.5},
        "marker": {
            "size": [13 if layer == anchor.layer else 6 for layer in layers],
            "symbol": ["star" if layer == anchor.layer else "circle" for layer in layers],
            "color": ["#D55E00" if layer == anchor.layer else "#7F7F7F" for layer in layers],
            "opacity": 1,
            "line": {"width": 0},
        },
        "hovertemplate": "layer %{x}: %{y:.3f}<extra></extra>",
        "showlegend": False,
    }
    figure.add_trace(trace)
    figure.update_xaxes(title_text="layer whose input is read", dtick=layer_tick(len(layers)), zeroline=False)
    figure.update_yaxes(title_text="mean(gap) / std(gap)", rangemode="tozero")
    title = f"Layer search on held-out prompts; the star is the anchor, layer {anchor.layer}"
    return styled(figure, title=title, height=240, top=16)


def level_figure(anchor: Anchor) -> go.Figure:
    """Mean readout of both models with and without the instruction.

    Args:
        anchor: One with a report.
    """
    figure = go.Figure()
    if anchor.report is None:
        return figure
    levels = anchor.report.levels
    rows = (
        ("base", levels.base_without, levels.base_with, BASE),
        ("specialized", levels.specialized_without, levels.specialized_with, SPECIALIZED),
    )
    for name, without, with_, color in rows:
        trace = {
            "type": "scatter",
            "x": [without, with_],
            "y": [name, name],
            "mode": "lines+markers",
            "line": {"color": color, "width": 3},
            "marker": {
                "color": color,
                "size": 13,
                "symbol": ["circle-open", "circle"],
                "line": {"color": color, "width": 2.5},
            },
            "customdata": ["without the instruction", "with the instruction"],
            "hovertemplate": "%{y}, %{customdata}: %{x:.4g}<extra></extra>",
            "showlegend": False,
        }
        figure.add_trace(trace)
    for name, symbol in (("without the instruction", "circle-open"), ("with the instruction", "circle")):
        marker = {"color": "#7F7F7F", "size": 11, "symbol": symbol, "line": {"color": "#7F7F7F", "width": 2.5}}
        figure.add_trace(
            {"type": "scatter", "x": [None], "y": ["base"], "mode": "markers", "marker": marker, "name": name}
        )
    figure.update_xaxes(title_text=f"mean readout ({anchor.readout} on the anchor)")
    figure.update_yaxes(range=[1.6, -0.6], showgrid=False)
    return styled(figure, title="Reference levels of the readout", height=240, top=40)


def layer_figure(table: pd.DataFrame, *, n_layers: int, anchor_layer: int) -> go.Figure:
    """Recovery of each layer's block, attention and MLP with intervals; of its key/value groups where they are few.

    Nothing is summed: every point is one component that was patched alone.

    Args:
        table: Of one task.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
    """
    figure = go.Figure()
    members = {unit: read_scores(table[table["unit"] == unit]) for unit in (*MODULES, "kvs")}
    last_group = max((score.component.index or 0 for score in members["kvs"]), default=0)
    chosen = [unit for unit, scores in members.items() if scores and (unit != "kvs" or last_group < MOST_GROUPS)]
    for place, unit in enumerate(chosen):
        scores = sorted(members[unit], key=lambda score: score.component.layer or 0)
        look = unit_style(unit)
        alone = unit == "kvs"
        beside = (place - (len(chosen) - 1) / 2) * 0.14  # so that intervals do not lie on each other
        between = [0.05 * ((score.component.index or 0) - last_group / 2) * alone for score in scores]
        trace = {
            "type": "scatter",
            "x": [(score.component.layer or 0) + beside + more for score, more in zip(scores, between, strict=True)],
            "y": [score.recovery for score in scores],
            "error_y": _bars(scores, look.color),
            "customdata": [[score.address, score.interval] for score in scores],
            "name": f"{look.one}, each one alone" if alone else look.one,
            "mode": "markers" if alone else "lines+markers",
            "line": {"color": look.color, "width": 1.25},
            "marker": {"color": look.color, "symbol": look.symbol, "size": 6 if alone else 7},
            "hovertemplate": "<b>%{customdata[0]}</b><br>recovery %{y:.3f}<br>%{customdata[1]}<extra></extra>",
        }
        figure.add_trace(trace)
    figure.update_xaxes(title_text="layer", dtick=layer_tick(n_layers), range=[-0.5, n_layers - 0.5], zeroline=False)
    figure.update_yaxes(title_text=RECOVERY)
    mark_past_anchor(figure, n_layers=n_layers, anchor_layer=anchor_layer)
    return styled(figure, title="Recovery layer by layer, with bootstrap 95 % intervals", height=350)


def forest_figure(top: pd.DataFrame) -> go.Figure:
    """Recovery and interval of some components, one to a line, in the order of the rows.

    Args:
        top: Rows of a table, for instance `Effects.top()`.
    """
    figure = go.Figure()
    scores = read_scores(top)
    for unit in dict.fromkeys(score.component.unit for score in scores):
        own = [score for score in scores if score.component.unit == unit]
        look = unit_style(unit)
        trace = {
            "type": "scatter",
            "x": [score.recovery for score in own],
            "y": [score.address for score in own],
            "error_x": _bars(own, look.color),
            "customdata": [score.interval for score in own],
            "name": look.one,
            "mode": "markers",
            "marker": {"color": look.color, "symbol": look.symbol, "size": 10},
            "hovertemplate": "<b>%{y}</b><br>recovery %{x:.3f}<br>%{customdata}<extra></extra>",
        }
        figure.add_trace(trace)
    order = [score.address for score in reversed(scores)]
    figure.update_xaxes(title_text=RECOVERY, rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.6, len(order) - 0.4])
    title = f"The {len(scores)} components with the highest recovery, with bootstrap 95 % intervals"
    return styled(figure, title=title, height=96 + 21 * len(scores))


def mark_past_anchor(figure: go.Figure, *, n_layers: int, anchor_layer: int, label: bool = True) -> None:
    """Shade the layers at or past the anchor, whose effect is 0 by construction; layers lie on every x axis.

    Args:
        figure: Changed in place.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
        label: Say in the shaded part what it is, where it is wide enough.
    """
    edge = anchor_layer - 0.5
    figure.add_vline(x=edge, line={"color": "#7F7F7F", "width": 1.5, "dash": "dot"})
    if anchor_layer >= n_layers:
        return
    figure.add_vrect(x0=edge, x1=n_layers - 0.5, fillcolor=GREY, line_width=0, layer="below")
    if label:
        figure.add_annotation(
            x=(edge + n_layers - 0.5) / 2,
            xref="x",
            y=0.5,
            yref="y domain",
            text="at or past the anchor:<br>0 by construction,<br>not measured",
            textangle=0 if (n_layers - anchor_layer) / n_layers >= 0.25 else -90,
            showarrow=False,
            font={"size": 11},
        )


def layer_tick(n_layers: int) -> int:
    """Layers between two labels of an axis."""
    return 1 if n_layers <= 12 else 2 if n_layers <= 32 else 4


def _bars(scores: Sequence[Score], color: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [score.high - score.recovery for score in scores],
        "arrayminus": [score.recovery - score.low for score in scores],
        "color": color,
        "thickness": 1.5,
        "width": 3,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
