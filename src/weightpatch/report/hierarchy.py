"""Figures of a trace: roles, where they lie, who supplies whom, what sources start, and what executors are worth.

A table is what `Run.roles` returns, a matrix what `Run.matrix` returns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from weightpatch.graph import OUTPUT, Edge, Graph, Node, Share
from weightpatch.paths import ANCHOR
from weightpatch.report.figures import layer_tick
from weightpatch.report.style import color_axis, plain, styled, unit_style
from weightpatch.roles import ROLES

if TYPE_CHECKING:
    import pandas as pd

MOST_EDGES = 40
"""Edges that are drawn."""

MOST_ROWS = 12
"""Suppliers of a map."""

MOST_WITH_TEXT = 24
"""Columns of a map up to which its cells bear numbers."""

MOST_NAMED = 6
"""Points of the roles' figure that bear their address."""

NULL_QUANTILE = 0.95

OUTLINE = "#7d8792"
"""Of intervals, means and whatever is no component; to be seen on light pages and dark ones."""

ROLE_COLORS: dict[str | None, str] = {
    "source": "#D55E00", "router": "#0072B2", "executor": "#009E73", "none": "#8A929B", None: "#E69F00",
}  # fmt: skip
"""Role -> color, of Okabe and Ito's palette; None: a component whose role was not asked."""

_SYMBOLS = {"source": "circle", "router": "diamond", "executor": "square", "none": "x-thin-open", None: "triangle-up"}
_KINDS = {"supplies": "#7F7F7F", "relays": "#CC79A7", "delivers": "#56B4E9", "executes": "#009E73"}
_ATTENTION = re.compile(r"L(\d+)\.(?:attn|H\d|KV\d)")
_IN_LAYER = re.compile(r"L(\d+)\.")
_LEAST = 0.0005
_FEW = 2
_GOLDEN = (5**0.5 - 1) / 2
_STEPS = np.linspace(0, 1, 13)


def roles_figure(table: pd.DataFrame, *, share: float) -> go.Figure:
    """Recovery by activation against recovery by weights, on square-root scales; the line tells sources from routers.

    Square roots keep small components apart; lines through 0 stay straight. What has no recovery by activation is not
    drawn.

    Args:
        table: Of one task.
        share: Part of its activation effect that a source's weights have to explain.
    """
    figure = go.Figure()
    drawn = table[table["recovery"].notna() & table["activation"].notna()]
    ends = {name: (float(drawn[name].min()), float(drawn[name].max())) for name in ("recovery", "activation")}
    if len(drawn):
        top = min(ends["activation"][1], ends["recovery"][1] / share) if share else 0.0
        line = {"x": _root([0, max(top, 0) * share]), "y": _root([0, max(top, 0)])}
        look = {"color": "#7F7F7F", "width": 1.25, "dash": "dot"}
        name = f"weights = {share:g} x activation"
        figure.add_trace({"type": "scatter", "mode": "lines", **line, "line": look, "hoverinfo": "skip", "name": name})
    named = set(drawn["activation"].abs().nlargest(MOST_NAMED).index)
    for role in reversed(ROLES):
        own = drawn[drawn["role"] == role]
        if own.empty:
            continue
        names = [plain(str(name)) for name in own["component"]]
        by_weights = intervals_in_words(own, "recovery", "ci_low", "ci_high")
        by_activation = intervals_in_words(own, "activation", "activation_low", "activation_high")
        trace = {
            "type": "scatter",
            "mode": "markers+text",
            "x": _root(own["recovery"]),
            "y": _root(own["activation"]),
            "text": [name if place in named else "" for name, place in zip(names, own.index, strict=True)],
            "textposition": "middle left",
            "textfont": {"size": 11},
            "customdata": list(zip(names, by_weights, by_activation, strict=True)),
            "name": f"{role} ({len(own)})",
            "marker": {
                "color": ROLE_COLORS[role],
                "symbol": _SYMBOLS[role],
                "size": 8,
                "line": {"width": 1.5 if role == "none" else 0, "color": ROLE_COLORS[role]},
            },
            "hovertemplate": f"<b>%{{customdata[0]}}</b>, {role}<br>weights %{{customdata[1]}}<br>"
            "activation %{customdata[2]}<extra></extra>",
        }
        figure.add_trace(trace)
    for update, name in ((figure.update_xaxes, "recovery"), (figure.update_yaxes, "activation")):
        values = _ticks(*ends[name])
        title = f"recovery by {'weights' if name == 'recovery' else name}"
        update(title_text=title, tickvals=_root(values), ticktext=[f"{value:g}" for value in values])
    return styled(figure, title="What weights restore, and what activations do", height=430)


