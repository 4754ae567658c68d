"""Ways to measure what a component's specialized weights do to the readout; each engine is one file.

An engine is a function `sweep` of the type `Sweep`. `swap` is the oracle; it shares no code with the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from weightpatch.component import Component
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One component's patched readouts.

    Attributes:
        component: What was patched.
        readout: Patched readout, shape `(prompt,)`, float64, on the CPU.
        base: Readout of the unpatched recipient as the same engine computes it, same shape.
        delivered: What each target writes more along the anchor's direction than in the unpatched recipient, shape
            `(target, prompt)`, where that was asked for.
    """

    component: Component
    readout: Tensor
    base: Tensor
    delivered: Tensor | None = None


class Sweep(Protocol):
    """Patch every component in turn and read."""

    def __call__(
        self,
        pair: ModelPair,
        token_ids: Sequence[Sequence[int]],
        anchor: Readable,
        components: Sequence[Component],
        *,
        batch_tokens: int,
        skip: Set[Component],
    ) -> Iterator[Measured]:
        """Measure the components, all of which lie below the anchor, layer by layer.

        Args:
            pair: The two models.
            token_ids: Unpadded prompts.
            anchor: What to read, and where.
            components: What to patch; ordered by layer.
            batch_tokens: Most tokens of one forward call, with padding where an engine pads.
            skip: Components already known. They may be measured again where they share a call with others, so that a
                resumed sweep makes the very same calls; whoever resumes drops what it knows.

        Yields:
            One result for each component, in the order given.
        """
        ...
