"""Every method of the comparison with its configurations, as many of each; the first one is its default.

Baselines are mergekit's own code, called in process; Localize-and-Stitch and activation-informed merging are written
from their formulas; what scores or anchors guide is weightpatch's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case, Weights
from guides import DAMPED, HIGHER, damping, learned, scores_of
from torch import Tensor

from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.combining import METHODS, Method
from weightpatch.merging.policies import weigh
from weightpatch.merging.writing import Merge

Config = dict[str, Any]
LAMBDAS = tuple(round(0.1 * step, 1) for step in range(1, 11))


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method of the comparison.

    Attributes:
        name: As in the table.
        configs: Its configurations, the default first.
        build: From a case and a configuration to merged weights.
        kind: `baseline`, `guided` or `control`.
    """

    name: str
    configs: Sequence[Config]
    build: Callable[[Case, Config], Weights]
    kind: str


def grid(**values: Sequence[Any]) -> list[Config]:
    """Every combination; the first one is the default."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def by_expert(n_experts: int, low: float, high: float, n: int, seed: int) -> list[list[float]]:
    """Random weights by expert."""
    draw = random.Random(seed)
    return [[round(draw.uniform(low, high), 3) for _ in range(n_experts)] for _ in range(n)]


def by_mergekit(method: str, **fixed: Any) -> Callable[[Case, Config], Weights]:
    """A method of mergekit's, tensor by tensor, in process."""

    def build(case: Case, config: Config) -> Weights:
        from mergekit.merge_methods.api import merge_tensors

        settings = {**fixed, **config}
        n = len(case.experts)
        weight = settings.pop("weight", 1.0)
        torch.manual_seed(0)
        found: dict[str, Tensor] = {}
        changes = case.changes()
        for name, base in case.weights.items():
            experts = [base + changes[expert][name] for expert in case.experts]
            linear = method == "linear"
            found[name] = merge_tensors(
                experts if linear else [base, *experts],
                method,
                base_index=None if linear else 0,
                parameters={"weight": weight if isinstance(weight, list) else [weight] * n, **settings},
                dtype=torch.float32,
            )
        return found

    return build


def natively(method: Callable[[Config], Method]) -> Callable[[Case, Config], Weights]:
    """A method of weightpatch with one weight for all."""

    def build(case: Case, config: Config) -> Weights:
        weights = dict.fromkeys(case.experts, 1.0)
        return merged(case, Coefficients.uniform(case.inputs.architecture, weights), method(config))

    return build


def merged(case: Case, coefficients: Coefficients, method: Method) -> Weights:
    """Merged weights in memory, by the code that writes folders."""
    made = Merge(inputs=case.inputs, coefficients=coefficients, method=method)
    thresholds = made.thresholds()
    return {name: made.parameter(name, thresholds) for name in case.inputs.ours.shapes}


def stitch(config: Config) -> Method:
    """Localize-and-Stitch, dataless (arXiv:2408.13656): a model's largest entries, averaged where they meet."""
    known = METHODS["localize-and-stitch"]
    thin = replace(known.sparsifier, density=config["density"], over="model")
    return replace(known, sparsifier=thin, scale=config["lambda"])


def activation_informed(case: Case, config: Config) -> Weights:
    """Task arithmetic, less where the base's own activations are large (arXiv:2502.02421, its formula as published).

    Each input channel's mean size of activation over plain texts, over the layer's largest: I; what is added to the
    channel's column is multiplied by 1 - I (1 - omega).
    """
    kept = damping(case, config["omega"])
    weights = dict(case.weights)
    changes = case.changes()
    found: dict[str, Tensor] = {}
    for name, base in weights.items():
        added = config["lambda"] * sum(changes[expert][name] for expert in case.experts)
        if name in kept:
            added = added * kept[name]
        found[name] = base + added
    return found


def guided(policy: str, scores: str = "exact") -> Callable[[Case, Config], Weights]:
    """A policy on some scores."""

    def build(case: Case, config: Config) -> Weights:
        settings = {key: config[key] for key in ("temperature", "share") if key in config}
        found = weigh(scores_of(case, scores), policy, **settings)
        scale = config["lambda"]
        weights = {expert: {one: scale * own for one, own in every.items()} for expert, every in found.items()}
        rest = dict.fromkeys(case.experts, scale if config.get("rest", "task-arithmetic") != "base" else 0.0)
        coefficients = Coefficients.by_component(case.inputs.architecture, weights, rest=rest)
        return merged(case, coefficients, METHODS["task-arithmetic"])

    return build


