"""HiFloat8: all codes from the definition, all midpoints, and en-dtypes as the oracle."""

from __future__ import annotations

import bisect
import itertools
import math
import struct

import numpy as np
import pytest
import torch
from tests.core.formats.values import Array, around, assert_same, edges, magnitudes

from tensortap import formats
from tensortap.formats import hifloat8_codes

DOTS = {"11": (4, 1), "10": (3, 2), "01": (2, 3), "001": (1, 3), "0001": (0, 3)}
"""Prefix -> exponent bits, mantissa bits."""


def value_of(code: int) -> float:
    """The value of a code, read digit by digit as the paper's table has it."""
    sign, rest = -1.0 if code >> 7 else 1.0, f"{code & 127:07b}"
    if code in (0x6F, 0xEF):
        return sign * math.inf
    if code == 0x80:
        return math.nan
    for dot, (wide, _) in DOTS.items():
        if rest.startswith(dot):
            field, mantissa = rest[len(dot) : len(dot) + wide], rest[len(dot) + wide :]
            exponent = 0
            if field:
                exponent = int("1" + field[1:], 2) * (-1 if field[0] == "1" else 1)
            return sign * 2.0**exponent * (1 + int(mantissa, 2) / 2 ** len(mantissa))
    return sign * 2.0 ** (int(rest, 2) - 23) if int(rest, 2) else 0.0


VALUES = [value_of(code) for code in range(256)]
FINITE = sorted(value for value in VALUES if 0 <= value < math.inf)


def nearest(x: float, *, saturate: bool) -> float:
    """Nearest finite value, ties away from zero; by search, not by bits."""
    if math.isnan(x):
        return 0.0 if saturate else x
    size = abs(x)
    if size >= 40960:
        return math.copysign(32768.0 if saturate else math.inf, x)
    at = bisect.bisect_left(FINITE, size)
    if at == len(FINITE):
        return math.copysign(FINITE[-1], x)
    if FINITE[at] != size and size - FINITE[at - 1] < FINITE[at] - size:
        at -= 1
    return math.copysign(FINITE[at], x) if FINITE[at] else 0.0


def hybrid(x: float) -> float:
    """The rule of the format's makers, on the bits of one float32."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    exponent, fraction = (bits >> 23 & 255) - 127, bits & 0x7FFFFF
    if abs(exponent) < 4 or math.isnan(x) or math.isinf(x) or exponent > 15 or exponent < -23:
        return nearest(x, saturate=False)
    kept = 2 if abs(exponent) < 8 else 1 if abs(exponent) < 16 else 0
    if exponent == -23:
        up = (fraction >> 10) + 8192 >= (fraction & 16383)
        return math.copysign(2.0**-22, x) if up else 0.0
    following = fraction >> (23 - kept - 14) & 16383
    unit = (fraction >> (23 - kept)) + (following >= (fraction & 16383))
    size = 2.0**exponent * (1 + unit / 2**kept)
    return math.copysign(math.inf if size > 32768 else size, x)


def inputs(dtype: type) -> Array:
    points = [*edges(FINITE), 2.0**-23, 40960.0, 49152.0, 65536.0, 1.5 * 2.0**-23, 2.0**-24]
    return np.concatenate([around(points, dtype), magnitudes(5000, -30, 20).astype(dtype)])


def test_every_code_has_the_value_of_the_definition_and_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same(hifloat8_codes.decode(codes), np.array(VALUES))
    assert torch.equal(hifloat8_codes.encode(torch.tensor(VALUES)), codes)
    assert len(set(VALUES) - {math.inf, -math.inf}) - 1 == 253


def test_the_definition_is_the_one_of_en_dtypes() -> None:
    en_dtypes = pytest.importorskip("en_dtypes", reason="no wheel for this Python")
    codes = np.arange(256, dtype=np.uint8)
    assert_same(codes.view(en_dtypes.hifloat8).astype(np.float32), np.array(VALUES))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_rounding_goes_to_the_nearest_value_and_away_from_zero_on_ties(
    dtype: type, overflow: str
) -> None:
    x = inputs(dtype)
    codec = formats.get("hifp8", overflow=overflow)
    wanted = np.array([nearest(float(value), saturate=overflow == "saturate") for value in x])
    assert_same(codec.fake_quantize(torch.from_numpy(x)), wanted)
    assert_same(codec.dequantize(codec.quantize(torch.from_numpy(x))), wanted)


def test_codes_equal_en_dtypes() -> None:
    en_dtypes = pytest.importorskip("en_dtypes", reason="no wheel for this Python")
    x = np.concatenate([inputs(np.float32), magnitudes(300_000), magnitudes(100_000, -26, 17)])
    found = formats.get("hifp8").quantize(torch.from_numpy(x)).codes
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = x.astype(en_dtypes.hifloat8).view(np.uint8)
    assert np.array_equal(found.numpy(), wanted)


def test_every_bfloat16_and_every_float16_is_rounded_right() -> None:
    codec = formats.get("hifp8")
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        wanted = np.array([nearest(value, saturate=False) for value in x.double().tolist()])
        assert_same(codec.fake_quantize(x), wanted)


def test_a_negative_zero_has_no_code() -> None:
    codec = formats.get("hifp8")
    x = torch.tensor([-0.0, -1e-30, -(2.0**-24)])
    assert codec.quantize(x).codes.tolist() == [0, 0, 0]
    assert_same(codec.fake_quantize(x), np.zeros(3))


def test_hybrid_rounding_follows_its_rule_bit_by_bit() -> None:
    codec = formats.get("hifp8", rounding="hybrid")
    x = inputs(np.float32)
    wanted = np.array([hybrid(float(value)) for value in x])
    assert_same(codec.fake_quantize(torch.from_numpy(x)), wanted)
    assert_same(codec.dequantize(codec.quantize(torch.from_numpy(x))), wanted)


def test_hybrid_rounding_is_right_on_average() -> None:
    """What makes it a stand-in for stochastic rounding: random low bits decide by the remainder."""
    low = torch.randint(0, 1 << 14, (200_000,), dtype=torch.int32)
    x = (torch.tensor(22.3).view(torch.int32) & ~0x3FFF | low).view(torch.float32)
    found = formats.get("hifp8", rounding="hybrid").fake_quantize(x)
    assert set(found.tolist()) == {20.0, 24.0}
    assert float(found.mean()) == pytest.approx(float(x.mean()), abs=0.02)


def test_hybrid_rounding_goes_up_wherever_the_low_bits_are_zero() -> None:
    """A consequence of its rule that is easily taken for a mistake: it is meant for float32."""
    codec = formats.get("hifp8", rounding="hybrid")
    x = torch.tensor([1.0, 7.5, 16.0, 17.0, -16.0, 512.0, 2.0**-16])
    assert codec.fake_quantize(x).tolist() == [1.0, 7.5, 20.0, 20.0, -20.0, 768.0, 2.0**-15]


def test_options_are_said_in_the_record() -> None:
    for rounding, overflow in itertools.product(("ta", "hybrid"), ("inf", "saturate")):
        info = formats.get("hifp8", rounding=rounding, overflow=overflow).info
        assert (info.name, info.block, info.rounding) == ("hifp8", None, rounding)
