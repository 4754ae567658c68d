"""A quick proof, on the very model at hand, that its row of the architecture table tells the truth.

A wrong row gives plausible numbers, so it is tested before anything is measured: a few tokens run through one layer of
each kind, in float32, and every statement below must hold for its slices. A layer needs a dozen calls on seven tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightpatch.architecture import Architecture, embedding_weight
from weightpatch.component import Component, Slice, components, slices
from weightpatch.errors import ArchitectureError
from weightpatch.packed.calls import LayerCall, record
from weightpatch.packed.packing import pack
from weightpatch.residuals import evaluating, pad, walk

_PROMPTS = ((1, 2, 3, 4, 5), (1, 2, 6, 7), (1, 2, 3))
"""Three short prompts that share their start, so that packing is proven too."""


FOREIGN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, StopIteration)
"""What a model's own code may raise when it is called in a way that it was not made for."""


def prove_row(model: PreTrainedModel) -> None:
    """Raise unless the row's slices, their order and the way a layer is put together hold for this model.

    Proven on the first layer of each kind (plain or mixture of experts, each type of attention): packed prompts leave
    the layer as unpacked ones do; the attention writes what `o` puts out, and the layer put together from both known
    writes gives its own output; a head's query rows move only its own part of the input of `o` (where no norm spans
    the heads); rows called queries change nothing at a token whose later tokens alone could read a key or value there,
    rows called keys nothing at a token that sees only itself; a head's columns of `o` multiply its own part; a neuron
    is silenced in the same way by any one of its matrices.

    Raises:
        ArchitectureError: which of these does not hold, in which layer.
    """
    architecture = Architecture.of(model)
    faults: list[str] = []
    implementation = model.config._attn_implementation
    try:
        if implementation not in ("eager", "sdpa"):  # slices are the same whatever computes the attention
            model.config._attn_implementation = "eager"
        with evaluating(model):
            for layer in _one_of_each_kind(architecture, model):
                try:
                    faults += _faults(model, architecture, layer)
                except torch.OutOfMemoryError:
                    raise
                except FOREIGN as error:
                    faults.append(f"layer {layer}: it cannot be called as the row says ({error})")
    finally:
        model.config._attn_implementation = implementation
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults[:12])
        raise ArchitectureError(
            f"the row of {architecture.model_type!r} in weightpatch/architecture.py is wrong for this model. What does "
            f"not hold:\n{listed}"
        )


