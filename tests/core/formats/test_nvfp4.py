"""NVFP4 against torchao, and against its rule in numpy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.core.formats.values import Array, assert_same
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from tensortap import formats

CODEC = formats.get("nvfp4")


def spread(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    """Blocks of very different size, some beyond what the block scales reach."""
    draw = np.random.default_rng(seed)
    sizes = 2.0 ** draw.integers(-20, 3, (rows, columns // 16, 1))
    values = draw.normal(size=(rows, columns // 16, 16)) * sizes
    return torch.from_numpy(values.reshape(rows, columns).astype(np.float32))


def by_definition(x: Array) -> Array:
    """The rule, in numpy float32, with the casts of ml_dtypes; `x` of whole blocks."""
    blocks = x.astype(np.float32).reshape(-1, 16)
    g = np.abs(blocks).max() / np.float32(448 * 6)
    wanted = np.abs(blocks).max(1, keepdims=True) / np.float32(6) / g
    scale = wanted.clip(2.0**-6, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    inside = (blocks * (np.float32(1) / g / scale)).clip(-6, 6)
    on_grid = inside.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    found: Array = (on_grid * (g * scale)).reshape(x.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [-60, 0, 60])
def test_codes_scales_and_values_equal_torchao(dtype: torch.dtype, power: int) -> None:
    x = (spread(64, 256) * 2.0**power).to(dtype)
    whole = per_tensor_amax_to_scale(x.abs().amax())
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=whole)
    found = CODEC.quantize(x)
    assert found.scales is not None
    assert found.tensor_scale is not None
    assert torch.equal(found.tensor_scale, whole)
    assert torch.equal(found.scales.view(torch.uint8), theirs.scale.view(torch.uint8))
    assert torch.equal(formats.pack(found.codes), theirs.qdata)
    assert_same(CODEC.fake_quantize(x), theirs.dequantize(dtype))


def test_values_are_those_of_the_rule() -> None:
    x = spread(64, 256, seed=5)
    wanted = by_definition(x.numpy())
    assert_same(CODEC.fake_quantize(x), wanted)
    assert_same(CODEC.fake_quantize(x.t().contiguous(), axis=0), wanted.T)


def test_float64_is_quantised_as_its_float32() -> None:
    x = spread(4, 32).double() * (1 + 2.0**-30)
    assert_same(CODEC.fake_quantize(x), CODEC.fake_quantize(x.float()).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_code_makes_everything_nan(bad: float) -> None:
    x = torch.ones(2, 48)
    x[1, 20] = bad
    found = CODEC.quantize(x)
    assert found.tensor_scale is not None
    assert found.tensor_scale.isnan()
    assert CODEC.dequantize(found).isnan().all()
    assert CODEC.fake_quantize(x).isnan().all()


def test_zeros_and_the_smallest_numbers_come_out_as_zeros() -> None:
    for size in (0.0, 2.0**-149):
        assert_same(CODEC.fake_quantize(torch.full((40,), size)), np.zeros(40))


def test_a_short_last_block_is_a_block_of_what_there_is() -> None:
    x = spread(3, 64)
    padded = x.clone()
    padded[:, 50:] = 0.0
    assert_same(CODEC.fake_quantize(x[:, :50]), CODEC.fake_quantize(padded)[:, :50])
