"""int8 and int4 against their rule in numpy and against torchao's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.core.formats.values import Array, assert_same
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from tensortap import formats


def by_definition(x: Array, axes: tuple[int, ...] | None, levels: int) -> Array:
    """Symmetric quantisation in numpy; the scale covers `axes`."""
    scale = np.abs(x).max(axis=axes, keepdims=True) / x.dtype.type(levels)
    found: Array = np.rint(x / scale).clip(-levels, levels) * scale
    return found + 0.0


def batch() -> torch.Tensor:
    return torch.randn(4, 6, 256) * torch.rand(4, 6, 1).exp2()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_takes_one_scale_for_the_tensor(dtype: torch.dtype) -> None:
    x = batch().to(dtype)
    codec = formats.get("int8")
    found = codec.quantize(x)
    assert found.scales is not None
    assert found.scales.shape == ()
    assert found.codes.dtype is torch.int8
    assert int(found.codes.abs().max()) == 127
    assert_same(codec.fake_quantize(x), by_definition(x.numpy(), None, 127))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_int8_per_channel_takes_a_scale_for_each_index_of_the_other_axes(axis: int) -> None:
    x = batch()
    codec = formats.get("int8", scale="channel")
    found = codec.quantize(x, axis=axis)
    assert found.scales is not None
    assert found.scales.numel() == x.numel() // x.shape[axis]
    assert_same(codec.fake_quantize(x, axis=axis), by_definition(x.numpy(), (axis,), 127))


@pytest.mark.parametrize("group", [32, 128])
def test_int4_takes_a_scale_for_each_group(group: int) -> None:
    x = batch()
    codec = formats.get("int4", group=group)
    groups = x.numpy().reshape(-1, group)
    wanted = by_definition(groups, (1,), 7).reshape(x.shape)
    assert_same(codec.fake_quantize(x), wanted)
    found = codec.quantize(x)
    assert found.scales is not None
    assert found.scales.shape == (4, 6, 256 // group)
    signed = (found.codes.to(torch.int16) ^ 8) - 8
    assert (int(signed.min()), int(signed.max())) == (-7, 7)


@pytest.mark.parametrize(("name", "levels", "group"), [("int8", 127, 256), ("int4", 7, 128)])
def test_codes_and_scales_equal_torchao(name: str, levels: int, group: int) -> None:
    x = torch.randn(64, 256)
    codec = formats.get(name) if name == "int4" else formats.get(name, scale="channel")
    found = codec.quantize(x)
    block = (1, group)
    scale, zero = choose_qparams_affine(
        x, MappingType.SYMMETRIC, block, torch.int8, -levels, levels, scale_dtype=torch.float32
    )
    theirs = quantize_affine(x, block, scale, zero, torch.int8, -levels, levels)
    assert found.scales is not None
    assert torch.equal(found.scales.reshape(scale.shape), scale)
    mine = found.codes if name == "int8" else ((found.codes.to(torch.int16) ^ 8) - 8)
    # torchao multiplies by the scale's inverse: it may decide otherwise next to a midpoint.
    close = ((x.reshape(-1, group) / scale.reshape(-1, 1)) % 1 - 0.5).abs().reshape(x.shape) < 1e-4
    assert torch.equal(mine.to(torch.int8)[~close], theirs[~close])
    assert close.float().mean() < 0.01


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_code_makes_what_shares_its_scale_nan(name: str, bad: float) -> None:
    codec = formats.get(name) if name == "int4" else formats.get(name, scale="channel")
    x = torch.ones(2, 128)
    x[1, 5] = bad
    for values in (codec.fake_quantize(x), codec.dequantize(codec.quantize(x))):
        assert values[1].isnan().all()
        assert values[0].tolist() == pytest.approx([1.0] * 128)


def test_zeros_and_the_smallest_numbers_come_out_finite() -> None:
    for name in ("int8", "int4"):
        for size in (0.0, 2.0**-149, 2.0**-120):
            found = formats.get(name).fake_quantize(torch.full((40,), size))
            assert found.isfinite().all()
            assert float((found - size).abs().max()) <= 2.0**-120 * 1e-6 + 2.0**-127
