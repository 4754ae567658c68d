"""weightpatch: find which parameters of a fine-tuned model carry what it can do.

The public names are imported on first use, so that `weightpatch --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightpatch.anchor import Anchor as Anchor
    from weightpatch.component import Component as Component
    from weightpatch.drilling import drill as drill
    from weightpatch.effects import Effects as Effects
    from weightpatch.errors import WeightpatchError as WeightpatchError
    from weightpatch.estimation import Estimation as Estimation
    from weightpatch.fitting import fit_anchor as fit_anchor
    from weightpatch.localization import localize as localize
    from weightpatch.merging.experts import Expert as Expert
    from weightpatch.merging.merge import merge as merge
    from weightpatch.pair import ModelPair as ModelPair
    from weightpatch.patch import patched as patched
    from weightpatch.prompts import ContrastPrompts as ContrastPrompts
    from weightpatch.screening import screen as screen
    from weightpatch.steering import steered as steered
    from weightpatch.tracing import trace as trace

__version__ = "0.1.0"

_HOME = {
    "Anchor": "anchor",
    "Component": "component",
    "ContrastPrompts": "prompts",
    "Effects": "effects",
    "Estimation": "estimation",
    "Expert": "merging.experts",
    "ModelPair": "pair",
    "WeightpatchError": "errors",
    "drill": "drilling",
    "fit_anchor": "fitting",
    "localize": "localization",
    "merge": "merging.merge",
    "patched": "patch",
    "screen": "screening",
    "steered": "steering",
    "trace": "tracing",
}

__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weightpatch' has no attribute {name!r}")
    value = getattr(import_module(f"weightpatch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