def depth_figure(
    table: pd.DataFrame, *, n_layers: int, anchor_layer: int, means: Mapping[str, float] | None = None
) -> go.Figure:
    """Where components of each role lie: a row for each role, a point for each component.

    Args:
        table: Of one task.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
        means: Role -> mean depth as a share of the layers, as in `trace.json`; marked by a bar.
    """
    figure = go.Figure()
    rows = {role: -place for place, role in enumerate(ROLES)}
    layers = table["layer"].astype(float).fillna(0)
    together = table.groupby([table["role"], layers], sort=False)
    height = (together.cumcount() + 0.5) / together["role"].transform("size") - 0.5
    for unit in dict.fromkeys(table["unit"]):
        is_own = table["unit"] == unit
        own, look = table[is_own], unit_style(str(unit))
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": layers[is_own].tolist(),
            "y": [rows[role] + 0.75 * up for role, up in zip(own["role"], height[is_own], strict=True)],
            "customdata": [[plain(str(name)), role] for name, role in zip(own["component"], own["role"], strict=True)],
            "marker": {"color": [ROLE_COLORS[role] for role in own["role"]], "symbol": look.symbol, "size": 7},
            "hovertemplate": "<b>%{customdata[0]}</b>, %{customdata[1]}<extra></extra>",
            "showlegend": False,
        }
        key = {"color": OUTLINE, "symbol": look.symbol, "size": 7}
        figure.add_trace(trace)
        figure.add_trace(
            {"type": "scatter", "mode": "markers", "x": [None], "y": [0], "marker": key, "name": plain(look.one)}
        )
    for role, depth in (means or {}).items():
        x, y = depth * n_layers, rows[str(role)]  # type: ignore[index]
        figure.add_shape(type="line", x0=x, x1=x, y0=y - 0.45, y1=y + 0.45, line={"color": OUTLINE, "width": 2})
    figure.add_vline(x=anchor_layer - 0.5, line={"color": "#7F7F7F", "width": 1.5, "dash": "dot"})
    figure.update_xaxes(title_text="layer", dtick=layer_tick(n_layers), range=[-0.6, n_layers - 0.4], zeroline=False)
    figure.update_yaxes(
        tickvals=list(rows.values()), ticktext=list(rows), range=[-3.55, 0.55], showgrid=False, zeroline=False
    )
    figure.update_layout(showlegend=True)
    return styled(figure, title="Where they lie", height=430)


def strongest(graph: Graph, *, most: int = MOST_EDGES) -> tuple[Edge, ...]:
    """The edges to draw: of every kind the strongest by turns, so that each is there.

    Args:
        graph: Of one task.
        most: How many.
    """
    ranked: list[tuple[int, Edge]] = []
    for kind in _KINDS:
        own = sorted((edge for edge in graph.edges if edge.kind == kind), key=lambda edge: -abs(_size(edge)))
        ranked += enumerate(own)
    return tuple(edge for _, edge in sorted(ranked, key=lambda found: found[0])[:most])