def first(default: Config, others: list[Config]) -> list[Config]:
    """The default before all others, once."""
    return [default, *(one for one in others if one != default)]


FINE = ("heads,kvs,neurons",)
"""For what reads whole states: with coarser coefficients none of them restored as much (LOG.md, 2026-11-28)."""
COARSE_TOO = ("heads,kvs,mlps", "heads,kvs,neurons")
"""For what reads one number to a task or token; AdaMerging has one coefficient to a layer."""
LEARNED = (
    ("streams", "guided", FINE),
    ("streams and KL", "guided", FINE),
    ("KL to the experts", "control", FINE),
    ("streams and KL along answers", "guided", FINE),
    ("KL along answers", "control", FINE),
    (f"streams and KL{DAMPED}", "guided", FINE),
    (f"streams and KL{HIGHER}", "guided", FINE),
    (f"KL to the experts{HIGHER}", "control", FINE),
    ("streams, uniform of the same means", "control", FINE),
    ("entropy", "control", COARSE_TOO),
    ("anchors", "guided", COARSE_TOO),
    ("anchors, random directions", "control", COARSE_TOO),
    ("anchors, uniform of the same means", "control", COARSE_TOO),
)
ANSWER_TOKENS = 64
"""Of every expert's own answers, for what is learned along them."""
OMEGA = 0.4
"""What differences keep in the channel with the largest activations, where they are damped; activation-informed's
default."""
N_STEPS = 80
"""Of learning; its rate falls along all of them, wherever it is stopped."""
STARTS = (0.4, 0.5, 0.6, 0.8, 1.0)


