"""Figures of a screening: what is estimated of every component, and how far exact patches bear it out.

A table is what `Run.screen_table` returns: a row for each component, up to a million of them. Figures hold what was
counted over the rows, never the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightpatch.report.figures import layer_tick, mark_past_anchor
from weightpatch.report.style import plain, span_color, styled, unit_style

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)

PER_LAYER = 3
"""Components of every layer that are drawn one by one."""

MOST_POINTS = 1500
"""Points of all the figures that set estimates against exact effects."""

N_RANKS = 200
"""Points of a line that runs over the ranks of all components."""

SPAN = "span."
"""How the columns begin that hold the part of a recovery that acts at the tokens of one span."""

_ESTIMATED = "estimated recovery"
_QUIET = "#6b7580"
_APPROXIMATIONS = {
    "outputs": "the change of what the component itself writes, times the readout's gradient in the base",
    "weights": "the difference of its parameters between the two models, times the readout's gradient in the base",
    "ig": "the difference of its parameters, times the readout's gradient averaged over {n_steps} points on "
    "the way between the two models",
}
_CHOSEN = (("top", "circle"), ("random", "circle-open"), ("both", "circle-open-dot"))


def approximation(settings: Mapping[str, Any]) -> str:
    """How components were estimated, in words.

    Args:
        settings: Of a `screen.json`.
    """
    how = settings["estimation"]
    words = _APPROXIMATIONS.get(how["approximation"], str(how["approximation"])).format(n_steps=how["n_steps"])
    return f"{words}, as sizes" if how["grad_drop"] else words


def largest_unit(table: pd.DataFrame) -> str | None:
    """The unit with the most components that lie in a layer; None when none does."""
    counts = table.loc[table["layer"].notna(), "unit"].value_counts(sort=False)
    return str(counts.idxmax()) if len(counts) else None


def span_names(table: pd.DataFrame) -> list[str]:
    """Spans by which the recovery of a table is split; none where estimates are no sums over tokens."""
    return [name.removeprefix(SPAN) for name in table.columns if name.startswith(SPAN)]


def best_patched(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The rows with the highest exact recovery over all units, best first."""
    columns = ["component", "unit", "recovery", "ci_low", "ci_high", "exact_recovery", "chosen"]
    patched = table.loc[table["exact_recovery"].notna(), columns]
    return patched.sort_values("exact_recovery", ascending=False, kind="stable").head(n).reset_index(drop=True)


def spread_figure(table: pd.DataFrame, unit: str, *, n_layers: int, anchor_layer: int) -> go.Figure:
    """Estimates of one unit by layer: the largest of each layer one by one, and below them quantiles of all.

    Args:
        table: Of one task.
        unit: Which unit.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
    """
    look = unit_style(unit)
    own = table[(table["unit"] == unit) & table["layer"].notna()]
    layers = own["layer"].astype(int)
    sizes = own["recovery"].abs().sort_values(ascending=False, kind="stable")
    leading = own.loc[sizes.groupby(layers).head(PER_LAYER).index]
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.55, 0.45], vertical_spacing=0.07)
    for is_patched in (True, False):
        points = leading[leading["exact_recovery"].notna() == is_patched]
        exact = [f"exact {value:.5f}" if is_patched else "not patched exactly" for value in points["exact_recovery"]]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": points["layer"].astype(int).tolist(),
            "y": _short(points["recovery"]),
            "customdata": [[plain(name), words] for name, words in zip(points["component"], exact, strict=True)],
            "name": f"among the {PER_LAYER} largest, {'patched exactly too' if is_patched else 'only estimated'}",
            "marker": {"color": look.color, "symbol": "circle" if is_patched else "circle-open", "size": 7},
            "hovertemplate": "<b>%{customdata[0]}</b><br>estimated %{y:.5f}<br>%{customdata[1]}<extra></extra>",
        }
        figure.add_trace(trace, row=1, col=1)
    for trace in _bands(own["recovery"].groupby(layers), look.color):
        figure.add_trace(trace, row=2, col=1)
    mark_past_anchor(figure, n_layers=n_layers, anchor_layer=anchor_layer)
    figure.update_xaxes(range=[-0.5, n_layers - 0.5], dtick=layer_tick(n_layers), zeroline=False)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(title_text=_ESTIMATED)
    figure.update_layout(barmode="overlay")
    return styled(figure, title=f"Estimated recovery of {len(own):,} {look.many}, by layer", height=460, top=56)


