"""Fake-quantised linear layers: what they compute, what they leave alone, what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import tensortap
from tensortap import formats
from tensortap.errors import NotSupported
from tensortap_hf import modes

SHAPES = ("llama", "gpt2", "bert", "mamba")
OPTIONS: dict[str, dict[str, str]] = {
    "int8": {"scale": "channel"},
    "hifp8": {"overflow": "saturate"},
}
GRIDS = ("int8", "hifp8", "mxfp8", "mxfp4", "nvfp4")
KEPT = ("embed", "lm_head", "router", "dt_proj", "decoder")


def linears(model: nn.Module) -> Iterator[nn.Module]:
    """The linear layers inside the layers of a model, found by hand."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        outside = not any(word in path for word in ("layers.", ".h.", "layer."))
        if kind in ("Linear", "Conv1D") and not outside and not path.endswith(KEPT):
            yield module


def by_hand(model: nn.Module, mode: str, run: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
    """The same model with its weights overwritten, and inputs quantised by hooks."""
    codec = formats.get(mode, **OPTIONS.get(mode, {}))
    before = [(module, module.weight.data) for module in linears(model)]
    hooks = []
    for module, weight in before:
        axis = 0 if type(module).__name__ == "Conv1D" else 1
        module.weight.data = codec.fake_quantize(weight, axis)
        hooks.append(
            module.register_forward_pre_hook(lambda m, args: (codec.fake_quantize(args[0], -1),))
        )
    found = run(model)
    for module, weight in before:
        module.weight.data = weight
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("mode", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_same_fake_quantisation_by_hand(
    shape: str, mode: str, build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build(shape)
    wanted = by_hand(model, mode, logits)
    with modes.apply(model, mode, family="generic"):
        # Operands that lie transposed in memory may be added up in another order.
        tolerance = 0.0 if shape in ("llama", "bert") else 1e-5
        assert torch.allclose(logits(model), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_against_fp32_are_ordered_by_the_format(
    shape: str, build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build(shape)
    exact = logits(model)
    errors = {}
    for mode in ("int8", "mxfp8", "mxfp4"):
        with modes.apply(model, mode, family="generic"):
            errors[mode] = float((logits(model) - exact).square().mean())
    assert 0 < errors["int8"] < errors["mxfp4"]
    assert 0 < errors["mxfp8"] < errors["mxfp4"]


def test_w8a8_is_what_numpy_computes(build: Any) -> None:
    model = build("llama").eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    layer = model.model.layers[0].mlp.gate_proj
    with modes.apply(model, "int8"), torch.no_grad():
        found = layer(x)

    def rounded(values: np.ndarray) -> np.ndarray:
        scale = (np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
        return np.clip(np.rint(values / scale), -127, 127).astype(np.float64) * scale

    wanted = rounded(x.numpy()) @ rounded(layer.weight.detach().numpy()).T
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_mxfp8_is_what_numpy_computes_with_ml_dtypes(build: Any) -> None:
    model = build("llama").eval()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    layer = model.model.layers[0].mlp.down_proj  # 48 inputs: a whole block and half of one.
    with modes.apply(model, "mxfp8"), torch.no_grad():
        found = layer(x)

    def rounded(values: np.ndarray) -> np.ndarray:
        blocks = [values[..., :32], values[..., 32:]]
        out = []
        for block in blocks:
            amax = np.abs(block.astype(np.float64)).max(axis=-1, keepdims=True)
            scale = np.exp2(np.floor(np.log2(amax)) - 8)
            codes = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            out.append(codes.astype(np.float64) * scale)
        return np.concatenate(out, axis=-1)

    wanted = rounded(x.numpy()) @ rounded(layer.weight.detach().numpy()).T
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_the_input_may_be_given_by_the_name_it_has(build: Any) -> None:
    model = build("gpt2")
    x = torch.randn(1, 3, 32)
    with modes.apply(model, "mxfp8"):
        module = model.transformer.h[0].attn.c_attn
        assert torch.equal(module(x=x), module(x))


def test_conv1d_of_gpt2_is_quantised_along_its_inputs(build: Any) -> None:
    model = build("gpt2").eval()
    layer, codec = model.transformer.h[0].mlp.c_fc, formats.get("mxfp4")
    x = torch.randn(3, 32)
    wanted = codec.fake_quantize(x) @ codec.fake_quantize(layer.weight, axis=0) + layer.bias
    with modes.apply(model, "mxfp4"), torch.no_grad():
        assert torch.allclose(layer(x), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_gradients_quantise_each_product_along_the_axis_it_sums_over(
    shape: str, build: Any
) -> None:
    model, codec = build(shape), formats.get("mxfp4")
    layer = next(linears(model))
    transposed = type(layer).__name__ == "Conv1D"
    x = torch.randn(2, 40, 32, requires_grad=True)
    with modes.apply(model, "mxfp4"):
        out = layer(x)
        given = torch.randn_like(out)
        out.backward(given)
    weight = layer.weight.detach().t() if transposed else layer.weight.detach()
    rows, dy = x.detach().reshape(-1, 32), given.reshape(80, -1)
    grad_x = codec.fake_quantize(dy, 1) @ codec.fake_quantize(weight, 0)
    grad_w = codec.fake_quantize(dy, 0).t() @ codec.fake_quantize(rows, 0)
    assert torch.allclose(x.grad.reshape(-1, 32), grad_x, rtol=1e-5, atol=1e-5)
    got = layer.weight.grad.t() if transposed else layer.weight.grad
    assert torch.allclose(got, grad_w, rtol=1e-5, atol=1e-5)
    if layer.bias is not None:
        assert torch.allclose(layer.bias.grad, dy.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_it_trains_under_autocast(shape: str, build: Any, inputs: Any) -> None:
    model = build(shape)
    with modes.apply(model, "mxfp8"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs()).loss
        loss.backward()
    for layer in linears(model):
        assert layer.weight.grad.dtype is torch.float32
        assert layer.weight.grad.isfinite().all()


def test_a_compiled_model_computes_the_same(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("llama").eval()
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled)
    with modes.apply(model, "mxfp4"):
        assert torch.equal(logits(compiled), logits(model))
    assert torch.equal(logits(compiled), plain)


def test_a_frozen_weight_gets_no_gradient(build: Any) -> None:
    model = build("llama")
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)
    with modes.apply(model, "mxfp8"):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("shape", SHAPES)
def test_operands_are_recorded_as_they_are_used(shape: str, build: Any, inputs: Any) -> None:
    model, sink, codec = build(shape).eval(), tensortap.MemorySink(), formats.get("mxfp4")
    with modes.apply(model, "mxfp4", family="generic") as applied:
        with tensortap.attach(model, sink, values="full", on_error="raise"), torch.no_grad():
            model(**inputs())
    for name in applied.changes.changed:
        [(record, used)] = sink.find(f"{name}/forward/input_quantized")
        [(_, given)] = sink.find(f"{name}/forward/input")
        [(weight_record, weight)] = sink.find(f"{name}/forward/weight")
        [(_, parameter)] = sink.find(f"{name}/param/weight")
        assert torch.equal(used, codec.fake_quantize(given, -1))
        axis = 0 if weight_record.dims == "in out" else 1
        assert torch.equal(weight, codec.fake_quantize(parameter, axis))
        assert record.format == weight_record.format == codec.info
        assert record.dims == sink.find(f"{name}/forward/input")[0][0].dims
    assert not any(record.format for record in sink.records if record.name.tensor == "output")
    assert sink.coverage is not None
    assert sink.coverage["complete"]


def test_operands_of_the_backward_are_recorded(build: Any, capture: Any) -> None:
    model, codec = build("llama"), formats.get("mxfp4")
    with modes.apply(model, "mxfp4"):
        seen = capture(model, select="layers.0.mlp.up*")
    gradient = seen("layers.0.mlp.up/backward/grad_output")
    assert torch.equal(
        seen("layers.0.mlp.up/backward/grad_output_quantized"), codec.fake_quantize(gradient, -1)
    )
    weight = seen("layers.0.mlp.up/param/weight")
    assert torch.equal(seen("layers.0.mlp.up/backward/weight"), codec.fake_quantize(weight, 0))


def test_tapping_changes_nothing_of_what_a_mode_computes(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("llama")
    with modes.apply(model, "nvfp4"):
        alone = logits(model)
        with tensortap.attach(model, tensortap.MemorySink(), values="full", on_error="raise"):
            assert torch.equal(logits(model), alone)


def test_a_tap_from_before_the_mode_stays_and_sees_its_effect(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model, sink = build("llama"), tensortap.MemorySink()
    with tensortap.attach(model, sink, select="layers.0.mlp.up/forward/output", values="full"):
        logits(model)
        with modes.apply(model, "mxfp4"):
            logits(model)
    plain, quantised = (payload for _, payload in sink.find("layers.0.mlp.up/forward/output"))
    assert not torch.equal(plain, quantised)


@pytest.mark.parametrize(
    ("shape", "name", "why"),
    [
        ("llama", "embed", "an embedding"),
        ("llama", "lm_head", "the output layer"),
        ("bert", "lm_head.transform.dense", "the output layer"),
        ("mamba", "layers.0.mixer.dt_proj", "its weight is handed to a function"),
        ("mamba", "layers.0.mixer", "uses A_log itself"),
        ("mixtral", "layers.0.mlp.router", "decides which experts run"),
        ("mixtral", "layers.0.mlp.experts", r"stacked \(down_proj, gate_up_proj\)"),
    ],
)
def test_what_is_not_changed_is_said_with_the_reason(
    shape: str, name: str, why: str, build: Any
) -> None:
    import re

    with modes.apply(build(shape), "mxfp4", family="generic") as applied:
        assert re.search(why, applied.changes.kept[name])
        assert name not in applied.changes.changed


def test_every_weight_that_is_multiplied_is_either_changed_or_kept(
    any_family: str, build: Any
) -> None:
    model = build(any_family)
    with modes.apply(model, "mxfp8", family="generic") as applied:
        told = {*applied.changes.changed, *applied.changes.kept}
    from tensortap_hf import naming

    for found in naming.named(model, model.config):
        own = [p for p in found.module.parameters(recurse=False) if p.dim() >= 2]
        assert not own or found.name in told, found.name


def test_a_layer_whose_forward_was_replaced_is_refused(build: Any) -> None:
    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = layer.forward
    with pytest.raises(NotSupported, match=r"layers\.0\.mlp\.up cannot be quantised.*device_map"):
        modes.apply(model, "mxfp4")
    assert modes.state_of(model) is None
