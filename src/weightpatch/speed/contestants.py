"""Who takes part: a plain loop, other tools, and our two engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.errors import ComponentError
from weightpatch.speed.work import Batch

Read = Callable[[], Tensor]
"""Runs the model with whatever is written into it; gives the residual that enters the anchor layer at each prompt's
last token, shape `(prompt, feature)`. Called with gradients off."""


class Contestant(Protocol):
    """A way to run the base again and again while its weights are being changed from outside."""

    def __call__(self, model: PreTrainedModel, batch: Batch, layer: int) -> AbstractContextManager[Read]:
        """Make ready what does not depend on the weights; that is not timed.

        Args:
            model: The base. Its parameters are written to between the reads.
            batch: The prompts.
            layer: The anchor layer, 1 to `n_layers`.
        """
        ...


LOOPS: dict[str, str | None] = {
    "loop": None,
    "nnsight": "nnsight",
    "transformer-lens": "transformer_lens",
    "pyvene": "pyvene",
}
"""Contestants that write weights one component at a time -> the package that they need."""

_HOMES = {
    "loop": ("weightpatch.speed.plain_loop", "plain_loop"),
    "nnsight": ("weightpatch.speed.with_nnsight", "with_nnsight"),
    "transformer-lens": ("weightpatch.speed.with_transformer_lens", "with_transformer_lens"),
    "pyvene": ("weightpatch.speed.with_pyvene", "with_pyvene"),
}

CONTESTANTS: tuple[str, ...] = (*LOOPS, "swap", "suffix")
"""All of them, in the order of the table."""


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The named contestants in the order of the table.

    Raises:
        ComponentError: a name that is none of them, or no name.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in CONTESTANTS]
    if unknown or not wanted:
        found = ", ".join(map(repr, unknown)) or "none"
        raise ComponentError(f"unknown engines: {found}. Choose some of {', '.join(CONTESTANTS)}, with commas between.")
    return tuple(name for name in CONTESTANTS if name in wanted)


def missing(name: str) -> str | None:
    """Why a contestant cannot take part here; None when it can."""
    package = LOOPS.get(name)
    if package is None or find_spec(package):
        return None
    return f"{name} is left out: it is not installed. To measure it too: pip install 'weightpatch[bench]'"


def open_loop(name: str) -> Contestant:
    """The contestant of this name, one of `LOOPS`."""
    module, function = _HOMES[name]
    return cast("Contestant", getattr(import_module(module), function))
