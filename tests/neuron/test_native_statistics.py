"""Statistics in float32 and float64 operations against numpy, and against the core's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensortap import stats
from tensortap.errors import NotSupported
from tensortap_neuron import reduction

WIDE = pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)


def reduced(tensor: torch.Tensor, wide: torch.dtype, *, exponents: bool = True):
    layout = reduction.layout(tensor, exponents=exponents, wide=wide)
    if tensor.numel() == 0:
        return reduction.statistics([], layout)
    powers = reduction.powers_of_two(wide, tensor.device) if exponents else None
    return reduction.statistics(reduction.vector(tensor, layout, powers).tolist(), layout)


@WIDE
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e6])
@pytest.mark.parametrize("count", [1, 9, 8192, 8193, 200_000])
def test_moments_are_those_of_numpy_in_float64(wide, offset, count):
    tensor = offset + torch.randn(count)
    exact = tensor.double().numpy()
    found = reduced(tensor, wide)
    rel = 1e-12 if wide is torch.float64 else 2e-6
    noise = rel * np.abs(exact).max()
    assert found.count == count
    assert (found.min, found.max) == (exact.min(), exact.max())
    assert found.mean == pytest.approx(exact.mean(), rel=rel, abs=noise)
    assert found.std == pytest.approx(exact.std(), rel=10 * rel, abs=1e-30)
    assert found.l1 == pytest.approx(np.abs(exact).sum(), rel=rel)
    assert found.l2 == pytest.approx(np.sqrt((exact**2).sum()), rel=rel)
    assert found.first == tuple(exact[:10])


@WIDE
def test_an_outlier_at_the_head_of_a_row_hides_no_variance(wide):
    tensor = torch.cat([torch.tensor([1e6]), 1 + 1e-3 * torch.randn(8000)])
    assert reduced(tensor, wide).std == pytest.approx(tensor.double().numpy().std(), rel=1e-6)


@WIDE
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e18, 1e30, 3e38])
def test_squares_neither_overflow_nor_vanish(wide, size):
    tensor = size * torch.tensor([1.0, -0.5, 0.25, 0.0])
    exact = tensor.double().numpy()
    found = reduced(tensor, wide)
    assert found.l2 == pytest.approx(math.sqrt((exact**2).sum()), rel=1e-6)
    assert found.std == pytest.approx(exact.std(), rel=1e-6)


@WIDE
@given(
    st.lists(
        st.one_of(st.floats(width=32, allow_subnormal=False), st.sampled_from([0.0, -0.0])),
        max_size=40,
    )
)
def test_counts_ends_and_exponents_are_exact(wide, values):
    tensor = torch.tensor(values, dtype=torch.float32)
    found, expected = reduced(tensor, wide), stats.statistics(tensor, exponents=True)
    for key in ("count", "nan", "posinf", "neginf", "zero", "min", "max", "absmax", "exponents"):
        assert getattr(found, key) == getattr(expected, key), key
    assert (found.mean is None) == (expected.mean is None)


@WIDE
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
     torch.int64, torch.bool, torch.complex64],
    ids=str,
)  # fmt: skip
def test_every_dtype_has_the_statistics_of_the_core(wide, dtype):
    plain = 50 * torch.randn(7, 300)
    tensor = torch.complex(plain, -plain) if dtype.is_complex else plain.to(dtype)
    found, expected = reduced(tensor, wide), stats.statistics(tensor, exponents=True)
    assert (found.count, found.zero, found.exponents) == (
        expected.count, expected.zero, expected.exponents,
    )  # fmt: skip
    for key in ("min", "max", "std", "rms", "l1", "l2"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=2e-6), key


def test_more_values_than_float32_can_count_are_counted():
    tensor = torch.ones(1, 1).expand(4097, 4096)
    found = reduced(tensor, torch.float32)
    assert found.exponents == {0: 4097 * 4096}
    assert found.l1 == found.count == 4097 * 4096 > 2**24


def test_what_the_device_has_no_type_for_is_refused():
    for dtype in (torch.complex128, getattr(torch, "float4_e2m1fn_x2", torch.complex128)):
        with pytest.raises(NotSupported, match=str(dtype).removeprefix("torch.")):
            reduction.layout(torch.empty(2, dtype=dtype), exponents=False, wide=torch.float32)