def _one_of_each_kind(architecture: Architecture, model: PreTrainedModel) -> list[int]:
    types = getattr(model.config, "layer_types", None) or [""] * architecture.n_layers
    kinds = [(architecture.n_experts_of(layer) > 0, types[layer]) for layer in range(architecture.n_layers)]
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def _faults(model: PreTrainedModel, architecture: Architecture, layer: int) -> Iterator[str]:
    device = embedding_weight(model).device
    n_tokens = int(embedding_weight(model).shape[0])
    prompts = [[token % n_tokens for token in prompt] for prompt in _PROMPTS]
    (packing,) = pack(prompts, most_tokens=64)
    tokens = pad([prompts[place] for place in packing.prompts], device)
    after: list[Tensor] = []
    before: list[Tensor] = []

    def see(number: int, residual: Tensor, _args: object, _kwargs: object) -> None:
        if number in (layer, layer + 1):
            (after if number > layer else before).append(residual)

    walk(model, tokens, layer + 1, see)
    calls, _ = record(model, tokens, packing, layer + 1, torch.arange(packing.n_tokens))
    call = calls[layer]
    plain, expected = call(packing.fold(before[0])), packing.fold(after[0])
    loose = 2e-2 if plain.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not _close(plain, expected, loose):
        yield f"layer {layer}: packed prompts leave it otherwise than unpacked ones do"
        return
    if not _close(call.last(packing.fold(before[0])), plain, loose):
        yield f"layer {layer}: what leaves it at chosen tokens is not what leaves it at all of them"
        return
    probe = _Probe.of(architecture, layer, call, packing.fold(before[0]))
    for statement, held in probe.statements():
        if not held:
            yield f"layer {layer}: {statement}"


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal up to a share of each token's largest value: one token may be a thousand times larger than the others."""
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6)
    return bool(((found - expected).abs() <= tolerance * scale).all())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Probe:
    """One layer of a model in float32, with what its modules take in and put out on a packed row.

    Attributes:
        architecture: The model's architecture.
        number: The layer's number.
        call: The layer.
        weights: All its parameters in float32, by their names within the layer.
        residual: Stream that enters it, shape `(1, token, feature)`.
        seen: Input and output of its modules.
    """

    architecture: Architecture
    number: int
    call: LayerCall
    weights: dict[str, Tensor]
    residual: Tensor
    seen: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, architecture: Architecture, number: int, call: LayerCall, residual: Tensor) -> _Probe:
        family = architecture.family
        exact = _in_float32(call)
        weights = {name: parameter.detach().float() for name, parameter in call.layer.named_parameters()}
        last = family.mlp[-1]
        paths = dict.fromkeys((family.attn, family.q, family.k, family.v, family.o, last))
        seen = exact.watch(residual.float(), weights, *paths)
        return cls(
            architecture=architecture, number=number, call=exact, weights=weights, residual=residual.float(), seen=seen
        )

    def statements(self) -> Iterator[tuple[str, bool]]:
        """What the row says, and whether it holds."""
        family = self.architecture.family
        attention, leaving = self.seen[family.attn][1], self.seen[""][1]
        mlp = self.seen[family.mlp[-1]][1].view_as(leaving)
        yield f"{family.attn} writes what {family.o} puts out", torch.equal(attention, self.seen[family.o][1])
        finished = self.call.finish(self.residual, self.weights, attention=attention, mlp=mlp)
        yield f"{family.attn} and {' with '.join(family.mlp)} write all that the layer adds", _close(finished, leaving)
        for head in sorted({0, 1 % self.architecture.n_heads, self.architecture.n_heads - 1}):
            yield from self._about_a_head(head)
        for group in sorted({0, self.architecture.n_kv_heads - 1}):
            yield from self._about_a_group(group)
        for component in self._some_neurons():
            yield from self._about_a_neuron(component)
        yield from self._about_norms()

    def _about_norms(self) -> Iterator[tuple[str, bool]]:
        """A norm of the attention changes what it writes or adds; one of the MLP neither, while the MLP is silent."""
        family = self.architecture.family
        plain = self.seen[family.attn][1]
        silent = torch.zeros_like(self.residual)
        added = self.call.finish(self.residual, self.weights, attention=plain, mlp=silent)
        for paths, acts, whose in ((family.norm_attn, True, "attention"), (family.norm_mlp, False, "MLP")):
            for path in paths:
                name = f"{path}.weight"
                if name not in self.weights:
                    continue
                loud = {**self.weights, name: self.weights[name] + 1 + self.weights[name].abs()}
                written = self.call.attend(self.residual, loud)
                finished = self.call.finish(self.residual, loud, attention=plain, mlp=silent)
                still = _close(written, plain, 1e-5) and _close(finished, added, 1e-5)
                yield f"{path} is a norm of the {whose}", still is not acts

    def _about_a_head(self, head: int) -> Iterator[tuple[str, bool]]:
        family = self.architecture.family
        name, own = f"L{self.number}.H{head}", self._columns_of([head])
        before = self.seen[family.o][0]
        rows = self._pieces(f"{name}.q")
        change = self._entering_o(rows, self._noise(rows)) - before
        if self.architecture.heads_are_independent:
            still = _close(before + change.masked_fill(own, 0), before, 1e-6)
            yield f"the rows of {family.q} move only the part of {name}", still
        first = self._entering_o(rows, self._at_first_token(family.q, rows)) - before
        yield f"the rows of {family.q} for {name} are queries", _close(first + before, before)
        columns = self._pieces(f"{name}.o")
        noise = self._noise(columns)
        moved = self.call.attend(self.residual, self._with(columns, noise)) - self.seen[family.attn][1]
        matrix = next(iter(noise.values()))
        matrix = matrix if self.architecture.family.transposed else matrix.T
        yield f"the columns of {family.o} for {name} multiply its part", _close(moved, before[..., own] @ matrix)

    def _about_a_group(self, group: int) -> Iterator[tuple[str, bool]]:
        family, size = self.architecture.family, self.architecture.heads_per_kv
        own = self._columns_of(range(group * size, (group + 1) * size))
        before = self.seen[family.o][0]
        pieces = self._pieces(f"L{self.number}.KV{group}")
        change = self._entering_o(pieces, self._noise(pieces)) - before
        if self.architecture.heads_are_independent:
            yield (
                f"the rows of {family.k} and {family.v} move only the heads of group {group}",
                not bool(change[..., ~own].any()),
            )
        keys = pieces[: len(pieces) // 2]
        change = self._entering_o(keys, self._noise(keys)) - before
        yield f"the rows of {family.k} for group {group} are keys", _close(change[:, 0] + before[:, 0], before[:, 0])

    def _about_a_neuron(self, component: Component) -> Iterator[tuple[str, bool]]:
        """A neuron is silent without any one of its matrices (activations here are 0 at 0)."""
        pieces = slices(self.architecture, component)
        matrices = [piece for piece in pieces if len(self.architecture.parameters[piece.parameter]) > 1]
        biases = [piece for piece in pieces if piece not in matrices]
        attention = self.seen[self.architecture.family.attn][1]
        without = []
        for piece in matrices:
            stem = piece.parameter.removesuffix(".weight")
            silent = [piece, *(b for b in biases if b.parameter == f"{stem}.bias" and b.start == piece.start)]
            weights = {name: tensor.clone() for name, tensor in self._touched(silent).items()}
            for part in silent:
                part.of(weights[self._name(part)]).zero_()
            without.append(self.call.finish(self.residual, {**self.weights, **weights}, attention=attention))
        same = all(_close(one, without[-1], 1e-5) for one in without)
        yield f"{component} is one row of each in-matrix and one column of the out-matrix", same

    def _some_neurons(self) -> list[Component]:
        found = [c for c in components(self.architecture, "neurons") if c.layer == self.number]
        return [found[0], found[-1]]

    def _columns_of(self, heads: Sequence[int]) -> Tensor:
        """Which features of the input of `o` belong to some heads, shape `(feature,)`, boolean."""
        own = torch.zeros(self.architecture.n_heads * self.architecture.head_dim, dtype=torch.bool)
        for head in heads:
            own[head * self.architecture.head_dim : (head + 1) * self.architecture.head_dim] = True
        return own.to(self.residual.device)

    def _pieces(self, address: str) -> list[Slice]:
        """The matrices among a component's slices."""
        owned = slices(self.architecture, Component.parse(address))
        return [piece for piece in owned if len(self.architecture.parameters[piece.parameter]) > 1]

    def _name(self, piece: Slice) -> str:
        return piece.parameter.removeprefix(self.architecture.layer_prefix(self.number))

    def _touched(self, pieces: Sequence[Slice]) -> dict[str, Tensor]:
        return {self._name(piece): self.weights[self._name(piece)] for piece in pieces}

    def _with(self, pieces: Sequence[Slice], deltas: dict[Slice, Tensor]) -> dict[str, Tensor]:
        """The layer's weights with something added to some slices."""
        weights = {name: tensor.clone() for name, tensor in self._touched(pieces).items()}
        for piece in pieces:
            piece.of(weights[self._name(piece)]).add_(deltas[piece])
        return {**self.weights, **weights}

    def _noise(self, pieces: Sequence[Slice]) -> dict[Slice, Tensor]:
        generator = torch.Generator().manual_seed(0)
        deltas = {}
        for piece in pieces:
            target = piece.of(self.weights[self._name(piece)])
            noise = torch.randn(target.shape, generator=generator).to(target.device)
            deltas[piece] = noise * max(float(target.std()), 1e-3)
        return deltas

    def _at_first_token(self, path: str, pieces: Sequence[Slice]) -> dict[Slice, Tensor]:
        """Changes of rows that act on the first token only: it sees itself alone, but all others see it."""
        entering = self.seen[path][0][0]
        others = torch.linalg.qr(entering[1:].T.cpu())[0]
        along = entering[0].cpu() - others @ (others.T @ entering[0].cpu())
        noise = self._noise(pieces)
        axis = 0 if self.architecture.family.transposed else 1
        along = (along / along.norm()).to(entering.device)
        return {piece: _outer(delta.sum(dim=axis), along, axis) for piece, delta in noise.items()}

    def _entering_o(self, pieces: Sequence[Slice], deltas: dict[Slice, Tensor]) -> Tensor:
        path = self.architecture.family.o
        return self.call.watch(self.residual, self._with(pieces, deltas), path, stop=True)[path][0]


def _outer(outputs: Tensor, inputs: Tensor, axis: int) -> Tensor:
    """A matrix of rank 1 with its inputs on the given axis."""
    return torch.outer(outputs, inputs) if axis == 1 else torch.outer(inputs, outputs)


def _in_float32(call: LayerCall) -> LayerCall:
    """The same call with everything that it is given in float32."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(item) for item in value)
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    blocks, read_blocks = (
        tuple(replace(block, mask=cast(block.mask)) for block in blocks) for blocks in (call.blocks, call.read_blocks)
    )
    kwargs = {name: cast(value) for name, value in call.kwargs.items()}
    return replace(call, kwargs=kwargs, blocks=blocks, read_blocks=read_blocks)