def graph_figure(graph: Graph, *, n_layers: int, anchor_layer: int, most: int = MOST_EDGES) -> go.Figure:
    """The strongest edges of a trace: layers from left to right, attention above, MLPs below.

    Args:
        graph: Of one task.
        n_layers: Layers of the models.
        anchor_layer: Layer of the anchor.
        most: Edges to draw.
    """
    edges = strongest(graph, most=most)
    named = {name for edge in edges for name in (edge.source, edge.target)} | {ANCHOR}
    nodes = [node for node in graph.nodes if node.component in named]
    places = _places(nodes, n_layers=n_layers, anchor_layer=anchor_layer)
    figure = go.Figure()
    widest = max((abs(_size(edge)) for edge in edges), default=0.0) or 1.0
    shown: set[str] = set()
    for edge in reversed(edges):
        x, y = _curve(places[edge.source], places[edge.target], bend=0.4 / n_layers)
        words = f"<b>{plain(edge.source)}</b> {_VERBS[edge.kind]} <b>{plain(edge.target)}</b>"
        trace = {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": y,
            "line": {
                "color": _KINDS[edge.kind],
                "width": round(1 + 7 * abs(_size(edge)) / widest, 2),
                "dash": "dot" if _size(edge) < 0 else "dash" if edge.kind == "relays" else "solid",
            },
            "opacity": 0.6,
            "text": f"{words}<br>total {_share(edge.total)}<br>direct {_share(edge.direct)}",
            "hovertemplate": "%{text}<extra></extra>",
            "name": edge.kind,
            "legendgroup": edge.kind,
            "showlegend": edge.kind not in shown,
        }
        shown.add(edge.kind)
        figure.add_trace(trace)
    for role in dict.fromkeys(node.role for node in nodes):
        own = [node for node in nodes if node.role == role and node.component not in (ANCHOR, OUTPUT)]
        if own:
            figure.add_trace(_dots(own, places, name=role or "role not judged", role=role))
    ends = [node for node in nodes if node.component in (ANCHOR, OUTPUT)]
    figure.add_trace(_dots(ends, places, name="", role=None, symbol="star", color=OUTLINE))
    figure.add_vline(x=anchor_layer - 0.5, line={"color": "#7F7F7F", "width": 1.5, "dash": "dot"})
    figure.add_annotation(x=anchor_layer - 0.5, y=1.18, text=ANCHOR, xanchor="left", xshift=3, showarrow=False)
    figure.update_xaxes(
        title_text="layer",
        tickvals=list(range(0, n_layers, layer_tick(n_layers))),
        range=[-0.03 * n_layers - 0.8, 1.04 * n_layers + 0.3],
        zeroline=False,
        showgrid=False,
    )
    figure.update_yaxes(visible=False, range=[-1.22, 1.22])
    tallest = max(sum(y > 0 for _, y in places.values()), sum(y < 0 for _, y in places.values()))
    title = f"The {len(edges)} strongest of {len(graph.edges)} edges"
    return styled(figure, title=title, height=max(420, 2 * 22 * tallest + 100), top=64)


_VERBS = {"supplies": "supplies", "relays": "relays to", "delivers": "delivers to", "executes": "executes:"}


def _dots(
    nodes: Sequence[Node],
    places: Mapping[str, tuple[float, float]],
    *,
    name: str,
    role: str | None,
    symbol: str | None = None,
    color: str | None = None,
) -> dict[str, Any]:
    """Nodes of one look, each with its address without the layer."""
    marker = {"color": color or ROLE_COLORS[role], "symbol": symbol or _SYMBOLS[role], "size": 12}
    if role == "none":
        marker |= {"symbol": "x"}
    about = {"recovery": "weights", "activation": "activation", "loss": "loss"}
    known = [
        "".join(f"<br>{word} {value:.3f}" for key, word in about.items() if (value := getattr(node, key)) is not None)
        for node in nodes
    ]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [places[node.component][0] for node in nodes],
        "y": [places[node.component][1] for node in nodes],
        "text": ["" if node.component == ANCHOR else plain(_IN_LAYER.sub("", node.component)) for node in nodes],
        "textposition": [
            "middle left" if sum(x == places[node.component][0] for x, _ in places.values()) > _FEW else "top center"
            for node in nodes
        ],
        "textfont": {"size": 11},
        "customdata": [
            [plain(node.component), words or "<br>not measured by itself"]
            for node, words in zip(nodes, known, strict=True)
        ],
        "marker": marker,
        "name": name,
        "showlegend": bool(name),
        "hovertemplate": "<b>%{customdata[0]}</b>%{customdata[1]}<extra></extra>",
    }


