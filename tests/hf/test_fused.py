"""Fused projections: their parts are what the model splits them into."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensortap.records import Placement, TensorRecord

CORE = "layers.1.attn.core"


def part(record: TensorRecord, payload: torch.Tensor, word: str) -> torch.Tensor:
    """The part `word` of a fused tensor, cut as its placement says."""
    assert isinstance(record.placement, Placement)
    assert record.placement.logical_shape == tuple(payload.shape)
    (found,) = (p for p in record.placement.parts if p.module.endswith(f".{word}"))
    pieces = [payload.narrow(found.axis, start, length) for start, length in found.segments]
    return torch.cat(pieces, dim=found.axis)


def cut(found: Any, name: str, word: str) -> torch.Tensor:
    ((record, payload),) = found.sink.find(name)
    return part(record, payload, word)


@pytest.mark.parametrize("which", ["gpt2", "gpt_neox", "phi3", "gpt_bigcode"])
def test_the_value_part_is_what_attention_gets(which: str, build: Any, capture: Any) -> None:
    found = capture(build(which).eval())
    value = found(f"{CORE}/forward/value").transpose(1, 2).flatten(2)
    assert torch.equal(cut(found, "layers.1.attn.qkv/forward/output", "v"), value)


@pytest.mark.parametrize("which", ["gpt2", "gpt_neox", "phi3", "gpt_bigcode"])
def test_query_and_key_parts_are_what_attention_gets_before_rotation(
    which: str, build: Any, capture: Any
) -> None:
    found = capture(build(which).eval())
    for tensor in ("query", "key"):
        core = found(f"{CORE}/forward/{tensor}").transpose(1, 2)
        fused = cut(found, "layers.1.attn.qkv/forward/output", tensor[0]).view(core.shape)
        # The first token is not rotated, its angle being zero.
        torch.testing.assert_close(fused[:, 0], core[:, 0])


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
    ids=["one key", "a key for every head", "groups"],
)
def test_falcon_parts_equal_its_own_split(
    changes: dict[str, Any], build: Any, capture: Any
) -> None:
    model = build("falcon", **changes).eval()
    found = capture(model)
    ((record, fused),) = found.sink.find("layers.1.attn.qkv/forward/output")
    query, key, value = model.transformer.h[1].self_attention._split_heads(fused)
    if changes.get("new_decoder_architecture"):  # Falcon repeats each key for its queries.
        key, value = key[:, :, ::2], value[:, :, ::2]
    for word, expected in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(part(record, fused, word), expected.flatten(2))


def test_bloom_parts_equal_its_own_split(build: Any, capture: Any) -> None:
    model = build("bloom").eval()
    found = capture(model)
    ((record, fused),) = found.sink.find("layers.1.attn.qkv/forward/output")
    parts = model.transformer.h[1].self_attention._reshape(fused)
    for word, expected in zip("qkv", parts, strict=True):
        assert torch.equal(part(record, fused, word), expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("which", ["gpt2", "gpt_neox", "phi3", "bloom", "falcon"])
@pytest.mark.parametrize("word", ["q", "k", "v"])
def test_weight_parts_compute_the_output_parts(
    which: str, word: str, build: Any, capture: Any
) -> None:
    model = build(which).eval()
    found = capture(model)
    qkv = "layers.1.attn.qkv"
    weight = cut(found, f"{qkv}/param/weight", word)
    weight = weight if which == "gpt2" else weight.mT  # Conv1D holds "in out".
    bias = cut(found, f"{qkv}/param/bias", word) if found.has(f"{qkv}/param/bias") else 0
    expected = found(f"{qkv}/forward/input") @ weight + bias
    torch.testing.assert_close(cut(found, f"{qkv}/forward/output", word), expected)


def test_the_gradient_of_a_fused_output_splits_as_the_output_does(build: Any, capture: Any) -> None:
    found = capture(build("gpt2").eval())
    gradient = cut(found, "layers.1.attn.qkv/backward/grad_output", "v")
    core = found(f"{CORE}/backward/grad_value").transpose(1, 2).flatten(2)
    assert torch.equal(gradient, core)
    weight = cut(found, "layers.1.attn.qkv/grad/weight", "v")
    into = found("layers.1.attn.qkv/forward/input").flatten(0, 1)
    torch.testing.assert_close(weight, into.T @ gradient.flatten(0, 1))


def test_gate_and_up_parts_compute_the_input_of_the_down_projection(
    build: Any, capture: Any
) -> None:
    found = capture(build("phi3").eval())
    gate, up = (cut(found, "layers.1.mlp.gate_up/forward/output", w) for w in ("gate", "up"))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(found("layers.1.mlp.down/forward/input"), expected)


@pytest.mark.parametrize("which", ["mixtral", "qwen3_moe"])
def test_stacked_experts_split_into_gate_and_up(which: str, build: Any, capture: Any) -> None:
    model = build(which).eval()
    found = capture(model)
    name = "layers.1.mlp.experts/param/gate_up_proj"
    ((record, _),) = found.sink.find(name)
    assert record.dims == "expert out in"
    gate, up = cut(found, name, "gate"), cut(found, name, "up")
    down = found("layers.1.mlp.experts/param/down_proj")
    hidden = found("layers.1.mlp.experts/forward/input")
    index = found("layers.1.mlp.experts/forward/input.1")
    share = found("layers.1.mlp.experts/forward/input.2")
    expected = torch.zeros_like(hidden)
    for token in range(hidden.shape[0]):
        for expert, weight in zip(index[token], share[token], strict=True):
            wide = torch.nn.functional.silu(gate[expert] @ hidden[token]) * (
                up[expert] @ hidden[token]
            )
            expected[token] += weight * (down[expert] @ wide)
    torch.testing.assert_close(found("layers.1.mlp.experts/forward/output"), expected)


def test_axes_of_weights_are_named(build: Any, capture: Any) -> None:
    def dims(family: str, name: str) -> str | None:
        ((record, _),) = capture(build(family), backward=False).sink.find(name)
        return record.dims  # type: ignore[no-any-return]

    assert dims("gpt2", "layers.0.mlp.up/param/weight") == "in out"
    assert dims("llama", "layers.0.mlp.up/param/weight") == "out in"
    assert dims("llama", "embed/param/weight") == "vocab hidden"
    assert dims("llama", "lm_head/forward/output") == "batch seq vocab"


def test_an_unknown_fused_layout_has_no_parts(build: Any, capture: Any) -> None:
    model = build("gpt2")
    model.config.model_type = "another"
    ((record, _),) = capture(model, backward=False).sink.find("layers.0.attn.qkv/forward/output")
    assert record.placement is None
