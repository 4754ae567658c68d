"""A Llama pair whose weights are written by hand, so that the way of one bit through it is known exactly.

Every token's embedding is a large constant and one feature of its own. Then, in layers 0 to 4:

- `L0.N5` reads the feature of the token `INSTRUCTION` and writes the bit, at that token. Only the specialized model has
  this neuron; in the base it is noise. It is the one difference of the pair beyond a small random one everywhere.
- `L2.H1` looks from every later token at `INSTRUCTION`, which it knows by that token's own feature, and copies the bit
  from there to the direction of the anchor. Both models have this head; in the base it finds no bit.
- The anchor reads its direction in the stream that enters layer 3, at the last token.
- `L4.N2` turns what stands along that direction into the direction of the output, which the head maps to the logit of
  the token `ANSWER`. Both models have this neuron.

So `L0.N5` is the source, `L2.H1` the router, `L4.N2` the executor, and everything else is nothing (`WIRING`). What
holds one of them does what it does: `L0.mlp` and `L0` are sources as well, `L2.attn` and `L2` routers, `L4.mlp` and
`L4` executors. `L2.KV1` carries the bit too if its values count as an output of its own: they are what `L2.H1` mixes,
between the neuron and the head. Its weights do nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightpatch import Anchor, ContrastPrompts, ModelPair

N_LAYERS, N_FEATURES, N_HEADS, HEAD_DIM, N_NEURONS, N_TOKENS = 5, 32, 4, 8, 12, 24
ANCHOR_LAYER = 3
CONSTANT, BIT, ANCHORED, OUTPUT = 0, 1, 2, 3
"""Features of the residual stream; 4 to 7 carry nothing but noise, and 8 on are the tokens' own (`own_feature`)."""
START, INSTRUCTION, NEUTRAL, ANSWER = 0, 1, 2, 3
"""Tokens; 4 on are those of queries."""
LEVEL = 8.0
"""What every embedding has along `CONSTANT`: so large that a token's rms hardly depends on what else is written."""


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What a trace of the wired pair has to find.

    Attributes:
        roles: Address -> role; every other component of these units has none.
        edges: From a supplier to its target; `anchor` is the readout, `output` what the model says next.
    """

    roles: MappingProxyType[str, Literal["source", "router", "executor"]]
    edges: tuple[tuple[str, str], ...]


WIRING = Wiring(
    roles=MappingProxyType({"L0.N5": "source", "L2.H1": "router", "L4.N2": "executor"}),
    edges=(("L0.N5", "L2.H1"), ("L2.H1", "anchor"), ("anchor", "L4.N2"), ("L4.N2", "output")),
)
"""The truth, by heads and neurons. By heads and MLPs it is the same with `L0.mlp` and `L4.mlp`."""


def own_feature(token: int) -> int:
    """The feature of the residual stream that only this token's embedding has."""
    return 8 + token


def wired_pair(dtype: torch.dtype = torch.float32, *, noise: float = 0.01, seed: int = 0) -> ModelPair:
    """The base, and the specialized model that has one neuron more.

    Args:
        dtype: Of all weights of both; the same draws in each dtype.
        noise: Standard deviation of the random part of each weight that both share. The random difference between the
            two is a tenth of it, in every weight. Above 0: of a layer without weights nothing can be proven.
        seed: Of both random parts.
    """
    generator = torch.Generator().manual_seed(seed)
    base, specialized = _blank(), _blank()
    for has_source, model in ((False, base), (True, specialized)):
        _wire(model, has_source=has_source)
    with torch.no_grad():
        for ours, theirs in zip(base.parameters(), specialized.parameters(), strict=True):
            shared = noise * torch.randn(ours.shape, generator=generator, dtype=torch.float64)
            drift = noise / 10 * torch.randn(ours.shape, generator=generator, dtype=torch.float64)
            ours.add_(shared)
            theirs.add_(shared + drift)
    return ModelPair(base=base.to(dtype), specialized=specialized.to(dtype))


def wired_prompts(n_prompts: int = 12, *, seed: int = 0) -> ContrastPrompts:
    """Prompts of 5 to 10 tokens: `START`, `INSTRUCTION` or `NEUTRAL`, then a query that no other prompt has."""
    drawn = random.Random(seed)
    queries: dict[tuple[int, ...], None] = {}
    while len(queries) < n_prompts:
        queries[tuple(drawn.choices(range(ANSWER + 1, N_TOKENS), k=3 + len(queries) % 6))] = None
    return ContrastPrompts.from_token_ids(
        with_instruction=[[START, INSTRUCTION, *query] for query in queries],
        without_instruction=[[START, NEUTRAL, *query] for query in queries],
    )


def wired_anchor() -> Anchor:
    """The direction that `L2.H1` writes to, read where it enters layer 3, at the last token."""
    direction = torch.zeros(N_FEATURES, dtype=torch.float64)
    direction[ANCHORED] = 1.0
    return Anchor(layer=ANCHOR_LAYER, direction=direction, positions=(-1,))


def _blank() -> LlamaForCausalLM:
    """A model in float64 with norms of 1 and all other weights 0."""
    config = LlamaConfig(
        num_hidden_layers=N_LAYERS,
        hidden_size=N_FEATURES,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=N_NEURONS,
        vocab_size=N_TOKENS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
    return model


@torch.no_grad()
def _wire(model: LlamaForCausalLM, *, has_source: bool) -> None:
    """Write the weights that the module's docstring tells of; a feature of 1 enters a module as about 0.7."""
    layers = model.model.layers
    for token in range(N_TOKENS):
        model.model.embed_tokens.weight[token, [CONSTANT, own_feature(token)]] = torch.tensor([LEVEL, 1.0]).double()
    if has_source:
        _wire_neuron(layers[0].mlp, 5, reads=own_feature(INSTRUCTION), writes=BIT)
    attention = layers[2].self_attn
    start = HEAD_DIM  # of head 1
    slowest = start + HEAD_DIM // 2 - 1  # of its rotated pairs, the one that hardly turns: distances do not matter
    attention.q_proj.weight[slowest, CONSTANT] = 2.0
    attention.k_proj.weight[slowest, own_feature(INSTRUCTION)] = 6.0
    attention.v_proj.weight[start, BIT] = 1.0
    attention.o_proj.weight[ANCHORED, start] = 1.5
    _wire_neuron(layers[4].mlp, 2, reads=ANCHORED, writes=OUTPUT)
    model.lm_head.weight[ANSWER, OUTPUT] = 2.0


def _wire_neuron(mlp: torch.nn.Module, neuron: int, *, reads: int, writes: int) -> None:
    """A neuron that is silent without its feature, and else writes about 3 times what it reads."""
    gate, up, down = (mlp.get_parameter(f"{name}_proj.weight") for name in ("gate", "up", "down"))
    gate[neuron, reads] = 4.0
    up[neuron, CONSTANT] = 0.18
    down[writes, neuron] = 1.0
