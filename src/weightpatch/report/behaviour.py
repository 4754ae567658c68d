"""Figures of what was generated: where steering works, and what joint patches bring back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from weightpatch.anchor import Anchor
from weightpatch.report.figures import layer_tick
from weightpatch.report.style import styled

_SPANS = {
    "prompt": ("held at the prompt's readout positions", "#0072B2", "circle"),
    "answer": ("held there and at every token of the answer", "#D55E00", "diamond"),
}
_MEASURES = (
    ("recovery", "anchor's readout", "#0072B2", "circle"),
    ("kl_recovery", "output (1 - KL / KL of the base)", "#009E73", "diamond"),
    ("passed", "answers that pass", "#D55E00", "square"),
)


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
    """What comes back (or is lost) as more of the leading components are patched, beside random sets.

    Args:
        points: Of a `validation.json`.
        recipient: `base` or `specialized`: which of the points.
    """
    figure = go.Figure()
    own = [point for point in points if point["recipient"] == recipient]
    for key, name, color, symbol in _MEASURES:
        for is_top in (True, False):
            chosen = [point for point in own if _shared(point) or (point["arm"] == "top") == is_top]
            chosen = sorted((point for point in chosen if point[key] is not None), key=lambda point: point["k"])
            if not chosen:
                continue
            values = [_value(point[key]) for point in chosen]
            trace = {
                "type": "scatter",
                "x": [str(point["k"]) for point in chosen],
                "y": [value for value, _, _ in values],
                "mode": "lines+markers",
                "line": {"color": color, "width": 2 if is_top else 1, "dash": "solid" if is_top else "dot"},
                "marker": {"color": color, "size": 8, "symbol": symbol if is_top else f"{symbol}-open"},
                "error_y": {
                    "array": [high - value for value, _, high in values],
                    "arrayminus": [value - low for value, low, _ in values],
                    "thickness": 1,
                    "width": 2,
                },
                "hovertemplate": "%{x} components: %{y:.3f}<extra></extra>",
                "name": f"{name}, {'leading' if is_top else 'random'}",
            }
            figure.add_trace(trace)
    counts = sorted({int(point["k"]) for point in own})
    figure.update_xaxes(
        title_text="components patched together (not to scale; none and all are the same for both)",
        type="category",
        categoryarray=[str(count) for count in counts],
    )
    figure.update_yaxes(title_text="share", zeroline=True)
    what = "specialized weights into the base" if recipient == "base" else "base weights into the specialized model"
    return styled(figure, title=f"Patched together: {what}", height=340, top=76)


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
