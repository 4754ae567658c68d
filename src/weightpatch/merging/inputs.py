"""The base and the experts of a merge, read tensor by tensor, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightpatch.architecture import Architecture, skeleton
from weightpatch.checkpoint import Checkpoint, find, read_config, read_tokenizer
from weightpatch.errors import MergeError
from weightpatch.sources import Source, open_source


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What is merged.

    Attributes:
        base: The base.
        experts: Name -> its checkpoint.
        architecture: Of all of them.
        ours: Gives the base's weights.
        theirs: Expert -> gives its weights.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    architecture: Architecture
    ours: Source
    theirs: Mapping[str, Source]

    @classmethod
    def open(cls, base: str | Path, experts: Mapping[str, str | Path], *, allow_pickle: bool = False) -> Inputs:
        """Find everything and check that it fits, before anything is merged.

        Args:
            base: Hub id, folder or GGUF file.
            experts: Name -> hub id, folder, GGUF file, or PEFT adapter folder over the base.
            allow_pickle: Read pickled weights too.

        Raises:
            MergeError: experts with other parameters or other tokens than the base, or none.
            CheckpointError: a checkpoint that cannot be read.
        """
        if not experts:
            raise MergeError("a merge needs at least one expert.")
        below = find(base)
        if below.kind == "adapter":
            raise MergeError(f"{base} is an adapter. Name the whole model that the experts were made from as the base.")
        found = {name: find(reference) for name, reference in experts.items()}
        _check_tokenizers(below, found)
        ours = _open(below, below, allow_pickle=allow_pickle)
        theirs = {name: _open(one, below, allow_pickle=allow_pickle) for name, one in found.items()}
        _check_shapes(ours, theirs)
        architecture = Architecture.of(skeleton(read_config(below)))
        return cls(base=below, experts=found, architecture=architecture, ours=ours, theirs=theirs)

    def weights(self, name: str) -> Tensor:
        """A parameter of the base, float32."""
        return self.ours.tensor(name).float()

    def change(self, expert: str, name: str) -> Tensor:
        """What an expert has more than the base in a parameter, float32."""
        return self.theirs[expert].tensor(name).float() - self.weights(name)


def _open(checkpoint: Checkpoint, base: Checkpoint, *, allow_pickle: bool) -> Source:
    return open_source(checkpoint, base=base, dtype=torch.float32, allow_pickle=allow_pickle)


def _check_shapes(ours: Source, theirs: Mapping[str, Source]) -> None:
    """All parameters that do not fit, at once."""
    wrong: list[str] = []
    for name, source in theirs.items():
        names = dict.fromkeys([*ours.shapes, *source.shapes])
        odd = [one for one in names if ours.shapes.get(one) != source.shapes.get(one)]
        wrong += [f"{one}: {ours.shapes.get(one)} in the base, {source.shapes.get(one)} in {name}" for one in odd[:4]]
        wrong += [f"and {len(odd) - 4} more parameters of {name}"] if len(odd) > 4 else []
    if wrong:
        raise MergeError(f"cannot be merged: {'; '.join(wrong)}. Experts have to be made from this base.")


def _check_tokenizers(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Tokens that stand for different rows; an expert without a tokenizer has the base's."""
    own = read_tokenizer(base)
    if own is None:
        return
    vocabulary = own.get_vocab()
    for name, expert in experts.items():
        other = read_tokenizer(expert)
        differing = sorted(set(vocabulary.items()) ^ set(other.get_vocab().items())) if other else []
        if differing:
            listed = ", ".join(f"{token!r} = {number}" for token, number in differing[:6])
            raise MergeError(
                f"base and {name} number {len(differing)} tokens differently: {listed}. Rows of the embedding would be "
                "mixed up; merge models of one vocabulary."
            )