def _places(nodes: Sequence[Node], *, n_layers: int, anchor_layer: int) -> dict[str, tuple[float, float]]:
    """Component -> x and y: attention above, the rest below, each at a height of its own.

    Heights of neighbours are far apart (multiples of the golden ratio), so that their names do not lie on each other.
    """
    places = {ANCHOR: (anchor_layer - 0.5, 0.0), OUTPUT: (float(n_layers), 0.0)}
    groups: dict[tuple[int, bool], list[tuple[float, str]]] = {}
    for node in nodes:
        if node.component not in places:
            half = 1 if _ATTENTION.match(node.component) else -1
            x = -0.5 if node.layer is None else node.layer - 0.2 * half
            groups.setdefault((half, x > anchor_layer - 0.5), []).append((x, node.component))
    for (half, _), members in groups.items():
        heights = np.argsort(np.argsort(np.arange(len(members)) * _GOLDEN % 1))
        for (x, name), height in zip(sorted(members), heights.tolist(), strict=True):
            places[name] = (x, half * (0.06 + (height + 0.5) / len(members)))
    return places


def _curve(start: tuple[float, float], end: tuple[float, float], *, bend: float) -> tuple[list[float], list[float]]:
    """A curve that bends away from the middle, more for each layer, so that it passes by what lies between."""
    (x0, y0), (x1, y1) = start, end
    y_middle = (y0 + y1) / 2 + bend * abs(x1 - x0) * (1 if y0 + y1 > 0 else -1)
    x = (1 - _STEPS) * x0 + _STEPS * x1
    y = (1 - _STEPS) ** 2 * y0 + 2 * _STEPS * (1 - _STEPS) * y_middle + _STEPS**2 * y1
    return x.round(3).tolist(), y.round(4).tolist()