def _bands(by_layer: Any, color: str) -> list[dict[str, Any]]:
    """Bars from quantile to quantile, layer by layer, and the median."""
    found = by_layer.quantile(list(QUANTILES)).unstack()
    layers = found.index.tolist()
    lowest, low, middle, high, highest = (found[share] for share in QUANTILES)
    counts = by_layer.size()
    about = [
        f"{count:,} in layer {layer}<br>1 to 99 %: {values[0]:.3g} to {values[4]:.3g}<br>"
        f"25 to 75 %: {values[1]:.3g} to {values[3]:.3g}<br>median {values[2]:.3g}"
        for layer, count, values in zip(layers, counts, found.to_numpy(), strict=True)
    ]
    bars = [
        {
            "type": "bar",
            "x": layers,
            "base": _short(start),
            "y": _short(end - start),
            "width": width,
            "name": name,
            "marker": {"color": _faint(color, opacity), "line": {"width": 0}},
            "hovertext": about,
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        for name, start, end, width, opacity in (
            ("1 to 99 % of the layer", lowest, highest, 0.7, 0.35),
            ("25 to 75 %", low, high, 0.7, 0.9),
        )
    ]
    line = {
        "type": "scatter",
        "mode": "markers",
        "x": layers,
        "y": _short(middle),
        "name": "median",
        "marker": {"symbol": "line-ew-open", "size": 9, "color": _QUIET, "line": {"width": 2, "color": _QUIET}},
        "hoverinfo": "skip",
    }
    return [*bars, line]


def sum_figure(table: pd.DataFrame) -> go.Figure:
    """Running sum of the estimated recoveries, from the largest down, unit by unit.

    Args:
        table: Of one task.
    """
    figure = go.Figure()
    for unit, values in table.groupby("unit", sort=False)["recovery"]:
        _add_line(figure, str(unit), np.cumsum(-np.sort(-values.to_numpy(dtype=float))), form=".4f")
    figure.update_xaxes(title_text="components, the highest recovery first", type="log", tickformat=",d", dtick=1)
    figure.update_yaxes(title_text="sum of estimated recoveries")
    return styled(figure, title="How estimates add up, from the highest down", height=320)


def concentration_figure(table: pd.DataFrame) -> go.Figure:
    """Share of the sum of all sizes that the largest hold, unit by unit; units that are all 0 have none.

    Args:
        table: Of one task.
    """
    figure = go.Figure()
    for unit, values in table.groupby("unit", sort=False)["recovery"]:
        sums = np.cumsum(-np.sort(-np.abs(values.to_numpy(dtype=float))))
        if sums[-1] > 0:
            _add_line(figure, str(unit), sums / sums[-1], form=".1%")
    figure.update_xaxes(title_text="components, the largest size first", type="log", tickformat=",d", dtick=1)
    figure.update_yaxes(title_text="share of the sum of sizes", tickformat=".0%", range=[0, 1.04])
    return styled(figure, title="How few of them hold most of the size", height=320)


def _add_line(figure: go.Figure, unit: str, by_rank: np.ndarray[Any, np.dtype[np.float64]], *, form: str) -> None:
    """A line over ranks on a logarithmic axis, drawn at a sample of them."""
    look = unit_style(unit)
    ranks = np.unique(np.geomspace(1, len(by_rank), N_RANKS).round().astype(int))
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": ranks.tolist(),
        "y": _short(by_rank[ranks - 1]),
        "name": plain(look.many),
        "line": {"color": look.color, "width": 2},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 7, "maxdisplayed": 8},
        "hovertemplate": f"%{{x:,}} {plain(look.many)}: %{{y:{form}}}<extra></extra>",
    }
    figure.add_trace(trace)


