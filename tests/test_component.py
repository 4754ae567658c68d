from __future__ import annotations

import pytest
import torch

from conftest import SHAPES, build_model
from weightpatch.architecture import Architecture
from weightpatch.component import LEVELS, UNITS, Component, components, partition, slices
from weightpatch.errors import ArchitectureError, ComponentError

FAMILIES = sorted(SHAPES)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", FAMILIES)
def test_a_partition_owns_every_number_of_every_parameter_exactly_once(shape: str, level: str) -> None:
    model = build_model(shape, seed=1)
    architecture = Architecture.of(model)
    owners = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for component in partition(architecture, level):
        for piece in slices(architecture, component):
            piece.of(owners[piece.parameter]).add_(1)
    wrong = [name for name, count in owners.items() if not bool((count == 1).all())]
    assert not wrong


@pytest.mark.parametrize("shape", FAMILIES)
def test_the_address_of_every_component_reads_back_as_the_same_component(shape: str) -> None:
    everything = components(Architecture.of(build_model(shape, seed=1)), UNITS)
    assert [Component.parse(str(component)) for component in everything] == list(everything)
    assert len(set(everything)) == len(everything)


def test_a_llama_head_owns_its_query_rows_and_output_columns_and_its_group_the_keys_and_values() -> None:
    architecture = Architecture.of(build_model("llama-gqa", seed=1))
    head = [(p.parameter, p.axis, p.start, p.stop) for p in slices(architecture, Component.parse("L1.H3"))]
    assert head == [
        ("model.layers.1.self_attn.q_proj.weight", 0, 18, 24),
        ("model.layers.1.self_attn.q_proj.bias", 0, 18, 24),
        ("model.layers.1.self_attn.o_proj.weight", 1, 18, 24),
    ]
    group = [(p.parameter, p.axis, p.start, p.stop) for p in slices(architecture, Component.parse("L1.KV1"))]
    assert group == [
        (f"model.layers.1.self_attn.{name}_proj.{kind}", 0, 6, 12) for name in "kv" for kind in ("weight", "bias")
    ]


def test_a_gpt2_group_owns_its_parts_of_the_fused_transposed_projection() -> None:
    architecture = Architecture.of(build_model("gpt2", seed=1))
    group = [(p.parameter, p.axis, p.start, p.stop) for p in slices(architecture, Component.parse("L0.KV2"))]
    prefix = "transformer.h.0.attn.c_attn."
    assert group == [
        (f"{prefix}{kind}", axis, start, start + 6)
        for start in (24 + 12, 48 + 12)
        for kind, axis in (("weight", 1), ("bias", 0))
    ]


def test_units_and_addresses_can_be_named_together_and_are_counted_once() -> None:
    architecture = Architecture.of(build_model("llama-gqa", seed=1))
    found = [str(component) for component in components(architecture, "kvs, L1.KV0, L2.N3")]
    assert found == ["L0.KV0", "L0.KV1", "L1.KV0", "L1.KV1", "L2.KV0", "L2.KV1", "L2.N3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("L9.H0", "this model has layers L0 to L2"),
        ("L1.H4", "H0 to H3"),
        ("L1.KV2", "KV0 to KV1"),
        ("L1.N20", "N0 to N19"),
        ("headz", "unknown units: 'headz'"),
        ("", "unknown units"),
        ("L01.mlp", "unknown units: 'L01.mlp'"),
    ],
)
def test_an_address_or_unit_that_does_not_exist_is_refused_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        components(Architecture.of(build_model("llama-gqa", seed=1)), name)


def test_a_tied_output_head_is_no_component_of_its_own() -> None:
    architecture = Architecture.of(build_model("llama-mha", seed=1))
    assert "unembed" not in map(str, components(architecture, "ends"))
    with pytest.raises(ComponentError, match="tied to embed's: patch embed"):
        slices(architecture, Component.parse("unembed"))


def test_an_unknown_family_is_refused_with_the_way_to_add_it() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("stablelm", num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=9)
    )
    with pytest.raises(
        ArchitectureError, match=r"no architecture row for model_type 'stablelm'.*Add a row to FAMILIES"
    ):
        Architecture.of(model)
