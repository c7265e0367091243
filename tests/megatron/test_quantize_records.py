"""What a tap records of a quantised model: the operands as used, and the format they are in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.megatron import quantize_layers as built
from tests.megatron.quantize_layers import gradients
from tests.megatron.quantize_oracle import on_grid

import tensortap
from tensortap import FormatInfo, MemorySink
from tensortap_megatron.quantization import quantize


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


@pytest.fixture
def model() -> Any:
    return built.gpt()


def tapped(model: Any, **options: Any) -> tuple[MemorySink, dict[str, torch.Tensor]]:
    sink = MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise", **options):
        return sink, gradients(model)


def value(sink: MemorySink, name: str) -> Any:
    [(_, payload)] = sink.find(name)
    assert payload is not None
    return payload.double().numpy()


@pytest.mark.parametrize(
    ("used", "raw", "axis"),
    [
        ("mlp.down/forward/input_quantized", "mlp.down/forward/input", -1),
        ("mlp.down/forward/weight", "mlp.down/param/weight", 1),
        ("mlp.down/backward/weight", "mlp.down/param/weight", 0),
        ("mlp.down/backward/grad_output_quantized", "mlp.down/backward/grad_output", -1),
        ("attn.qkv/forward/input_quantized", "attn.qkv/forward/input", -1),
        ("attn.core/forward/query_quantized", "attn.core/forward/query", -1),
        ("attn.core/forward/probs_quantized", "attn.core/forward/probs", -1),
    ],
)
@pytest.mark.parametrize("format", ["mxfp4", "hifp8"])
def test_operands_are_the_raw_tensors_on_the_grid_along_their_product(
    model: Any, format: str, used: str, raw: str, axis: int
) -> None:
    with quantize(model, format):
        sink, _ = tapped(model, select="layers.1.*")
    wanted = on_grid(value(sink, f"layers.1.{raw}"), format, axis)
    np.testing.assert_array_equal(value(sink, f"layers.1.{used}"), wanted)


def test_keys_and_values_are_recorded_for_the_heads_they_are_repeated_for(model: Any) -> None:
    with quantize(model, "mxfp4"):
        sink, _ = tapped(model, select="layers.1.attn.core")
    for word, axis in (("key", -1), ("value", 0)):
        raw = value(sink, f"layers.1.attn.core/forward/{word}")
        wanted = on_grid(np.repeat(raw, 2, axis=2), "mxfp4", axis)
        np.testing.assert_array_equal(
            value(sink, f"layers.1.attn.core/forward/{word}_quantized"), wanted
        )


def test_exactly_the_quantised_operands_carry_the_format(model: Any) -> None:
    with quantize(model, "hifp8", select="*.mlp.*", rounding="hybrid"):
        sink, _ = tapped(model)
    carrying = {str(r.name) for r in sink.records if r.format is not None}
    words = ("gate_up", "down")
    tensors = ("forward/weight", "forward/input_quantized")
    tensors += ("backward/weight", "backward/grad_output_quantized")
    assert carrying == {f"layers.{n}.mlp.{w}/{t}" for n in (0, 1) for w in words for t in tensors}
    formats = {r.format for r in sink.records if r.format is not None}
    assert formats == {FormatInfo("hifp8", None, "hybrid")}


def test_the_run_says_which_format_it_was_in(model: Any) -> None:
    with quantize(model, "mxfp8"):
        sink, _ = tapped(model)
    assert sink.run.format == "mxfp8"
    assert tapped(model)[0].run.format is None


def test_a_tap_changes_no_bit_of_a_quantised_step(model: Any) -> None:
    with quantize(model, "mxfp4"):
        plain = gradients(model)
        _, seen = tapped(model)
    assert all(torch.equal(seen[key], plain[key]) for key in plain)


@pytest.mark.parametrize("tap_first", [True, False])
def test_tap_and_quantisation_are_undone_in_any_order(model: Any, tap_first: bool) -> None:
    plain = gradients(model)
    sink = MemorySink()
    tap = tensortap.attach(model, sink, on_error="raise")
    quantised = quantize(model, "mxfp4")
    gradients(model)
    for undo in (tap.detach, quantised.remove)[:: 1 if tap_first else -1]:
        undo()
    assert sink.find("layers.0.attn.core/forward/probs_quantized")
    again = gradients(model)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


def test_recomputed_operands_are_marked_and_equal() -> None:
    model = built.gpt(recompute_granularity="selective")
    name = "layers.0.attn.core/forward/query_quantized"
    with quantize(model, "mxfp4"):
        sink, _ = tapped(model, select=name)
    (first, one), (second, two) = sink.find(name)
    assert (first.at.recompute, second.at.recompute) == (False, True)
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
