"""What a run would take, told before anything is loaded: configs, headers and tokenizers are read, no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch

from weightpatch.anchor import Anchor
from weightpatch.architecture import Architecture, skeleton
from weightpatch.checkpoint import read_config, read_dtype
from weightpatch.component import Component, components
from weightpatch.errors import AnchorError, ComponentError
from weightpatch.localization import reaches
from weightpatch.packed.packing import MOST_TOKENS, pack
from weightpatch.pair import check_pair
from weightpatch.prompts import ContrastPrompts
from weightpatch.residuals import bytes_per_token, tokens_per_call
from weightpatch.run import RunConfig
from weightpatch.speed.machine import matrix_product_rate
from weightpatch.speed.operations import PrefixTree, operations

SHARE_OF_RATE = 0.6
"""Of the rate of matrix products, what a sweep is reckoned to reach."""

DEEPEST = 0.9
"""Share of the depth at which an anchor that is searched lies at most."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What the sweep of one task takes.

    Attributes:
        n_prompts: Prompts that are measured.
        n_tokens: Their tokens.
        n_packed: Their tokens with shared starts counted once: what each component's suffix runs on.
        n_layer_calls: Layers that are run on all packed tokens, over all components.
        n_passes: The same in whole forward passes of the model.
        seconds: Estimated; None where the operations are not counted (experts, norms).
    """

    n_prompts: int
    n_tokens: int
    n_packed: int
    n_layer_calls: int
    n_passes: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes. Bytes count weights as they will be in memory.

    Attributes:
        model_type: The family.
        n_layers: Decoder layers.
        n_parameters: Parameters of one model.
        layer: The anchor's layer; the deepest one searched where none is given.
        searched: Whether it is searched.
        n_components: Components below that layer, by unit.
        base_bytes: The base in memory.
        layer_bytes: The widest layer of the specialized model, of which one is in memory at a time.
        activation_bytes: Activations of one call, about.
        batch_tokens: Most tokens of one call.
        device: Where the estimate of time was made.
        tasks: The sweeps.
    """

    model_type: str
    n_layers: int
    n_parameters: int
    layer: int
    searched: bool
    n_components: dict[str, int]
    base_bytes: int
    layer_bytes: int
    activation_bytes: int
    batch_tokens: int
    device: str
    tasks: dict[str, TaskPlan]

    def __str__(self) -> str:
        """As the command line prints it."""
        counts = ", ".join(f"{count} {unit}" for unit, count in self.n_components.items())
        where = f"searched, layer {self.layer} at the deepest" if self.searched else f"layer {self.layer}"
        mib = {name: asdict(self)[f"{name}_bytes"] / 2**20 for name in ("base", "layer", "activation")}
        lines = [
            f"{self.model_type}: {self.n_layers} layers, {self.n_parameters:,} parameters",
            f"anchor: {where}; below it {counts}",
            f"memory: base {mib['base']:,.0f} MiB, one specialized layer {mib['layer']:,.0f} MiB, activations about "
            f"{mib['activation']:,.0f} MiB ({self.batch_tokens:,} tokens to a call)",
        ]
        for task, plan in self.tasks.items():
            time = "time unknown" if plan.seconds is None else f"about {_duration(plan.seconds)}"
            lines.append(
                f"sweep of {task}: {plan.n_prompts} prompts, {plan.n_tokens:,} tokens ({plan.n_packed:,} once shared "
                f"starts are packed), {plan.n_layer_calls:,} layer calls = {plan.n_passes:,.0f} forward passes, {time} "
                f"on {self.device}"
            )
        lines.append(
            "not counted: fitting the anchors, above all the answers that behaviour gates generate; tokens of "
            "--response-tokens. Batch and activations are those of a CPU; accelerators take more at once."
        )
        return "\n".join(lines)


def plan_run(config: RunConfig, *, allow_pickle: bool = False, any_adapter_base: bool = False) -> RunPlan:
    """Check all that can be checked without weights, and reckon what a run with these settings takes.

    Args:
        config: The settings.
        allow_pickle: As in `ModelPair.from_pretrained`.
        any_adapter_base: As in `ModelPair.from_pretrained`.

    Raises:
        AnchorError: a layer that the model does not have, or nothing below it.
        PairError: the checkpoints are no pair.
        CheckpointError: one of them cannot be read.
        ComponentError: an unknown unit or address.
        PromptError: prompts that cannot be read, or a task without any in a split.
    """
    prompts = ContrastPrompts.load(config.prompts, seed=config.seed, n_queries=config.n_queries)
    checked = check_pair(
        config.base,
        config.specialized,
        revision=config.revision,
        specialized_revision=config.specialized_revision,
        architecture=config.architecture,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
        prompts=prompts,
    )
    dtype = read_dtype(config.dtype)
    model = skeleton(read_config(checked.base)).to(dtype)  # type: ignore[arg-type]
    about = Architecture.of(model)
    layer = config.layer if config.layer is not None else int(DEEPEST * about.n_layers)
    anchor = Anchor(layer=layer, direction=torch.ones(about.n_features), positions=config.readout_positions)
    below = [component for component in components(about, config.units) if reaches(component, anchor)]
    if not 0 <= layer <= about.n_layers or not below:
        raise AnchorError(
            f"nothing to measure with the anchor at layer {layer}: this model has {about.n_layers} layers, and of "
            f"{config.units} {len(below)} components lie below it."
        )
    width = config.batch_tokens or tokens_per_call(model)
    tasks = {}
    rate = 0.0
    for task in prompts.tasks:
        own = prompts.of_task(task)
        own.split("fit")
        rows = own.split("localize").tokenize(checked.tokenizer)
        ids = rows.with_instruction + (rows.without_instruction if config.readout == "contrast" else ())
        n_packed = sum(packing.n_tokens for packing in pack(ids, most_tokens=min(width, MOST_TOKENS)))
        rate = rate or matrix_product_rate(about, min(n_packed, width), torch.device("cpu"))
        calls = sum(layer - (component.layer or 0) for component in below)
        tasks[task] = TaskPlan(
            n_prompts=len(rows.ids),
            n_tokens=sum(map(len, ids)),
            n_packed=n_packed,
            n_layer_calls=calls,
            n_passes=calls / about.n_layers * n_packed / sum(map(len, ids)),
            seconds=_seconds(about, ids, anchor, below, rate),
        )
    sizes = [
        sum(prod(about.parameters[name]) for name in about.parameters_under(about.layer_prefix(number)[:-1]))
        for number in range(about.n_layers)
    ]
    n_parameters = sum(prod(shape) for shape in about.parameters.values())
    return RunPlan(
        model_type=about.model_type,
        n_layers=about.n_layers,
        n_parameters=n_parameters,
        layer=layer,
        searched=config.layer is None,
        n_components=dict(Counter(component.unit for component in below)),
        base_bytes=n_parameters * dtype.itemsize,
        layer_bytes=max(sizes) * dtype.itemsize,
        activation_bytes=max(width, *(plan.n_packed for plan in tasks.values())) * bytes_per_token(model),
        batch_tokens=width,
        device="this CPU",
        tasks=tasks,
    )


def _seconds(
    about: Architecture, ids: Sequence[Sequence[int]], anchor: Anchor, below: Sequence[Component], rate: float
) -> float | None:
    """What the sweep's operations take at the share of the machine's rate; None where they are not known."""
    try:
        count = operations(about, PrefixTree.of(ids), anchor_layer=anchor.layer, components=below)
    except ComponentError:
        return None
    return None if count is None else count / (rate * SHARE_OF_RATE)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
