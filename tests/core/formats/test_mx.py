"""MX blocks against gfloat and torchao, and what the standard says of the ends of the range."""

from __future__ import annotations

import math

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from tests.core.formats.values import assert_same, edges, magnitudes
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx

from tensortap import formats
from tensortap.formats.mx import MX

NAMES = {
    "mxfp8": (gfloat.formats.format_info_mxfp8_e4m3, torch.float8_e4m3fn),
    "mxfp8_e5m2": (gfloat.formats.format_info_mxfp8_e5m2, torch.float8_e5m2),
    "mxfp6_e3m2": (gfloat.formats.format_info_mxfp6_e3m2, DTYPE_FP6_E3M2),
    "mxfp6_e2m3": (gfloat.formats.format_info_mxfp6_e2m3, DTYPE_FP6_E2M3),
    "mxfp4": (gfloat.formats.format_info_mxfp4_e2m1, torch.float4_e2m1fn_x2),
}
each = pytest.mark.parametrize("name", NAMES)


def codec(name: str) -> MX:
    found = formats.get(name)
    assert isinstance(found, MX)
    return found


def blocks_of_every_magnitude(rows: int) -> torch.Tensor:
    """rows x 96 float32: each block around one exponent, nearly all of them among the blocks.

    torchao has no scale of 2^-127: the lowest exponents are left out, and tested by themselves.
    """
    draw = np.random.default_rng(7)
    exponents = draw.integers(-100, 120, (rows, 3, 1))
    spread = draw.normal(size=(rows, 3, 32)) * 2.0 ** draw.integers(-6, 3, (rows, 3, 32))
    return torch.from_numpy(np.ldexp(spread, exponents).astype(np.float32).reshape(rows, 96))


@each
def test_blocks_equal_gfloat(name: str) -> None:
    info = NAMES[name][0]
    x = torch.cat([
        blocks_of_every_magnitude(20),
        torch.from_numpy(magnitudes(1920)[:1920].reshape(20, 96)),
    ])  # fmt: skip
    wanted = [
        gfloat.quantize_block(info, block.double().numpy(), gfloat.compute_scale_amax)
        for block in x.reshape(-1, 32)
    ]
    assert_same(codec(name).fake_quantize(x), np.stack(wanted).reshape(x.shape))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_equal_torchao(name: str, dtype: torch.dtype) -> None:
    x, element = blocks_of_every_magnitude(300).to(dtype), NAMES[name][1]
    scales, codes = to_mx(x, element, 32, ScaleCalculationMode.FLOOR)
    found = codec(name).quantize(x)
    assert found.scales is not None
    assert torch.equal(found.scales, scales.view(torch.uint8))
    mine = formats.pack(found.codes) if name == "mxfp4" else found.codes
    assert torch.equal(mine.view(torch.uint8), codes.view(torch.uint8))
    assert_same(codec(name).fake_quantize(x), to_dtype(codes, scales, element, 32, dtype))


@each
def test_every_rounding_edge_inside_a_block(name: str) -> None:
    """The edges of the elements, scaled by powers of two, with the largest value as the first."""
    element = codec(name).element
    grid = [element.smallest_subnormal * k for k in range(1 << (element.mantissa_bits + 1))]
    while grid[-1] < element.max:
        grid.append(grid[-1] + 2.0 ** (math.floor(math.log2(grid[-1])) - element.mantissa_bits))
    points = np.array(edges(grid), np.float32)
    near = np.concatenate([points, np.nextafter(points, np.float32(0)), -points])
    near = near[np.abs(near) <= element.max]
    padded = np.zeros((-(-near.size // 31), 32), np.float32)
    padded[:, 1:].flat[: near.size] = near
    padded[:, 0] = element.max
    nearest_even = gfloat.round_ndarray(NAMES[name][0].etype, near.astype(np.float64), sat=True)
    for power in (-100, 0, 100):
        found = codec(name).fake_quantize(torch.from_numpy(np.ldexp(padded, power)))
        found = found.reshape(-1, 32)[:, 1:].flatten()[: near.size]
        assert_same(found, np.ldexp(nearest_even, power))


@each
def test_a_block_of_zeros_has_the_smallest_scale_and_keeps_its_signs(name: str) -> None:
    x = torch.zeros(32)
    x[3] = -0.0
    found = codec(name).quantize(x)
    assert found.scales is not None
    assert found.scales.tolist() == [0]
    assert_same(codec(name).dequantize(found), x)


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_value_without_a_code_makes_its_block_nan_and_no_other(
    name: str, bad: float, dtype: torch.dtype
) -> None:
    x = torch.ones(96, dtype=dtype)
    x[40] = bad
    found = codec(name).quantize(x)
    assert found.scales is not None
    assert found.scales[1] == 255
    for values in (codec(name).dequantize(found), codec(name).fake_quantize(x)):
        assert values[32:64].isnan().all()
        assert torch.equal(values[:32], x[:32].to(values.dtype))
        assert torch.equal(values[64:], x[64:].to(values.dtype))


@each
def test_scales_stop_at_the_ends_of_e8m0(name: str) -> None:
    element = codec(name).element
    tiny = torch.full((32,), 2.0**-149)
    huge = torch.full((32,), 1e300, dtype=torch.float64)
    low, high = codec(name).quantize(tiny), codec(name).quantize(huge)
    assert low.scales is not None
    assert high.scales is not None
    assert (low.scales.tolist(), high.scales.tolist()) == ([0], [254])
    assert codec(name).dequantize(high).tolist() == [element.max * 2.0**127] * 32
    # The smallest element times the smallest scale is what the format can hold at all.
    least = element.smallest_subnormal * 2.0**-127
    wanted = round(2.0**-149 / least) * least
    assert codec(name).dequantize(low).tolist() == [wanted] * 32


@each
@pytest.mark.parametrize("length", [1, 31, 33, 50, 95])
def test_a_short_last_block_is_a_block_of_what_there_is(name: str, length: int) -> None:
    x = blocks_of_every_magnitude(4)[:, :length].contiguous()
    found = codec(name).quantize(x)
    assert found.scales is not None
    assert found.codes.shape == x.shape
    assert found.scales.shape == (4, -(-length // 32))
    parts = [codec(name).fake_quantize(part) for part in x.split(32, dim=1)]
    assert_same(codec(name).fake_quantize(x), torch.cat(parts, 1))


@each
def test_float64_is_rounded_once(name: str) -> None:
    """Just above a midpoint in float64, on it after a detour by float32: up, not to even."""
    element = codec(name).element
    step = 2.0 ** (element.emax - element.mantissa_bits)
    x = torch.zeros(32, dtype=torch.float64)
    x[0] = element.max
    x[1] = 2.0**element.emax * (1 + 2.0**-40) + step / 2
    wanted = 2.0**element.emax + step
    assert codec(name).fake_quantize(x)[1] == wanted
    assert codec(name).dequantize(codec(name).quantize(x))[1] == wanted
    assert codec(name).fake_quantize(x.float())[1] == 2.0**element.emax
