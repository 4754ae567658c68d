"""Merging in one call: experts with their runs go in, a checkpoint that transformers loads comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from weightpatch.checkpoint import DeviceMap
from weightpatch.derivation import Rows
from weightpatch.errors import MergeError
from weightpatch.merging.card import write_card
from weightpatch.merging.coefficients import Coefficients
from weightpatch.merging.combining import Method, method_of
from weightpatch.merging.experts import Expert, named, open_run
from weightpatch.merging.inputs import Inputs
from weightpatch.merging.learning import Step
from weightpatch.merging.resolving import Learned, Resolved, Rule, resolve
from weightpatch.merging.writing import LEARNING, SHARD_BYTES, Merge, check_free


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A merge that is decided and not yet written.

    Attributes:
        merge: What will be written.
        rule: How coefficients were found; None: they were given.
        resolved: What that came to.
        experts: Name -> expert.
    """

    merge: Merge
    rule: Rule | None
    resolved: Resolved
    experts: Mapping[str, Expert]

    def write(self, out: str | Path, *, on_parameter: Callable[[int, int], None] | None = None) -> Path:
        """Write the folder, its model card and its coefficients; see `Merge.write`."""
        folder = self.merge.write(out, on_parameter=on_parameter)
        self.merge.coefficients.save(folder / COEFFICIENTS)
        write_card(folder, self.merge, self.rule, self.resolved, self.experts)
        return folder


COEFFICIENTS = "merge.coefficients"
"""In a merged folder, as safetensors, but not by that name: servers take every `*.safetensors` there for weights."""


def prepare(
    base: str | Path,
    experts: Sequence[Expert | str],
    *,
    rule: Rule | None = None,
    coefficients: str | Path | Coefficients | None = None,
    method: str | Method = "task-arithmetic",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
    any_adapter_base: bool = False,
    architecture: Rows = "table",
    device_map: DeviceMap | None = None,
    bookmark: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Prepared:
    """Decide a merge; arguments and errors as `merge`, and `bookmark`: a file that keeps every step of learning."""
    found = named([Expert.parse(one) if isinstance(one, str) else one for one in experts])
    how = method_of(method) if isinstance(method, str) else method
    if coefficients is not None:
        if rule is not None:
            raise MergeError("coefficients are given, so there is no rule to find them by. Leave one of the two out.")
        if weighted := [name for name, one in found.items() if one.weight != 1]:
            raise MergeError(
                f"coefficients are given, so the weight of {', '.join(weighted)} would change nothing. Leave it out."
            )
    else:
        rule = rule or Rule()
        if rule.policy in get_args(Learned) and how != Method():
            raise MergeError(
                f"{rule.policy} learns coefficients of a plain sum, and another method or scale would make another "
                "model of them. Choose --policy uniform, soft, top, owner or sources; or save what was learned "
                "(--save-coefficients) and merge by that (--coefficients)."
            )
    inputs = Inputs.open(
        base,
        {name: one.specialized for name, one in found.items()},
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
        architecture=architecture,
        device_map=device_map,
    )
    prints = inputs.fingerprints()
    for name, one in found.items():
        if one.run is not None:  # the model card tells of it even where nothing of it is needed
            open_run(name, one, inputs.base.reference, prints)
    if coefficients is not None:
        given = coefficients if isinstance(coefficients, Coefficients) else Coefficients.load(coefficients)
        resolved = Resolved(coefficients=given)
    else:
        resolved = resolve(inputs, found, rule or Rule(), bookmark=bookmark, on_step=on_step)
    merged = Merge(
        inputs=inputs,
        coefficients=resolved.coefficients,
        method=how,
        dtype=dtype,
        seed=seed,
        shard_bytes=shard_bytes,
    )
    return Prepared(merge=merged, rule=rule, resolved=resolved, experts=found)


def merge(
    base: str | Path,
    experts: Sequence[Expert | str],
    out: str | Path,
    *,
    rule: Rule | None = None,
    coefficients: str | Path | Coefficients | None = None,
    method: str | Method = "task-arithmetic",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
    any_adapter_base: bool = False,
    architecture: Rows = "table",
    device_map: DeviceMap | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Merge experts of one base, each by what its run says that it brings.

    Args:
        base: Hub id, folder or GGUF file.
        experts: `Expert`s, or `"SPECIALIZED=RUN"` and `"SPECIALIZED=RUN:0.7"`.
        out: A new folder, or one of the same merge that was interrupted.
        rule: From runs to coefficients; None: `Rule()`, which restores every expert's streams and next tokens.
        coefficients: Given ones, or their file, instead of a rule.
        method: How differences are combined: a name out of `METHODS` or settings of your own.
        dtype: Of what is written; None: as the base's files have it.
        seed: Of what a method leaves to chance.
        shard_bytes: Of one file of weights, at most.
        allow_pickle: Read pickled weights too.
        any_adapter_base: Take adapters that name another base.
        architecture: `"auto"` derives a row, as `ModelPair.from_pretrained` does, where none is known.
        device_map: As in transformers: where models are run when coefficients are learned; the rest goes on the CPU.
        on_step: Called with every step where coefficients are learned.

    Returns:
        The folder: weights, config, tokenizer, README.md with where everything is from, coefficients.

    Raises:
        MergeError: experts, runs or coefficients that do not fit, or a folder with something else in it.
        PairError: an expert of another architecture or vocabulary, with every difference.
    """
    check_free(Path(out))
    return prepare(
        base,
        experts,
        rule=rule,
        coefficients=coefficients,
        method=method,
        dtype=dtype,
        seed=seed,
        shard_bytes=shard_bytes,
        allow_pickle=allow_pickle,
        any_adapter_base=any_adapter_base,
        architecture=architecture,
        device_map=device_map,
        bookmark=Path(out) / LEARNING,
        on_step=on_step,
    ).write(out)
