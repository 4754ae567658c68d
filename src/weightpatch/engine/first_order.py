"""First-order estimates of every component's effect at once, from one way up the base and one way down.

On the way down the readout's gradient reaches what every layer writes; there the layer is called once more with
specialized weights on the base's residual. `outputs` multiplies the gradient with the change of a component's own
write, `weights` the gradient of its parameters with their difference, `ig` the same with all parameters at
points between the two models. Prompts lie side by side in rows, nothing shared, so that each token's part belongs to
one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from weightpatch.architecture import embedding_weight
from weightpatch.component import Component
from weightpatch.engine.activations import Activations, Source, Taken, Where
from weightpatch.engine.changes import Changes
from weightpatch.engine.contributions import Contributions, Gradients, Parameters, Writes, parametrized, summed
from weightpatch.engine.hybrids import Hybrids, Seen, embedded, watched
from weightpatch.errors import ComponentError
from weightpatch.packed.calls import LayerCall, record
from weightpatch.packed.packing import MOST_TOKENS, Packing, side_by_side
from weightpatch.pair import ModelPair
from weightpatch.reader import Readable, Reader
from weightpatch.residuals import evaluating, pad

Approximation = Literal["outputs", "weights", "ig"]
N_STEPS = 8


def estimate(
    pair: ModelPair,
    token_ids: Sequence[Sequence[int]],
    anchor: Readable,
    components: Sequence[Component],
    *,
    sums: Sequence[Tensor],
    approximation: Approximation = "outputs",
    n_steps: int = N_STEPS,
    grad_drop: bool = False,
    source: Source = "weights",
    where: Where = "all",
    batch_tokens: int,
) -> Tensor:
    """Estimate the effects of any components that reach the anchor.

    Args:
        pair: The two models.
        token_ids: Unpadded prompts.
        anchor: What is read.
        components: Ordered by layer. The estimate of a set is the sum of its members', which should not overlap.
        sums: For each prompt, how often each sum counts each of its tokens, shape `(sum, token)`.
        approximation: `outputs`: exact in the component itself, linear downstream. `weights`: linear in its parameters.
            `ig`, integrated gradients: `weights` averaged over points between the models, all parameters moved at once,
            so that the parts of a partition add up to the whole gap; what a component is worth within all the rest.
        n_steps: Points of `ig`: (k - 1/2) / n_steps of the way, k = 1 to n_steps.
        grad_drop: Absolute values, averaged over backward passes each of which leaves out one layer between component
            and anchor, so that effects that cancel are not overlooked.
        source: What is patched: components' weights, or what they put out (`outputs` only).
        where: At which tokens activations are patched: all, or the readout positions.
        batch_tokens: Most tokens of a row of prompts.

    Returns:
        Shape `(component, sum)`, float64, on the CPU.

    Source:
        `outputs` and `weights` after Sun et al. 2026 (arXiv:2604.13694), in our reading; integrated gradients after
        Sundararajan et al. 2017 (arXiv:1703.01365); `grad_drop` after AtP*, Kramar et al. 2024 (arXiv:2403.00745).
    """
    if approximation not in get_args(Approximation):
        raise ComponentError(
            f"unknown approximation {approximation!r}. Choose one of {', '.join(get_args(Approximation))}."
        )
    singles = tuple(dict.fromkeys(one for component in components for one in component.members or (component,)))
    place = {component: number for number, component in enumerate(singles)}
    found = torch.zeros(len(singles), sums[0].shape[0], dtype=torch.float64)
    points = [(step + 0.5) / n_steps for step in range(n_steps)] if approximation == "ig" else [0.0]
    groups = _grouped(
        single
        for single in singles
        if single.address == "embed" or (single.layer is not None and single.layer < anchor.layer)
    )
    reader = anchor.reader(token_ids)
    with evaluating(pair.base, pair.specialized):
        for packing in side_by_side(token_ids, most_tokens=min(batch_tokens, MOST_TOKENS)):
            texts = [token_ids[prompt] for prompt in packing.prompts]
            row = _Row.start(
                pair, packing, texts, reader, [sums[prompt] for prompt in packing.prompts], source=source, where=where
            )
            for point in points:
                for members, part in row.descend(groups, approximation, point, grad_drop=grad_drop):
                    found[[place[member] for member in members]] += part.cpu().double() / len(points)
    owners = [row for row, component in enumerate(components) for _ in component.members or (component,)]
    parts = [place[one] for component in components for one in component.members or (component,)]
    return torch.zeros(len(components), found.shape[1], dtype=found.dtype).index_add_(
        0, torch.tensor(owners), found[parts]
    )


def _grouped(components: Iterator[Component]) -> dict[int | None, list[list[Component]]]:
    """Components by layer; in each, by unit, neurons of experts apart from those of plain MLPs."""
    ordered = sorted(components, key=lambda one: (-1 if one.layer is None else one.layer, one.unit, one.expert is None))
    return {
        layer: [list(group) for _, group in groupby(members, key=lambda one: (one.unit, one.expert is None))]
        for layer, members in ((layer, [*here]) for layer, here in groupby(ordered, key=lambda one: one.layer))
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Row:
    """Some prompts side by side.

    Attributes:
        pair: The two models.
        reader: What is read, and where.
        packing: How the prompts lie.
        tokens: Right-padded, shape `(prompt, token)`.
        calls: The base's layers below the anchor.
        residual: Base residual stream entering layer 0, shape `(1, token, feature)`.
        places: For each prompt, where it is read, shape `(position,)`.
        sums: Shape `(sum, token)`.
        activations: What gives patches, if these are activations.
    """

    pair: ModelPair
    reader: Reader
    packing: Packing
    tokens: Tensor
    calls: tuple[LayerCall, ...]
    residual: Tensor
    places: tuple[Tensor, ...]
    sums: Tensor
    activations: Activations | None

    @classmethod
    def start(
        cls,
        pair: ModelPair,
        packing: Packing,
        token_ids: Sequence[Sequence[int]],
        reader: Reader,
        sums: Sequence[Tensor],
        *,
        source: Source,
        where: Where,
    ) -> _Row:
        tokens = pad(token_ids, embedding_weight(pair.base).device)
        places = tuple(
            torch.tensor(path) for path in packing.paths_at([reader.places[prompt] for prompt in packing.prompts])
        )
        calls, residual = record(pair.base, tokens, packing, reader.layer, torch.cat(places))
        whole = torch.cat(list(sums), dim=1).to(residual.device, torch.promote_types(residual.dtype, torch.float32))
        activations = None
        if source == "activations":
            activations = Activations.of(
                pair, packing, tokens, calls, packing.mask(torch.cat(places)) if where == "readouts" else None
            )
        return cls(
            pair=pair,
            reader=reader,
            packing=packing,
            tokens=tokens,
            calls=calls,
            residual=residual,
            places=places,
            sums=whole,
            activations=activations,
        )

    def descend(
        self,
        groups: dict[int | None, list[list[Component]]],
        approximation: Approximation,
        point: float,
        *,
        grad_drop: bool,
    ) -> Iterator[tuple[list[Component], Tensor]]:
        """Estimates of each group of components, shape `(component, sum)`, from the anchor down.

        Args:
            groups: What is wanted.
            approximation: How.
            point: Where between the base (0) and the specialized model (1) the gradient is taken.
            grad_drop: As in `estimate`.
        """
        entering = [self.residual if point == 0 else torch.lerp(self.residual, self._embedded, point)]
        for layer, call in enumerate(self.calls):
            entering.append(call(entering[-1], self._between(layer, point)))
        gradients = [self._seed(entering.pop())]  # the plain one; with `grad_drop` one for each layer left out, too
        for layer in reversed(range(self.reader.layer)):
            contributions, leaving, below = self._layer(layer, entering.pop(), gradients, approximation, point)
            for members in groups.get(layer, ()):
                parts = [
                    contributions.of(members, gradient, self.sums.to(gradient.leaving.device)) for gradient in leaving
                ]
                yield members, _mean_size(parts, n_same=layer) if grad_drop else parts[0]
            gradients = [*below, *gradients[:1]] if grad_drop else below
        if members := [member for group in groups.get(None, ()) for member in group]:
            change = self._embedded - self.residual
            parts = [
                summed(self.sums.to(change.device), (change * gradient.to(change))[0].sum(dim=-1))[None]
                for gradient in gradients
            ]
            part = _mean_size(parts, n_same=0) if grad_drop else parts[0]
            yield members, part.expand(len(members), -1)

    def _seed(self, leaving: Tensor) -> Tensor:
        """Gradient of the readouts, each of its own prompt, to the residual stream at the anchor."""
        seed = torch.zeros_like(leaving)
        for sequence, places in zip(self.packing.prompts, self.places, strict=True):
            index = places.to(leaving.device)
            gradient = self.reader.gradient(self.pair.base, sequence, leaving[:, index])
            seed.index_add_(1, index, gradient.to(seed))
        return seed

    @cached_property
    def _embedded(self) -> Tensor:
        """The residual stream that enters layer 0 with the embedding patched, shape `(1, token, feature)`."""
        if self.activations:
            return self.activations.where(self.activations.entering(0), self.residual)
        return embedded(self.pair, self.packing, self.tokens, [Component.parse("embed")])

    def _between(self, layer: int, point: float) -> dict[str, Tensor]:
        """A layer's parameters at a point between the two models; none for the base itself."""
        if point == 0:
            return {}
        prefix = self.pair.architecture.layer_prefix(layer)
        return {
            name: torch.lerp(ours.detach(), self.pair.specialized_weight(prefix + name).to(ours.device), point)
            for name, ours in self.calls[layer].layer.named_parameters()
        }

    def _layer(
        self, layer: int, residual: Tensor, gradients: Sequence[Tensor], approximation: Approximation, point: float
    ) -> tuple[Contributions, list[Gradients], list[Tensor]]:
        """One layer on the way down.

        Returns:
            What its components contribute, the gradients to its writes, and those to the residual stream entering it.
        """
        call, weights = self.calls[layer], self._between(layer, point)
        attention, mlp = watched(call)
        paths = [attention, mlp]
        if approximation != "outputs":
            paths = list(dict.fromkeys((*parametrized(self.pair, layer, call), *paths)))
        with torch.enable_grad():
            start = residual.detach().requires_grad_()
            live = call.watch(start, weights, *paths, copies=True)
        outputs = [live[path][1] for path in paths]
        found, below = [], []
        for number, gradient in enumerate(gradients, 1):
            along = gradient.to(live[""][1])
            down, *grads = torch.autograd.grad(
                live[""][1], [start, *outputs], along, retain_graph=number < len(gradients), allow_unused=True
            )
            to = {
                path: torch.zeros_like(output) if grad is None else grad
                for path, output, grad in zip(paths, outputs, grads, strict=True)
            }
            rows = (1, residual.shape[1], -1)
            found.append(
                Gradients(attention=to[attention].view(rows), mlp=to[mlp].reshape(rows), leaving=along, modules=to)
            )
            below.append(down)
        seen: Seen = {path: (entering.detach(), output.detach()) for path, (entering, output) in live.items()}
        contributions: Contributions
        if approximation == "outputs":
            changes: Changes = Hybrids(self.pair, layer, call, residual, seen)
            if self.activations:
                changes = Taken(self.activations, layer, call, residual, seen)
            contributions = Writes(self.pair, layer, call, residual, changes)
        else:
            contributions = Parameters(self.pair, layer, call, residual, seen=seen, weights=weights)
        return contributions, found, below


def _mean_size(parts: Sequence[Tensor], *, n_same: int) -> Tensor:
    """Mean size of estimates that each leave out one other layer.

    Args:
        parts: With nothing left out, then without each of the layers above.
        n_same: Layers below, without any of which the estimate is the first.
    """
    sizes = [part.abs() for part in parts]
    n_others = n_same + len(sizes) - 1
    return (n_same * sizes[0] + sum(sizes[1:], torch.zeros_like(sizes[0]))) / n_others if n_others else sizes[0]