def learnings(
    units: Sequence[str], starts: Sequence[float], *, start: float, n_steps: int, **alike: float
) -> list[Config]:
    """Configurations of what is learned: units, where it starts, after how many of its `n_steps` it is stopped."""
    eighths = (1, 2, 3, 4, 6, 8) if len(units) == 1 else (2, 4, 8)
    default: Config = {"units": FINE[0], "start": start, "stop_at": n_steps}
    stops = [n_steps * share // 8 for share in eighths]
    return [
        one | {"n_steps": n_steps} | alike for one in first(default, grid(units=units, start=starts, stop_at=stops))
    ]


def _more(name: str) -> dict[str, float]:
    """Settings that one kind of learning has alone."""
    return {"answer_tokens": ANSWER_TOKENS} if "along answers" in name else {"omega": OMEGA} if DAMPED in name else {}


def _raised(name: str, start: float) -> float:
    """Where learning starts; damped differences are smaller, so there, and where this is asked for, higher by .2."""
    return round(start + 0.2, 1) if DAMPED in name or HIGHER in name else start


def thinned(configs: Sequence[Config], n: int) -> list[Config]:
    """So many of them, the default and others spread evenly."""
    others = configs[1:]
    return [configs[0], *(others[place * len(others) // (n - 1)] for place in range(n - 1))]


def ways(n_experts: int, *, n_prompts: int, starts: Sequence[float] = STARTS, n_steps: int = N_STEPS) -> list[Way]:
    """All methods for so many experts, with six configurations of each to every start of learning.

    Args:
        n_experts: How many are merged.
        n_prompts: Of each task, that coefficients are learned from.
        starts: Coefficients that learning starts from, one for all; .8 is one of them.
        n_steps: Of learning, a multiple of 8.
    """
    n_configs = 6 * len(starts)
    soft = first(
        {"temperature": 0.25, "lambda": 1.0},
        grid(temperature=[0.1, 0.25, 0.5, 1.0, 2.0], **{"lambda": [0.5, 0.7, 0.9, 1.0, 1.2, 1.5]}),
    )
    top = first(
        {"share": 0.3, "lambda": 1.0},
        grid(share=[0.2, 0.3, 0.5, 0.7, 0.9], **{"lambda": [0.5, 0.7, 0.9, 1.0, 1.2, 1.5]}),
    )
    low, high = (0.2, 1.2) if n_experts <= 3 else (0.1, 0.8)
    baselines = {
        "linear": (
            [{"weight": [1.0] * n_experts}, *({"weight": own} for own in by_expert(n_experts, 0.1, 1, 29, 1))],
            "linear",
            {},
        ),
        "task arithmetic": (
            first({"weight": 1.0}, [{"weight": one} for one in LAMBDAS])
            + [{"weight": own} for own in by_expert(n_experts, low, high, 20, 2)],
            "task_arithmetic",
            {},
        ),
        "TIES": (
            first(
                {"density": 0.2, "lambda": 1.0},
                grid(density=[0.1, 0.2, 0.4, 0.6, 0.9], **{"lambda": [0.6, 1.0, 1.4, 1.8, 2.2, 2.6]}),
            ),
            "ties",
            {},
        ),
        "DARE linear": (
            first({"density": 0.5, "lambda": 1.0}, grid(density=[0.3, 0.5, 0.8], **{"lambda": LAMBDAS})),
            "dare_linear",
            {},
        ),
        "DARE TIES": (
            first({"density": 0.5, "lambda": 1.0}, grid(density=[0.3, 0.5, 0.8], **{"lambda": LAMBDAS})),
            "dare_ties",
            {},
        ),
        "DELLA": (
            first(
                {"density": 0.5, "epsilon": 0.15, "lambda": 1.0},
                grid(
                    density=[0.4, 0.5, 0.8],
                    epsilon=[0.15],
                    **{"lambda": [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.2, 2.6]},
                ),
            ),
            "della",
            {},
        ),
        "breadcrumbs": (
            first(
                {"density": 0.9, "gamma": 0.01, "lambda": 1.0},
                grid(density=[0.8, 0.9, 0.95], gamma=[0.01, 0.02], **{"lambda": [0.5, 0.6, 0.7, 0.8, 1.0]}),
            ),
            "breadcrumbs",
            {},
        ),
    }
    found = [
        Way(name=name, configs=configs, build=by_mergekit(method, **fixed), kind="baseline")
        for name, (configs, method, fixed) in baselines.items()
    ]
    found += [
        Way(
            name="Localize-and-Stitch",
            configs=first(
                {"density": 0.05, "lambda": 1.0},
                grid(density=[0.02, 0.05, 0.1, 0.2, 0.4, 0.8], **{"lambda": [0.6, 0.8, 1.0, 1.3, 1.6]}),
            ),
            build=natively(stitch),
            kind="baseline",
        ),
        Way(
            name="activation-informed",
            configs=first(
                {"omega": 0.4, "lambda": 1.0},
                grid(omega=[0.0, 0.2, 0.4, 0.6, 0.8], **{"lambda": [0.4, 0.5, 0.6, 0.7, 0.8, 1.0]}),
            ),
            build=activation_informed,
            kind="baseline",
        ),
        Way(name="soft", configs=soft, build=guided("soft"), kind="guided"),
        Way(name="top", configs=top, build=guided("top"), kind="guided"),
        Way(
            name="owner",
            configs=first(
                {"lambda": 1.0, "rest": "task-arithmetic"},
                grid(**{"lambda": [round(0.2 + 0.1 * i, 1) for i in range(15)]}, rest=["task-arithmetic", "base"]),
            ),
            build=guided("owner"),
            kind="guided",
        ),
    ]
    for scores in ("shuffled", "random", "size", "activation", "bottom"):
        found.append(Way(name=f"soft, {scores}", configs=soft, build=guided("soft", scores), kind="control"))
    found = [replace(way, configs=thinned(way.configs, n_configs)) for way in found]
    found += [
        Way(
            name=name,
            configs=learnings(
                units,
                [_raised(name, one) for one in starts],
                start=_raised(name, 0.8),
                n_steps=n_steps,
                n_prompts=n_prompts,
                **_more(name),
            ),
            build=learned(name),
            kind=kind,
        )
        for name, kind, units in LEARNED
    ]
    wrong = [way.name for way in found if len(way.configs) != n_configs]
    assert not wrong, wrong
    return found
