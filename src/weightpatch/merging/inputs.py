"""The base and the experts of a merge, read tensor by tensor, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.architecture import Architecture, skeleton
from weightpatch.checkpoint import Checkpoint, DeviceMap, find, load
from weightpatch.derivation import Rows
from weightpatch.errors import MergeError
from weightpatch.files import fingerprint
from weightpatch.pair import Known, ModelPair, check_pair
from weightpatch.sources import Source, open_source
from weightpatch.streaming import streamed


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What is merged.

    Attributes:
        base: The base.
        experts: Name -> its checkpoint.
        tokenizers: Expert -> what its prompts are read with, if it or the base brings one.
        architecture: Of all of them.
        ours: Gives the base's weights.
        theirs: Expert -> gives its weights.
        allow_pickle: Whether pickled weights may be read.
        device_map: Where the base is loaded when something is learned.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None]
    architecture: Architecture
    ours: Source
    theirs: Mapping[str, Source]
    allow_pickle: bool = False
    device_map: DeviceMap | None = None

    @classmethod
    def open(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path],
        *,
        allow_pickle: bool = False,
        any_adapter_base: bool = False,
        architecture: Rows = "table",
        device_map: DeviceMap | None = None,
    ) -> Inputs:
        """Find everything and check each expert against the base as a pair, before any weight is read.

        Args:
            base: Hub id, folder or GGUF file.
            experts: Name -> hub id, folder, GGUF file, or PEFT adapter folder over the base.
            allow_pickle: Read pickled weights too.
            any_adapter_base: Take adapters that name another base.
            architecture: `"auto"` derives a row where the table knows none for the model's family.
            device_map: As in transformers: where the base is loaded when something is learned.

        Raises:
            MergeError: no experts.
            PairError: an expert of another architecture or vocabulary, with every difference.
            CheckpointError: a checkpoint that cannot be read, or an adapter as the base.
        """
        if not experts:
            raise MergeError("a merge needs at least one expert.")
        below = find(base)
        known = Known(checkpoint=below)
        checked = {
            name: check_pair(
                known, one, architecture=architecture, allow_pickle=allow_pickle, any_adapter_base=any_adapter_base
            )
            for name, one in experts.items()
        }
        found = {name: own.specialized for name, own in checked.items()}
        ours = _open(below, below, None, allow_pickle=allow_pickle)
        return cls(
            base=below,
            experts=found,
            tokenizers={name: own.tokenizer for name, own in checked.items()},
            architecture=Architecture.of(skeleton(known.config)),
            ours=ours,
            theirs={name: _open(one, below, ours, allow_pickle=allow_pickle) for name, one in found.items()},
            allow_pickle=allow_pickle,
            device_map=device_map,
        )

    def fingerprints(self) -> dict[str, str]:
        """What the files of base and experts hold."""
        found = {"base": fingerprint(self.base.path)}
        return found | {f"expert {name}": fingerprint(one.path) for name, one in self.experts.items()}

    def load_base(self) -> PreTrainedModel:
        """The base in memory, float32."""
        return load(self.base, dtype=torch.float32, device_map=self.device_map, allow_pickle=self.allow_pickle)

    def pair(self, expert: str, base: PreTrainedModel) -> ModelPair:
        """The pair of an expert, whose weights are read when they are needed.

        Args:
            expert: Its name.
            base: As `load_base` gives it; one serves all experts.
        """
        return ModelPair(
            base=base,
            specialized=streamed(base, self.theirs[expert]),
            tokenizer=self.tokenizers[expert],
            base_name=self.base.reference,
            specialized_name=self.experts[expert].reference,
        )

    def weights(self, name: str) -> Tensor:
        """A parameter of the base, float32."""
        return self.ours.tensor(name).float()

    def change(self, expert: str, name: str, *, base: Tensor | None = None) -> Tensor:
        """What an expert has more than the base in a parameter, float32; `base`: its weights, where they are known."""
        own = self.theirs[expert].tensor(name).to(torch.float32, copy=True)
        return own.sub_(self.weights(name) if base is None else base)


def versions() -> dict[str, str]:
    """Of what decides the last bits."""
    return {name: version(name) for name in ("weightpatch", "torch", "transformers")}


def _open(checkpoint: Checkpoint, base: Checkpoint, ours: Source | None, *, allow_pickle: bool) -> Source:
    return open_source(
        checkpoint, base=base, dtype=torch.float32, allow_pickle=allow_pickle, keep_open=False, below=ours
    )
