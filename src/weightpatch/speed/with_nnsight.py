"""nnsight (extra `bench`): a trace that stops at the anchor layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import family_of
from weightpatch.speed.contestants import Read
from weightpatch.speed.work import Batch, same_weights


@contextmanager
def with_nnsight(model: PreTrainedModel, batch: Batch, layer: int) -> Iterator[Read]:
    """Trace the model, save what enters the anchor layer, and stop there.

    Advice followed (nnsight 0.8 and its repository's docs): `docs/models/nnsight-base.md`, wrap a module that is
    already in memory with `NNsight`; `docs/usage/stop-and-early-exit.md`, `tracer.stop()` behind the last value wanted;
    `docs/developing/performance.md`, the trace in a function of a real file, so that its block is compiled once. That
    page's first advice, one trace for many reads, cannot be followed: every component needs weights of its own, and a
    trace is one forward pass with one set of weights.
    """
    from nnsight import NNsight

    wrapped: Any = NNsight(same_weights(model))
    layers = attrgetter(family_of(model.config).layers)(wrapped)
    n_layers = model.config.num_hidden_layers

    def read() -> Tensor:
        with wrapped.trace(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False) as tracer:
            entering = (layers[layer].input if layer < n_layers else layers[layer - 1].output).save()
            tracer.stop()
        return batch.at_last(entering[0] if isinstance(entering, tuple) else entering)

    yield read
