"""fp16 and bf16 against numpy, ml_dtypes and, from float64, gfloat."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from tests.core.formats.values import around, assert_same, magnitudes

from tensortap import formats

KINDS = {
    "fp16": (np.float16, gfloat.formats.format_info_binary16, 10),
    "bf16": (ml_dtypes.bfloat16, gfloat.formats.format_info_bfloat16, 7),
}
each = pytest.mark.parametrize("name", KINDS)


@each
def test_float32_is_rounded_as_by_the_oracle(name: str) -> None:
    x = magnitudes(50_000)
    with np.errstate(over="ignore"):
        wanted = x.astype(KINDS[name][0]).astype(np.float32)
    codec = formats.get(name)
    assert_same(codec.fake_quantize(torch.from_numpy(x)), wanted)
    assert_same(codec.dequantize(codec.quantize(torch.from_numpy(x))), wanted)


@each
def test_float64_is_rounded_once(name: str) -> None:
    """One last place of float64 beside a midpoint decides; by way of float32 it would be lost."""
    _, info, mantissa = KINDS[name]
    draw = np.random.default_rng(2)
    units = draw.integers(1 << mantissa, 2 << mantissa, 300) + 0.5
    points = np.ldexp(units, draw.integers(-20, 5, 300))
    top = [float(info.max), float(info.max) * (1 + 2.0 ** -(mantissa + 2))]
    least = float(info.smallest)
    ends = [*top, least, least / 2, least * 1.5, 1e308]
    x = np.concatenate([around([*points, *ends], np.float64), magnitudes(2000).astype(float)])
    found = formats.get(name).fake_quantize(torch.from_numpy(x))
    assert found.dtype is torch.float64
    assert_same(found, gfloat.round_ndarray(info, x))


@each
def test_the_code_is_the_value_itself(name: str) -> None:
    found = formats.get(name).quantize(torch.randn(5, 3))
    assert found.scales is None
    assert found.codes.dtype is {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
