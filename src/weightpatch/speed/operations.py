"""The ideal: how many operations the exact method needs, whoever does it.

An operation is one multiplication or one addition, so a matrix product of shapes (n, k) and (k, m) has 2 n k m.
Norms, activation functions, rotations and softmax are not counted; neither is the embedding, which is a look-up.

Tokens that several prompts share at their start are one token: N is the number of nodes of the prefix tree over the
prompts. A node of depth d (0 for a first token) attends to d + 1 tokens; the sum over the nodes is the number of
attention pairs, each of 4 x head_dim x n_heads operations (scores, then the weighted sum of values). The readout is at
the last token of each prompt; R is the number of these nodes, and their pairs are counted alike.

For one component of layer l, with the anchor entering layer La:

- layers l + 1 to La - 2 in full: per token 2 operations for each weight of q, k, v, o and the MLP's matrices, and all
  pairs;
- layer La - 1, when l lies below it: keys and values of all tokens; queries, o, MLP and pairs only of the readout's;
- the component's own layer, on T tokens: all N, or only the R of the readout when l = La - 1:
  a head, the MLP behind it and 4 x head_dim x n_features per token for its write (its old one out, its new one in);
  a key/value group, the MLP, the pairs of the heads that share it, and 2 x head_dim x n_features per token and head;
  an attention, the MLP (what it writes is known from the specialized layer below);
  an MLP, its own matrices; a neuron, its share of them;
  a block, nothing (what leaves the specialized layer is known too).

For all components of a layer together, once: one base and one specialized layer on N tokens. And once: a base pass
through the layers below the anchor. Layers with a mixture of experts are not counted: which experts run depends on the
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from weightpatch.architecture import Architecture
from weightpatch.component import Component, slices
from weightpatch.errors import ComponentError

UNITS = ("heads", "heads.q", "heads.o", "kvs", "attns", "mlps", "neurons", "blocks")
"""Units whose operations are known."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that something is computed for.

    Attributes:
        n_tokens: How many.
        n_pairs: Tokens that they attend to, themselves included, summed over them.
    """

    n_tokens: int
    n_pairs: int


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """Prompts with what they share at their start counted once.

    Attributes:
        all: Every node.
        readout: The nodes that are the last token of a prompt.
    """

    all: Tokens
    readout: Tokens

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]]) -> PrefixTree:
        """The tree over some prompts' token ids."""
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the root is 0
        depths, ends = [0], set()
        for ids in token_ids:
            node = 0
            for token in ids:
                parent, node = node, nodes.setdefault((node, token), len(depths))
                if node == len(depths):
                    depths.append(depths[parent] + 1)
            ends.add(node)
        readout = [depths[node] for node in ends]
        return cls(
            all=Tokens(n_tokens=len(nodes), n_pairs=sum(depths)),
            readout=Tokens(n_tokens=len(readout), n_pairs=sum(readout)),
        )


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What the parts of one layer cost.

    Attributes:
        q: Operations per token of the query projection, and the same of the output projection.
        kv: Operations per token of the key and value projections.
        mlp: Operations per token of the MLP's matrices.
        pair: Operations per attention pair, of all heads.
    """

    q: float
    kv: float
    mlp: float
    pair: float

    def full(self, tokens: Tokens) -> float:
        """The whole layer for some tokens, keys and values of these included."""
        return self.without_keys(tokens) + self.kv * tokens.n_tokens

    def without_keys(self, tokens: Tokens) -> float:
        """Everything but keys and values."""
        return (2 * self.q + self.mlp) * tokens.n_tokens + self.pair * tokens.n_pairs


def operations(
    architecture: Architecture, tree: PrefixTree, *, anchor_layer: int, components: Sequence[Component]
) -> float | None:
    """Operations of a whole sweep, as this module's docstring counts them; None for a mixture of experts.

    Raises:
        ComponentError: a unit that is not counted.
    """
    if others := sorted({component.unit for component in components} - {*UNITS}):
        raise ComponentError(f"no operations are counted for {', '.join(others)}. Choose some of {', '.join(UNITS)}.")
    costs = [_layer_cost(architecture, layer) for layer in range(anchor_layer)]
    if any(cost is None for cost in costs):
        return None
    known = [cost for cost in costs if cost is not None]
    total = sum(cost.full(tree.all) for cost in known)
    shared = {component.layer for component in components if component.layer is not None}
    total += sum(2 * known[layer].full(tree.all) for layer in shared)
    return total + sum(_component(architecture, known, tree, component) for component in components)


def _component(architecture: Architecture, costs: Sequence[LayerCost], tree: PrefixTree, component: Component) -> float:
    """Operations of one component, without what its layer's components share."""
    layer, last = component.layer or 0, len(costs) - 1
    total = _own(architecture, costs[layer], tree.readout if layer == last else tree.all, component)
    if layer < last:
        total += sum(cost.full(tree.all) for cost in costs[layer + 1 : last])
        total += costs[last].kv * tree.all.n_tokens + costs[last].without_keys(tree.readout)
    return total


def _own(architecture: Architecture, cost: LayerCost, tokens: Tokens, component: Component) -> float:
    """Operations within the component's own layer."""
    mlp = cost.mlp * tokens.n_tokens
    head_write = 2 * architecture.head_dim * architecture.n_features * tokens.n_tokens
    match component.unit:
        case "heads" | "heads.q" | "heads.o":
            return mlp + 2 * head_write
        case "kvs":
            share = cost.pair * tokens.n_pairs / architecture.n_kv_heads
            return mlp + share + architecture.heads_per_kv * head_write
        case "attns" | "mlps":
            return mlp
        case "neurons":
            return mlp / architecture.n_neurons
        case _:
            return 0.0


def _layer_cost(architecture: Architecture, layer: int) -> LayerCost | None:
    """The cost of a layer's parts; None when its MLP holds stacked experts."""
    mlp = Component.parse(f"L{layer}.mlp")
    names = dict.fromkeys(piece.parameter for piece in slices(architecture, mlp))
    shapes = [architecture.parameters[name] for name in names]
    if any(len(shape) > 2 for shape in shapes):
        return None
    width = architecture.head_dim * architecture.n_features
    return LayerCost(
        q=2 * width * architecture.n_heads,
        kv=2 * 2 * width * architecture.n_kv_heads,
        mlp=2 * sum(prod(shape) for shape in shapes if len(shape) == 2),
        pair=4 * architecture.head_dim * architecture.n_heads,
    )
