"""Figures of what was generated: where steering works, and what joint patches bring back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightpatch.anchor import Anchor
from weightpatch.report.figures import layer_tick
from weightpatch.report.hierarchy import NULL_QUANTILE, OUTLINE, ROLE_COLORS, intervals_in_words
from weightpatch.report.style import plain, styled

if TYPE_CHECKING:
    import pandas as pd

_SPANS = {
    "prompt": ("held at the prompt's readout positions", "#0072B2", "circle"),
    "answer": ("held there and at every token of the answer", "#D55E00", "diamond"),
}
_MEASURES = (
    ("recovery", "readout", "#0072B2", "circle"),
    ("kl_recovery", "KL", "#009E73", "diamond"),
    ("passed", "passed", "#D55E00", "square"),
)


MOST_BARS = 12
"""Components past the anchor of which a figure shows what they are worth."""


@dataclass(frozen=True, kw_only=True)
class _Arm:
    color: str
    dash: str
    symbol: str


_ARMS = {
    "top": _Arm(color="#0072B2", dash="solid", symbol="circle"),
    "random": _Arm(color="#7F7F7F", dash="dot", symbol="circle-open"),
    "layer-matched": _Arm(color="#D55E00", dash="dash", symbol="square-open"),
    "largest differences": _Arm(color="#CC79A7", dash="dashdot", symbol="triangle-up-open"),
    "activation": _Arm(color="#009E73", dash="longdash", symbol="diamond-open"),
    "bottom": _Arm(color="#E69F00", dash="longdashdot", symbol="triangle-down-open"),
}
_OTHER_ARM = _Arm(color="#7F7F7F", dash="dot", symbol="x-open")
"""For an arm of another version."""


def steering_figure(anchor: Anchor) -> go.Figure:
    """How much steering the base raises its pass rate, by layer, and which layer the anchor took.

    Args:
        anchor: One whose report has behaviour.
    """
    figure = go.Figure()
    behaviour = anchor.report.behaviour if anchor.report else None
    for span, by_layer in sorted((behaviour.search if behaviour else {}).items()):
        layers = sorted(by_layer)
        chosen = [behaviour is not None and (span, layer) == (behaviour.span, anchor.layer) for layer in layers]
        name, color, symbol = _SPANS[span]
        trace = {
            "type": "scatter",
            "x": layers,
            "y": [by_layer[layer] for layer in layers],
            "mode": "lines+markers",
            "line": {"color": color, "width": 1.5, "dash": "solid" if span == "prompt" else "dot"},
            "marker": {
                "color": color,
                "size": [14 if own else 7 for own in chosen],
                "symbol": ["star" if own else symbol for own in chosen],
            },
            "hovertemplate": "layer %{x}: %{y:+.2f}<extra></extra>",
            "name": name,
        }
        figure.add_trace(trace)
    layers = [layer for by_layer in (behaviour.search.values() if behaviour else ()) for layer in by_layer]
    tick = layer_tick(max(layers) - min(layers) + 1) if layers else 1
    figure.update_xaxes(title_text="layer whose input is held", dtick=tick, zeroline=False)
    figure.update_yaxes(title_text="rise of the pass rate")
    title = f"Steering the base, on prompts kept out of the gates; the star is the anchor, layer {anchor.layer}"
    return styled(figure, title=title, height=260, top=56)


def curve_figure(points: Sequence[Mapping[str, Any]], *, recipient: str) -> go.Figure:
    """What comes back (or is lost) as more of the leading components are patched, beside controls.

    Above the anchor's readout for all arms; below the output and the answers, for the leading and the random sets.

    Args:
        points: Of a `validation.json`.
        recipient: `base` or `specialized`: which of the points.
    """
    own = [point for point in points if point["recipient"] == recipient]
    arms = sorted(dict.fromkeys(str(point["arm"]) for point in own), key=lambda arm: arm == "top")
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    shown: set[str] = set()
    for arm in arms:  # the leading ones last, on top of the others
        look = _ARMS.get(_kind(arm), _OTHER_ARM)
        name = "leading" if arm == "top" else plain(_kind(arm))
        for row, (key, measure, color, symbol) in enumerate(_MEASURES):
            if row and _kind(arm) not in ("top", "random"):
                continue
            chosen = [point for point in own if (_shared(point) or point["arm"] == arm) and point[key] is not None]
            chosen = sorted(chosen, key=lambda point: int(point["k"]))
            if not chosen:
                continue
            values = [_value(point[key]) for point in chosen]
            is_top = arm == "top"
            label = f"{measure}, {name}" if row else name
            trace = {
                "type": "scatter",
                "x": [str(point["k"]) for point in chosen],
                "y": [value for value, _, _ in values],
                "mode": "lines+markers",
                "line": {
                    "color": color if row else look.color,
                    "width": 3 if is_top and not row else 2 if is_top else 1.25,
                    "dash": look.dash,
                },
                "marker": {
                    "color": color if row else look.color,
                    "size": 8 if is_top else 6,
                    "symbol": symbol if is_top else f"{symbol}-open" if row else look.symbol,
                },
                "error_y": {
                    "array": [high - value for value, _, high in values],
                    "arrayminus": [value - low for value, low, _ in values],
                    "thickness": 1,
                    "width": 2,
                },
                "hovertemplate": f"{plain(arm)}, {measure}<br>%{{x}} components: %{{y:.3f}}<extra></extra>",
                "name": label,
                "legendgroup": label,
                "legend": "legend2" if row else "legend",
                "showlegend": label not in shown,
            }
            shown.add(label)
            figure.add_trace(trace, row=2 if row else 1, col=1)
    counts = sorted({int(point["k"]) for point in own})
    figure.update_xaxes(type="category", categoryarray=[str(count) for count in counts])
    figure.update_xaxes(title_text="components patched together (not to scale)", row=2, col=1)
    figure.update_yaxes(zeroline=True)
    figure.update_yaxes(title_text="recovery, readout", row=1, col=1)
    figure.update_yaxes(title_text="output, answers", row=2, col=1)
    what = "specialized weights into the base" if recipient == "base" else "base weights into the specialized model"
    styled(figure, title=f"Patched together: {what}", height=560, top=64)
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "reversed"}
    figure.update_layout(legend={"traceorder": "reversed"}, legend2=below, margin_b=100)
    return figure


def executors_figure(table: pd.DataFrame, *, null: float | None = None, most: int = MOST_BARS) -> go.Figure:
    """What the steered base's output loses without single components past the anchor: the largest losses.

    Args:
        table: Of one task.
        null: Loss below which `NULL_QUANTILE` of the null lies; marked.
        most: Components to show.
    """
    own = table[table["loss"].notna()].nlargest(most, "loss") if "loss" in table else table.iloc[:0]
    figure = go.Figure()
    names = [plain(str(name)) for name in own["component"]]
    for role in ("executor", "none"):
        some = own[own["role"] == role]
        if some.empty:
            continue
        trace = {
            "type": "bar",
            "orientation": "h",
            "x": some["loss"].tolist(),
            "y": [plain(str(name)) for name in some["component"]],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": (some["loss_high"] - some["loss"]).tolist(),
                "arrayminus": (some["loss"] - some["loss_low"]).tolist(),
                "color": OUTLINE,
                "thickness": 1.25,
                "width": 3,
            },
            "customdata": intervals_in_words(some, "loss", "loss_low", "loss_high"),
            "name": role,
            "marker": {"color": ROLE_COLORS[role]},
            "hovertemplate": "<b>%{y}</b>, " + role + "<br>loss %{customdata}<extra></extra>",
        }
        figure.add_trace(trace)
    if null is not None:
        figure.add_vline(x=null, line={"color": "#CC79A7", "width": 2, "dash": "dash"})
    figure.update_xaxes(title_text="share of the way that is lost", zeroline=True)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    figure.update_layout(barmode="overlay", bargap=0.3, showlegend=True)
    return styled(figure, title="What the output loses without them", height=110 + 24 * len(names))


def null_of_losses(record: Mapping[str, Any]) -> float | None:
    """The loss below which `NULL_QUANTILE` of the null lies; None where there is no null.

    Args:
        record: An `executors.json`.
    """
    null = np.array(record.get("null", []), dtype=float)
    if null.ndim != 3 or not null.size:
        return None
    return float(np.quantile(null.mean(axis=2) / np.mean(record["base_kl"]), NULL_QUANTILE))


def _kind(arm: str) -> str:
    """An arm without the number of its draw."""
    return arm.rstrip("0123456789").rstrip()


def _shared(point: Mapping[str, Any]) -> bool:
    """Nothing patched, or everything: neither leading nor random."""
    return point["share"] in (0, 1)


def _value(found: Any) -> tuple[float, float, float]:
    """A value with its interval; without one, the value thrice."""
    if isinstance(found, Mapping):
        value = float(found["estimate"])
        bounds = [value if found[end] is None else float(found[end]) for end in ("low", "high")]
        return value, bounds[0], bounds[1]
    return float(found), float(found), float(found)
