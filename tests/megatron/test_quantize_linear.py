"""Quantised linear layers: three products, each with operands quantised along its own sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from tests.megatron import quantize_layers as built
from tests.megatron.quantize_layers import BATCH, IN, LAYERS, OUT, SEQ, whole
from tests.megatron.quantize_oracle import Array, on_grid, product

from tensortap_megatron.quantization import quantize

FORMATS = ("mxfp4", "mxfp8", "hifp8", "int8")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def expected(name: str, format: str) -> dict[str, Array | None]:
    """The three products of a layer in numpy, from the same weights and inputs."""
    x = whole(f"{name}.x", SEQ, BATCH, IN).numpy().reshape(-1, IN)
    dy = whole(f"{name}.dy", SEQ, BATCH, OUT).numpy().reshape(-1, OUT)
    w = whole(f"{name}.weight", OUT, IN).numpy()
    bias = 0 if name == "frozen" else whole(f"{name}.bias", OUT).numpy()
    frozen = name == "frozen"
    return {
        "y": (product(x, w.T, format) + bias).reshape(SEQ, BATCH, OUT),
        "dx": product(dy, w, format).reshape(SEQ, BATCH, IN),
        "dweight": None if frozen else product(dy.T, x, format),
        **({} if frozen else {"dbias": dy.sum(0)}),
    }


def close(found: torch.Tensor | None, wanted: Array | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-12 * abs(wanted).max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_each_product_equals_numpy_with_operands_quantised_along_its_own_sum(
    name: str, format: str
) -> None:
    found = built.run_layers(format)[name]
    wanted = expected(name, format)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        close(found[key], value)


def test_scales_of_channels_follow_the_sum_of_each_product() -> None:
    found = built.run_layers("int8", scale="channel")["column"]
    for key, value in expected("column", "int8 channel").items():
        close(found[key], value)


def test_the_oracle_tells_the_three_axes_apart() -> None:
    x, w = whole("column.x", SEQ * BATCH, IN).numpy(), whole("column.weight", OUT, IN).numpy()
    right = product(x, w.T, "mxfp4")
    wrong = on_grid(x, "mxfp4", 0) @ on_grid(w, "mxfp4", 0).T
    assert np.abs(right - wrong).max() > 0.01 * np.abs(right).max()


def test_a_bfloat16_layer_in_bf16_is_bit_for_bit_the_layer_itself() -> None:
    def run(format: str | None) -> dict[str, Any]:
        layer = built.layers(tensor=1, sequence_parallel=False)["column"].to(torch.bfloat16)
        x = whole("x", SEQ, BATCH, IN).bfloat16().requires_grad_()
        with quantize(torch.nn.ModuleDict({"layer": layer}), format) if format else nullcontext():
            y, _ = layer(x)
            y.backward(whole("dy", SEQ, BATCH, OUT).bfloat16())
        return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}

    plain, quantised = run(None), run("bf16")
    for key, value in plain.items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, quantised[key]), key


def test_an_expert_without_tokens_gets_zero_gradients() -> None:
    for format in ("mxfp4", "int8", "hifp8"):
        layer = built.layers(tensor=1, sequence_parallel=False)["column"]
        x = torch.zeros(0, IN, dtype=torch.float64, requires_grad=True)
        with quantize(torch.nn.ModuleDict({"layer": layer}), format):
            y, _ = layer(x)
            y.sum().backward()
        assert y.shape == (0, OUT)
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


def test_the_gradient_of_a_gradient_is_an_error_not_a_wrong_number() -> None:
    layer = built.layers(tensor=1, sequence_parallel=False)["column"]
    x = whole("x", SEQ, BATCH, IN).requires_grad_()
    with quantize(torch.nn.ModuleDict({"layer": layer}), "mxfp8"):
        [dx] = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()