def agreement_figure(table: pd.DataFrame, unit: str, *, most: int = MOST_POINTS) -> go.Figure:
    """Exact recovery against the estimate, for what was patched of one unit; the diagonal is where both are equal.

    Args:
        table: Of one task.
        unit: Which unit.
        most: Points to draw; of more, evenly chosen ones in the order of their estimates.
    """
    look = unit_style(unit)
    own = table[(table["unit"] == unit) & table["exact_recovery"].notna()].sort_values("recovery", kind="stable")
    drawn = own.iloc[np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))]
    figure = go.Figure()
    ends = _short(
        [drawn[["recovery", "exact_recovery"]].min().min(), drawn[["recovery", "exact_recovery"]].max().max()]
    )
    diagonal = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip", "showlegend": False}
    figure.add_trace({**diagonal, "line": {"color": "#7F7F7F", "width": 1, "dash": "dot"}})
    for chosen, symbol in _CHOSEN:
        points = drawn[drawn["chosen"] == chosen]
        if points.empty:
            continue
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": _short(points["recovery"]),
            "y": _short(points["exact_recovery"]),
            "text": [plain(name) for name in points["component"]],
            "name": chosen,
            "marker": {"color": look.color, "symbol": symbol, "size": 7},
            "hovertemplate": "<b>%{text}</b><br>estimated %{x:.5f}<br>exact %{y:.5f}<extra></extra>",
        }
        figure.add_trace(trace)
    figure.update_xaxes(title_text=_ESTIMATED, nticks=5)
    figure.update_yaxes(title_text="exact recovery", nticks=6)
    figure.update_layout(showlegend=True)
    part = "" if len(drawn) == len(own) else f", {len(drawn):,} drawn"
    return styled(figure, title=f"{look.many}: {len(own):,} patched{part}", height=300)


def span_figure(table: pd.DataFrame, unit: str, *, n_layers: int, anchor_layer: int) -> go.Figure:
    """Summed estimates of one unit by layer, split by the span of the prompt at whose tokens they act.

    Args:
        table: Of one task, with columns of spans.
        unit: Which unit.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
    """
    look = unit_style(unit)
    own = table[(table["unit"] == unit) & table["layer"].notna()]
    names = span_names(table)
    sums = own[[SPAN + name for name in names]].groupby(own["layer"].astype(int)).sum()
    figure = go.Figure()
    for name in names:
        trace = {
            "type": "bar",
            "x": sums.index.tolist(),
            "y": _short(sums[SPAN + name]),
            "name": plain(name),
            "marker": {"color": span_color(name), "line": {"width": 0}},
            "hovertemplate": f"layer %{{x}}, {plain(name)}: %{{y:.4f}}<extra></extra>",
        }
        figure.add_trace(trace)
    whole = {
        "type": "scatter",
        "mode": "markers",
        "x": sums.index.tolist(),
        "y": _short(sums.sum(axis=1)),
        "name": "all spans",
        "marker": {"symbol": "diamond", "size": 8, "color": "#ffffff", "line": {"width": 1.5, "color": "#3a3f45"}},
        "hovertemplate": "layer %{x}, all spans: %{y:.4f}<extra></extra>",
    }
    figure.add_trace(whole)
    mark_past_anchor(figure, n_layers=n_layers, anchor_layer=anchor_layer)
    figure.update_xaxes(title_text="layer", range=[-0.5, n_layers - 0.5], dtick=layer_tick(n_layers), zeroline=False)
    figure.update_yaxes(title_text="sum of estimated recoveries", zeroline=True)
    figure.update_layout(barmode="relative", bargap=0.25)
    return styled(figure, title=f"Where in the prompts {look.many} act, by layer", height=340)


def _faint(color: str, opacity: float) -> str:
    """A color of six hexadecimal digits that lets through what is below it, in the legend too."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _short(values: Iterable[float]) -> list[float]:
    """Numbers with no more digits than a figure can show."""
    return [float(f"{value:.4g}") for value in values]
