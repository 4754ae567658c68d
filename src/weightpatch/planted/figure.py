"""The figure of `bench planted`: how well each method finds carriers, variant by variant."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightpatch.planted.scoring import ALL, Row
from weightpatch.report.style import styled, unit_style

_HEIGHT_OF_METHOD = 30


def score_figure(rows: Sequence[Row], *, among: str = "unit") -> go.Figure:
    """AUROC of every method with its interval, a panel to a variant: all plants in black, each unit in its colour.

    Args:
        rows: From `scoring.summarize`.
        among: Which components compete: `unit` or `all`.
    """
    chosen = [row for row in rows if row.among == among]
    variants = list(dict.fromkeys(row.variant for row in chosen if row.variant != ALL))
    methods = list(dict.fromkeys(row.method for row in chosen))
    units = list(dict.fromkeys(row.unit for row in chosen if row.unit != ALL))
    figure = make_subplots(cols=len(variants), shared_yaxes=True, subplot_titles=variants, horizontal_spacing=0.02)
    for column, variant in enumerate(variants, 1):
        for unit in [*units, ALL]:
            own = {row.method: row for row in chosen if (row.variant, row.unit) == (variant, unit)}
            shown = [own[method] for method in methods if method in own]
            look = unit_style("neurons" if unit == "groups" else unit)
            whole = unit == ALL
            figure.add_trace(
                {
                    "type": "scatter",
                    "x": [row.auroc for row in shown],
                    "y": [row.method for row in shown],
                    "mode": "markers",
                    "name": "all plants, 95 % interval"
                    if whole
                    else ("groups of neurons" if unit == "groups" else look.many),
                    "legendgroup": unit,
                    "showlegend": column == 1,
                    "marker": {
                        "color": "#1c2024" if whole else look.color,
                        "symbol": "line-ns" if whole else look.symbol,
                        "size": 11 if whole else 7,
                        "line": {"width": 2 if whole else 0, "color": "#1c2024"},
                        "opacity": 1 if whole else 0.75,
                    },
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": [row.ci_high - row.auroc for row in shown],
                        "arrayminus": [row.auroc - row.ci_low for row in shown],
                        "color": "#1c2024",
                        "thickness": 1.5,
                        "width": 0,
                        "visible": whole,
                    },
                    "hovertemplate": "%{y}: %{x:.3f}<extra>" + unit + "</extra>",
                },
                row=1,
                col=column,
            )
        figure.add_vline(x=0.5, line={"color": "#8a929b", "width": 1, "dash": "dot"}, row=1, col=column)
    figure.update_xaxes(range=[0, 1.05], dtick=0.5, title_text="AUROC")
    figure.update_yaxes(autorange="reversed")
    height = 150 + _HEIGHT_OF_METHOD * len(methods)
    styled(figure, title="How well methods find planted carriers", height=height, top=110)
    return figure.update_layout(legend={"y": 1 + 24 / (height - 150)})  # above the panels' titles
