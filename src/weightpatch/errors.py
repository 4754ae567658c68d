"""What can go wrong, said so that the reader knows what was found, what was needed and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class WeightpatchError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback and exits with 2."""


class PairError(WeightpatchError):
    """The two checkpoints are no pair; lists every difference at once.

    Attributes:
        differences: One sentence for each difference found.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        self.differences = tuple(differences)
        super().__init__("\n".join([message, *(f"  - {difference}" for difference in self.differences)]))


class CheckpointError(WeightpatchError):
    """A checkpoint cannot be read as it is: missing, truncated, pickled, or with values that are no numbers."""


class ComponentError(WeightpatchError):
    """An address or a unit that does not exist in this architecture, or cannot be patched alone."""


class ArchitectureError(WeightpatchError):
    """No row of the architecture table fits the model, or the row does not hold for it."""


class PromptError(WeightpatchError):
    """Prompts that cannot be read, or cannot be used with this pair."""


class AnchorError(WeightpatchError):
    """An anchor that does not fit the model or cannot be read."""


class NoGapError(WeightpatchError):
    """Base and specialized model do not differ measurably in the readout, so a recovery would be a ratio to noise."""


class RunError(WeightpatchError):
    """A run folder that cannot be used as asked."""


class MergeError(WeightpatchError):
    """Experts that cannot be merged as asked."""