def delivery_figure(matrix: pd.DataFrame, *, rows: Sequence[str]) -> go.Figure:
    """What components restore by their weights, split by who writes it: attention and MLP of each layer, and the rest.

    Args:
        matrix: Of one task.
        rows: Its rows to show, the first on top.
    """
    names = {str(column): _group(str(column)) for column in matrix.columns}
    order = sorted(set(names.values()))
    sums = matrix.loc[list(rows)].T.groupby(lambda column: names[str(column)]).sum().T[order]
    figure = go.Figure()
    values = sums.to_numpy(dtype=float)
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    starts = [place for place, group in enumerate(order) if place and group[0] != order[place - 1][0]]
    gap = 1 + len(order) // MOST_WITH_TEXT
    x = [place + gap * sum(start <= place for start in starts) for place in range(len(order))]
    spread = np.full((len(values), x[-1] + 1 if x else 0), np.nan)
    spread[:, x] = values
    parts = ("", "attention of layer ", "MLP of layer ")
    labels = [plain(name) or str(layer) for _, layer, name in order]
    about = [""] * spread.shape[1]
    for place, group, label in zip(x, order, labels, strict=True):
        about[place] = parts[group[0]] + label
    trace = {
        "type": "heatmap",
        "z": [[None if math.isnan(value) else float(f"{value:.4g}") for value in row] for row in spread],
        "y": [plain(name) for name in rows],
        "customdata": [about] * len(values),
        "text": [["" if not abs(value) >= _LEAST else f"{value:.3f}" for value in row] for row in spread],
        "texttemplate": "%{text}" if len(order) <= MOST_WITH_TEXT else "",
        "textfont": {"size": 9},
        "coloraxis": "coloraxis",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "<b>%{y}</b> through %{customdata}: %{z:.4f}<extra></extra>",
    }
    figure.add_trace(trace)
    for number, name in enumerate(parts[1:], 1):
        own = [place for place, group in zip(x, order, strict=True) if group[0] == number]
        if own:
            middle = (own[0] + own[-1]) / 2
            figure.add_annotation(
                x=middle, y=0, yref="paper", yanchor="top", yshift=-24, showarrow=False, text=name.strip()
            )
    every = layer_tick(sum(group[0] == 2 for group in order))
    shown = [not group[1] % every for group in order]
    figure.update_xaxes(
        tickangle=0,
        tickvals=[place for place, is_shown in zip(x, shown, strict=True) if is_shown],
        ticktext=[label for label, is_shown in zip(labels, shown, strict=True) if is_shown],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_layout(coloraxis=color_axis(limit, title="share of the anchor's gap"))
    return styled(figure, title="Recoveries by who writes them", height=130 + 26 * len(values), top=64)


def rows_of_matrix(matrix: pd.DataFrame, table: pd.DataFrame, *, most: int = MOST_ROWS) -> list[str]:
    """The sources with the highest recovery that a matrix has rows for; components of any role where it has none.

    Args:
        matrix: Of one task.
        table: Of the same task.
        most: How many.
    """
    known = table[table["component"].isin(matrix.index) & table["recovery"].notna()]
    sources = known[known["role"] == "source"]
    chosen = sources if len(sources) else known
    return [str(name) for name in chosen.nlargest(most, "recovery")["component"]]


def null_of_roles(draws: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By `weights` and by `activation`, the recovery below which `NULL_QUANTILE` of the null lies, over all units.

    Args:
        draws: The lines of a `null.jsonl`; none give nothing.
    """
    found = {}
    for name in ("weights", "activation"):
        values = [value for draw in draws for value in draw[name] if value is not None]
        if values:
            found[name] = float(np.quantile(values, NULL_QUANTILE))
    return found


def intervals_in_words(table: pd.DataFrame, *columns: str) -> list[str]:
    """Values of a table with their intervals, row by row.

    Args:
        table: Any with these columns.
        columns: Of the value, the lower end and the upper end.
    """
    return [_words(*row) for row in table[list(columns)].astype(float).itertuples(index=False)]


def _words(value: float, low: float, high: float) -> str:
    """A share with its interval; NaN bounds are none."""
    text = f"{value:.4f}"
    return text if math.isnan(low) or math.isnan(high) else f"{text} [{low:.4f}, {high:.4f}]"


def _share(share: Share | None) -> str:
    if share is None:
        return "not measured"
    return _words(share.value, *(math.nan if end is None else end for end in (share.low, share.high)))


def _size(edge: Edge) -> float:
    """What an edge is drawn by: its own write where it delivers or relays, everything between included elsewhere."""
    first, second = (edge.direct, edge.total) if edge.kind in ("delivers", "relays") else (edge.total, edge.direct)
    share = first or second
    return share.value if share else 0.0


def _group(target: str) -> tuple[int, int, str]:
    """Where a target's column goes: attention of a layer, MLP of a layer, or by its own name."""
    found = _ATTENTION.match(target) or _IN_LAYER.match(target)
    if found is None:
        return 0, 0, target
    return (1 if found.re is _ATTENTION else 2), int(found[1]), ""


def _root(values: Iterable[float]) -> list[float]:
    """Signed square roots."""
    return [round(math.copysign(math.sqrt(abs(value)), value), 5) for value in values]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a scale of square roots, far enough from each other to be read."""
    largest = max(abs(low), abs(high))
    if not largest > 0:
        return [0.0]
    powers = range(math.floor(math.log10(largest)), math.floor(math.log10(largest)) - 4, -1)
    kept = [math.inf]
    for value in (step * 10.0**power for power in powers for step in (5, 2, 1)):
        if value <= largest and math.sqrt(kept[-1]) - math.sqrt(value) >= 0.12 * math.sqrt(largest) <= math.sqrt(value):
            kept.append(value)
    sizes = [float(f"{value:.1g}") for value in kept[1:]]
    return sorted([-size for size in sizes if size <= -low] + [0.0] + [size for size in sizes if size <= high])
