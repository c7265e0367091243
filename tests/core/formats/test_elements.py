"""Every element type, code by code and at every rounding edge, against ml_dtypes and gfloat."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from tests.core.formats.values import Array, around, assert_same, edges, magnitudes

from tensortap.formats.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    Element,
    decode,
    encode,
    round_even,
)

ELEMENTS = [
    (E4M3, ml_dtypes.float8_e4m3fn, gfloat.formats.format_info_ocp_e4m3),
    (E5M2, ml_dtypes.float8_e5m2, gfloat.formats.format_info_ocp_e5m2),
    (E3M2, ml_dtypes.float6_e3m2fn, gfloat.formats.format_info_ocp_e3m2),
    (E2M3, ml_dtypes.float6_e2m3fn, gfloat.formats.format_info_ocp_e2m3),
    (E2M1, ml_dtypes.float4_e2m1fn, gfloat.formats.format_info_ocp_e2m1),
]
each = pytest.mark.parametrize(
    ("element", "dtype", "info"), ELEMENTS, ids=[element.name for element, _, _ in ELEMENTS]
)


def codes_of(element: Element, dtype: type) -> tuple[Array, Array]:
    """All codes and their values, as ml_dtypes reads them."""
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    return codes, codes.view(dtype).astype(np.float32)


@each
def test_every_code_has_the_value_of_the_oracles(
    element: Element, dtype: type, info: gfloat.FormatInfo
) -> None:
    codes, values = codes_of(element, dtype)
    assert_same(decode(torch.from_numpy(codes), element), values)
    assert_same(values, gfloat.decode_ndarray(info, codes))


@each
def test_every_finite_value_has_its_code(
    element: Element, dtype: type, info: gfloat.FormatInfo
) -> None:
    codes, values = codes_of(element, dtype)
    finite = np.isfinite(values)
    assert encode(torch.from_numpy(values[finite]), element).tolist() == codes[finite].tolist()


@each
def test_the_edges_of_the_element_are_those_of_its_codes(
    element: Element, dtype: type, info: gfloat.FormatInfo
) -> None:
    values = codes_of(element, dtype)[1]
    positive = sorted(float(value) for value in values if np.isfinite(value) and value > 0)
    assert element.max == positive[-1]
    assert element.smallest_subnormal == positive[0]
    assert element.smallest_normal == positive[(1 << element.mantissa_bits) - 1]
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)


@each
@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_rounding_equals_both_oracles_at_every_edge_and_over_all_magnitudes(
    element: Element, dtype: type, info: gfloat.FormatInfo, width: type
) -> None:
    points = edges(codes_of(element, dtype)[1].tolist())
    x = np.concatenate([around(points, width), magnitudes(20_000).astype(width)])
    found = round_even(torch.from_numpy(x), element)
    assert_same(found, gfloat.round_ndarray(info, x.astype(np.float64), sat=True))
    if width is np.float32:
        # Its saturation is that of the dtype; clamping to a value of the grid comes to the same.
        with np.errstate(invalid="ignore"):
            saturated = np.clip(x, -element.max, element.max).astype(dtype).astype(np.float32)
        known = ~np.isnan(x)
        assert_same(found.numpy()[known], saturated[known])
