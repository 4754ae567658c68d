"""The same merge as a recipe for mergekit, as far as its tensors go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from weightpatch.checkpoint import BUNDLED, Checkpoint
from weightpatch.errors import MergeError
from weightpatch.merging.coefficients import varying
from weightpatch.merging.combining import METHODS, Method
from weightpatch.merging.writing import Merge

_OURS_IN_THEIRS = {
    "task-arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare-linear": "dare_linear",
    "dare-ties": "dare_ties",
    "della": "della",
    "della-linear": "della_linear",
    "breadcrumbs": "breadcrumbs",
}
"""Name of a method here -> in mergekit."""


def check_exportable(checkpoints: Iterable[Checkpoint], method: Method) -> None:
    """Check that mergekit could merge these checkpoints by this method.

    Raises:
        MergeError: a method that mergekit does not have, or a file that it cannot read.
    """
    _in_mergekit(method)
    if unread := [one.reference for one in checkpoints if one.kind == "gguf"]:
        raise MergeError(
            f"mergekit cannot read {', '.join(unread)}: GGUF files. Write them as folders of safetensors first "
            "(AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(...)) and merge those."
        )


def mergekit_recipe(merge: Merge) -> tuple[str, tuple[str, ...]]:
    """A YAML recipe that names every tensor exactly and ends in a default of 0.

    mergekit matches names as substrings and takes the first that fits, so longer names come first. Its coefficients are
    one number to a tensor and expert: where ours vary within a tensor, their mean over entries stands in the recipe.

    Args:
        merge: What is to be merged.

    Returns:
        The recipe, and the names of the tensors whose finer coefficients are averaged away.

    Raises:
        MergeError: a method that mergekit does not have, or a file that it cannot read.
    """
    check_exportable([merge.inputs.base, *merge.inputs.experts.values()], merge.method)
    kind, settings = _in_mergekit(merge.method)
    experts = []
    for place, checkpoint in enumerate(merge.inputs.experts.values()):
        filters: list[dict[str, Any]] = [
            {"filter": name, "value": round(float(every[place].mean()), 10)}
            for name, every in sorted(merge.coefficients.tensors.items(), key=lambda item: -len(item[0]))
        ]
        reference = _theirs(checkpoint)
        if checkpoint.kind == "adapter":
            reference = f"{_theirs(merge.inputs.base)}+{reference}"
        parameters = {"weight": [*filters, {"value": 0.0}], **settings}
        experts.append({"model": reference, "parameters": parameters})
    recipe: dict[str, Any] = {
        "merge_method": kind,
        "base_model": _theirs(merge.inputs.base),
        "models": experts,
        "parameters": {"lambda": merge.method.scale, "normalize": merge.method.average != "none"},
        "dtype": "float32",
    }
    if merge.dtype is not None:
        recipe["out_dtype"] = str(merge.dtype).removeprefix("torch.")
    return yaml.safe_dump(recipe, sort_keys=False), tuple(varying(merge.coefficients))


def _theirs(checkpoint: Checkpoint) -> str:
    """What mergekit finds a checkpoint by: names of bundled models are ours alone."""
    return str(checkpoint.path) if checkpoint.reference in BUNDLED else checkpoint.reference


def _in_mergekit(method: Method) -> tuple[str, dict[str, Any]]:
    """Name of a method in mergekit, and its parameters there."""
    how = method.sparsifier
    for ours, theirs in _OURS_IN_THEIRS.items():
        known = METHODS[ours]
        same = (known.sparsifier.kind, known.election, known.average) == (how.kind, method.election, method.average)
        if same and how.over == "tensor" and how.rescale == {"drop": "l1", "magprune": "l1"}.get(how.kind, "none"):
            settings: dict[str, Any] = {} if how.kind == "none" else {"density": how.density}
            if how.kind == "breadcrumbs":
                settings["gamma"] = how.gamma
            if how.kind == "magprune":
                settings["epsilon"] = how.epsilon
            return theirs, settings
    raise MergeError(
        f"mergekit has no method like this one ({method}). It has task arithmetic, TIES with thresholds by tensor, "
        "DARE and DELLA rescaled by l1 (mergekit does not divide by the probability), and breadcrumbs."
    )
