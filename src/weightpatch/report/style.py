"""How figures look: colours that colour-blind readers can tell apart, names of units in words, one plain template."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

DIVERGING: tuple[str, ...] = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
"""ColorBrewer RdBu, blue for what adds; its middle belongs to 0."""

GREY = "rgba(128, 128, 128, 0.16)"
BASE, SPECIALIZED = "#E69F00", "#0072B2"

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
RECOVERY = "recovery (share of the gap)"


@dataclass(frozen=True, kw_only=True)
class UnitStyle:
    """How one unit is named and drawn.

    Attributes:
        one: Its name in words.
        many: The plural.
        color: Out of Okabe and Ito's palette, or Paul Tol's.
        symbol: A plotly marker, so that colour is never the only difference.
    """

    one: str
    many: str
    color: str
    symbol: str


UNIT_STYLES: dict[str, UnitStyle] = {
    "blocks": UnitStyle(one="block", many="blocks", color="#7F7F7F", symbol="square"),
    "attns": UnitStyle(one="attention", many="attentions", color="#0072B2", symbol="circle"),
    "mlps": UnitStyle(one="MLP", many="MLPs", color="#D55E00", symbol="diamond"),
    "heads": UnitStyle(one="head", many="heads", color="#56B4E9", symbol="triangle-up"),
    "heads.q": UnitStyle(one="head, query rows", many="heads, query rows", color="#CC79A7", symbol="triangle-left"),
    "heads.o": UnitStyle(
        one="head, output columns", many="heads, output columns", color="#E69F00", symbol="triangle-right"
    ),
    "kvs": UnitStyle(one="key/value group", many="key/value groups", color="#009E73", symbol="hexagon"),
    "neurons": UnitStyle(one="neuron", many="neurons", color="#E69F00", symbol="cross"),
    "experts": UnitStyle(one="expert", many="experts", color="#332288", symbol="hourglass"),
    "routers": UnitStyle(one="router", many="routers", color="#882255", symbol="bowtie"),
    "norms": UnitStyle(one="norm", many="norms", color="#CC79A7", symbol="star"),
    "rests": UnitStyle(one="rest", many="rests", color="#B8A400", symbol="x"),
    "ends": UnitStyle(one="end", many="ends", color="#8C6D31", symbol="pentagon"),
}


SPAN_COLORS: dict[str, str] = {
    "template": "#7F7F7F", "system": "#CC79A7", "query": "#0072B2", "instruction": "#D55E00", "response": "#009E73",
    "last": "#E69F00",
}  # fmt: skip
"""Spans of a prompt, of the same palette."""


def unit_style(unit: str) -> UnitStyle:
    """The style of a unit; a plain one for a unit that has none."""
    return UNIT_STYLES.get(unit, UnitStyle(one=unit, many=unit, color="#7F7F7F", symbol="circle"))


_AXIS = {
    "gridcolor": "#e6e8eb",
    "linecolor": "#c3c8ce",
    "zerolinecolor": "#8a929b",
    "zerolinewidth": 1,
    "ticks": "",
    "automargin": True,
    "ticklabelstandoff": 4,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": "#1c2024"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS,
        "yaxis": {**_AXIS, "title": {"standoff": 10}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
        "title": {"x": 0, "xref": "paper", "font": {"size": 15}},
        "dragmode": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#9aa5b1", "activecolor": "#5b6570"},
    }
)


def styled(figure: go.Figure, *, title: str, height: int, top: int = 44) -> go.Figure:
    """The figure with its title, height and this module's template; its width follows the page.

    Args:
        figure: Changed in place.
        title: What is shown, in words.
        height: Of the whole figure, in pixels.
        top: Room above the axes for title and legend, in pixels.
    """
    margin = {"l": 8, "r": 12, "t": top, "b": 40}
    figure.update_layout(template=TEMPLATE, title_text=title, height=height, margin=margin, autosize=True)
    return figure


def plain(text: str) -> str:
    """Text as it may stand in a figure, whose labels read markup."""
    return escape(text, quote=False)


def span_color(span: str) -> str:
    """The color of a span of a prompt; grey for one that has none."""
    return SPAN_COLORS.get(span, "#7F7F7F")


def color_axis(limit: float, *, title: str = RECOVERY) -> dict[str, object]:
    """The diverging scale as a figure's `coloraxis`, centred on 0, its key above the figure's right end.

    Args:
        limit: Value at both ends.
        title: Of the key.
    """
    return {
        "colorscale": [[place / (len(DIVERGING) - 1), color] for place, color in enumerate(DIVERGING)],
        "cmin": -limit,
        "cmid": 0,
        "cmax": limit,
        "colorbar": {
            "orientation": "h",
            "thickness": 9,
            "lenmode": "pixels",
            "len": 230,
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "ypad": 7,
            "title": {"text": title, "side": "top", "font": {"size": 11}},
            "tickfont": {"size": 10},
            "nticks": 5,
            "outlinewidth": 0,
        },
    }
