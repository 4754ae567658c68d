"""Where in one prompt components act: a map of tokens that reads like the text, line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightpatch.report.style import color_axis, plain, span_color, styled

PER_LINE = 40
MOST_TOKENS = 120
"""Tokens up to which every one has a column of its own."""

N_KEPT = 80
"""Tokens of a longer prompt that keep a column of their own: those at which the most happens."""

_ROW, _STRIP, _BETWEEN = 17, 26, 96
_LETTERS = 13
"""Letters of a token that fit below its column."""

_SIGNS = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One token, or neighbours that are shown as one.

    Attributes:
        label: What stands below it.
        about: What stands under the pointer.
        span: The span of all its tokens.
        values: Of each component, summed over its tokens.
    """

    label: str
    about: str
    span: str
    values: tuple[float, ...]


def token_figure(tokens: Mapping[str, Any]) -> go.Figure:
    """Estimated recovery of each component at each token: lines of tokens as in a text, below a strip of their spans.

    Of a prompt longer than `MOST_TOKENS`, those at which the most happens keep a column; neighbours of one span among
    the others are added up into one. A row still adds up to the component's estimate on this prompt.

    Args:
        tokens: Of a `screen.json`: texts, spans, components, and values as shares of the mean gap.
    """
    columns = _columns(tokens)
    names = [plain(name) for name in tokens["components"]]
    lines = [columns[start : start + PER_LINE] for start in range(0, len(columns), PER_LINE)]
    width = max(PER_LINE // 2, len(lines[0]))
    inner = len(lines) * (_STRIP + _ROW * len(names)) + (len(lines) - 1) * _BETWEEN
    figure = make_subplots(rows=len(lines), vertical_spacing=_BETWEEN / inner if len(lines) > 1 else 0)
    for row, line in enumerate(lines, 1):
        trace = {
            "type": "heatmap",
            "z": [
                [float(f"{value:.3g}") for value in values]
                for values in zip(*(one.values for one in line), strict=True)
            ],
            "customdata": [[one.about for one in line]] * len(names),
            "text": [[name] * len(line) for name in names],
            "coloraxis": "coloraxis",
            "xgap": 1,
            "ygap": 1,
            "hovertemplate": "<b>%{text}</b> at %{customdata}<br>estimated recovery %{z:.5f}<extra></extra>",
        }
        figure.add_trace(trace, row=row, col=1)
        figure.update_xaxes(
            range=[-0.5, width - 0.5],
            tickvals=list(range(len(line))),
            ticktext=[one.label for one in line],
            row=row,
            col=1,
        )
        _add_strip(figure, line, row)
    top = -0.5 - _STRIP / _ROW
    figure.update_xaxes(tickangle=-90, tickfont={"size": 11}, showgrid=False, zeroline=False)
    figure.update_yaxes(range=[len(names) - 0.5, top], tickvals=list(range(len(names))), ticktext=names)
    figure.update_yaxes(showgrid=False, zeroline=False, tickfont={"size": 11})
    limit = max((abs(value) for one in columns for value in one.values), default=0.0)
    figure.update_layout(coloraxis=color_axis(limit or 1.0, title="estimated recovery"))
    title = f"Where the leading {len(names)} components act in the prompt {tokens['prompt']}"
    return styled(figure, title=title, height=inner + _BETWEEN + 52, top=8)


def _columns(tokens: Mapping[str, Any]) -> list[_Column]:
    values = np.array(tokens["values"], dtype=float)  # component, token
    n = len(tokens["texts"])
    kept = set(range(n))
    if n > MOST_TOKENS:
        kept = set(np.argsort(-np.abs(values).sum(axis=0), kind="stable")[:N_KEPT].tolist())
    keys = [(span, place if place in kept else -1) for place, span in enumerate(tokens["spans"])]
    found = []
    for (span, _), group in groupby(range(n), key=keys.__getitem__):
        places = list(group)
        first, last = places[0], places[-1]
        text = str(tokens["texts"][first])
        where = f"token {first}: \u201c{_visible(text, 60)}\u201d" if first == last else f"tokens {first} to {last}"
        found.append(
            _Column(
                label=_visible(text.strip(" ") or "\u2423", _LETTERS)
                if first == last
                else f"\u2026 {len(places)} tokens",
                about=f"{where}, {plain(span)}",
                span=span,
                values=tuple(values[:, first : last + 1].sum(axis=1).tolist()),
            )
        )
    return found


def _add_strip(figure: go.Figure, line: Sequence[_Column], row: int) -> None:
    """Above a line of tokens, which span they belong to; named where there is room."""
    axis = "" if row == 1 else str(row)
    place = 0
    high, low = -0.62, -0.38 - _STRIP / _ROW
    for span, group in groupby(line, key=lambda one: one.span):
        n = len(list(group))
        figure.add_shape(
            type="rect", x0=place - 0.46, x1=place + n - 0.54, y0=low, y1=high, xref=f"x{axis}", yref=f"y{axis}",
            fillcolor=span_color(span), opacity=0.4, line_width=0,
        )  # fmt: skip
        if n * 14 > 6 * len(span):
            figure.add_annotation(
                x=place + (n - 1) / 2, y=(low + high) / 2, xref=f"x{axis}", yref=f"y{axis}", text=plain(span),
                showarrow=False, font={"size": 10},
            )  # fmt: skip
        place += n


def _visible(text: str, most: int) -> str:
    """A token as it may stand in a figure: signs for what has none, no markup, not too long."""
    signs = (
        _SIGNS.get(letter) or (letter if letter.isprintable() else letter.encode("unicode_escape").decode())
        for letter in text[: most + 1]
    )
    shown = "".join(signs)
    return plain(shown if len(shown) <= most else shown[: most - 1] + "\u2026")
