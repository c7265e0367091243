"""Metrics of two tensors, by the compiled kernel and by numpy pieces, against whole numpy."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensortap import native
from tensortap.errors import NotSupported, RunError
from tensortap_analysis.metrics import (
    Metrics,
    Octaves,
    Side,
    bhattacharyya,
    change,
    measure,
    measure_tensors,
)

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FLOATS = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip
OTHERS = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "complex64", "complex128",
]  # fmt: skip
DTYPES = [getattr(torch, name) for name in FLOATS + OTHERS if hasattr(torch, name)]
SUMS = (
    "mse", "rmse", "mae", "relative_mse", "relative_mae", "relative_mean", "relative_l2", "cosine",
    "correlation", "sqnr_db", "ulp_mean",
)  # fmt: skip


@pytest.fixture(params=["kernel", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numpy":
        with mock.patch.object(native, "library", return_value=None):
            yield request.param
    elif native.library() is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    else:
        yield request.param


def values(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values in logical order as float64; complex elements as two."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if "float4" in str(tensor.dtype):
        packed = tensor.view(torch.uint8).contiguous().numpy().reshape(-1)
        return FP4[np.stack([packed & 15, packed >> 4], 1).reshape(-1)]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64).numpy().reshape(-1)


def oracle(ref: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """The straightforward way, over the whole tensors at once."""
    r, o = values(ref), values(other)
    odd = ~(np.isfinite(r) & np.isfinite(o))
    same = (r == o) | (np.isnan(r) & np.isnan(o))
    counts = {
        "count": len(r), "compared": int((~odd).sum()), "nan_ref": int(np.isnan(r).sum()),
        "nan_other": int(np.isnan(o).sum()), "inf_ref": int(np.isinf(r).sum()),
        "inf_other": int(np.isinf(o).sum()), "nonfinite_mismatches": int((odd & ~same).sum()),
    }  # fmt: skip
    parts = 2 if ref.is_complex() else 1
    where = np.flatnonzero(~odd)
    r, o = r[~odd], o[~odd]
    d = o - r
    relative = abs(d) / (abs(r) + 1e-8)
    with np.errstate(all="ignore"):
        mse, mae, norms = (d**2).mean(), abs(d).mean(), np.linalg.norm(r) * np.linalg.norm(o)
        return counts | {
            "mse": mse, "rmse": np.sqrt(mse), "mae": mae, "max_abs": abs(d).max(),
            "max_abs_at": where[abs(d).argmax()] // parts,
            "relative_mse": mse / ((r**2).mean() + 1e-8),
            "relative_mae": mae / (abs(r).mean() + 1e-8),
            "relative_max": relative.max(), "relative_mean": relative.mean(),
            "relative_median": np.median(relative),
            "relative_l2": np.linalg.norm(d) / np.linalg.norm(r), "cosine": r @ o / norms,
            "correlation": np.corrcoef(r, o)[0, 1] if len(r) > 1 else None,
            "sqnr_db": 10 * np.log10((r**2).sum() / (d**2).sum()),
            "percentiles": {p: np.percentile(abs(d), p) for p in (50, 90, 95, 99)},
            "ref": r, "other": o, "difference": d,
        }  # fmt: skip


def assert_close(found: Metrics, wanted: dict[str, Any], shape: tuple[int, ...]) -> None:
    for name, value in wanted.items():
        got = getattr(found, name)
        if name in ("ref", "other", "difference"):
            assert_side(got, value)
        elif name == "max_abs_at":
            assert got == tuple(int(i) for i in np.unravel_index(value, shape))
        elif name in SUMS and value is not None:
            assert got == pytest.approx(value, rel=1e-11, abs=1e-14), name
        elif name == "relative_median":
            assert got == pytest.approx(value, rel=1e-15), name
        else:
            assert got == value, name


def assert_side(found: Side, x: np.ndarray[Any, Any]) -> None:
    size = abs(x).max()
    assert (found.min, found.max, found.absmax) == (x.min(), x.max(), size)
    assert found.mean == pytest.approx(x.mean(), rel=1e-12, abs=1e-13 * size)
    assert found.std == pytest.approx(x.std(), rel=1e-11, abs=1e-13 * size)
    assert found.rms == pytest.approx(np.sqrt((x**2).mean()), rel=1e-12)


def made(dtype: torch.dtype, seed: int, count: int = 5000) -> torch.Tensor:
    """Values all over a dtype's finite range of everyday sizes."""
    random = torch.Generator().manual_seed(seed)
    if "float4" in str(dtype) or dtype == getattr(torch, "float8_e8m0fnu", None):
        codes = torch.randint(0, 250, (count // 2,), generator=random, dtype=torch.uint8)
        return (codes if "float4" in str(dtype) else codes % 20 + 110).view(dtype)
    if dtype.is_complex:
        parts = torch.randn(count, 2, generator=random, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype)
    if dtype.is_floating_point:
        return (torch.randn(count, generator=random) * 3).to(dtype)
    return torch.randint(0, 100, (count,), generator=random).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_agrees_with_numpy(dtype: torch.dtype, engine: str) -> None:
    ref, other = made(dtype, 1), made(dtype, 2)
    wanted = oracle(ref, other)
    shape = (len(ref) * (2 if "float4" in str(dtype) else 1),)
    assert_close(measure_tensors(ref, other), wanted, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ_between_the_sides(dtype: torch.dtype, engine: str) -> None:
    other = made(dtype, 3)
    count = len(values(other)) // (2 if dtype.is_complex else 1)
    ref = made(torch.float32, 4, count)
    wide = torch.complex(ref, torch.zeros_like(ref)) if dtype.is_complex else ref
    found = measure_tensors(ref, other)
    assert_close(found, oracle(wide, other), (count,))
    assert not found.bitwise_equal
    assert found.ulp_max is None or dtype is torch.float32


@pytest.mark.parametrize("count", [1, 2, 3, 511, 512, 513, 33000, 100_003])
def test_odd_sizes(count: int, engine: str) -> None:
    ref = torch.randn(count)
    other = ref + torch.randn(count) * 1e-3
    found = measure_tensors(ref, other)
    wanted = oracle(ref, other)
    assert_close(found, wanted, (count,))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.view(60, 50).t(),
    "permuted": lambda x: x.view(5, 4, 30, 5).permute(2, 0, 3, 1),
    "cut": lambda x: x.view(60, 50)[3:, 5:44],
    "every third": lambda x: x.view(60, 50)[:, ::3],
    "expanded": lambda x: x[:50].view(50, 1).expand(50, 7),
    "scalar": lambda x: x[7],
}


@pytest.mark.parametrize("block", [2, 64, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_any_layout_in_any_blocks(dtype: torch.dtype, layout: str, block: int) -> None:
    ref, other = (LAYOUTS[layout](made(dtype, seed, 3000)) for seed in (1, 2))
    found = measure_tensors(ref, other, block=block)
    wanted = oracle(ref, other)
    assert_close(found, wanted, tuple(ref.shape))
    against_plain = measure_tensors(ref.contiguous(), other, block=block)
    assert against_plain.percentiles == found.percentiles


def test_packed_four_bit_floats_stand_against_plain_values_in_small_blocks(engine: str) -> None:
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no packed 4-bit floats")
    packed = made(dtype, 5, 1200).view(30, 20)
    plain = torch.from_numpy(values(packed)).view(30, 40).float()
    assert measure_tensors(packed, plain, block=16).max_abs == 0.0
    strided = plain.t().contiguous().t()
    assert measure_tensors(strided, packed, block=16).max_abs == 0.0
    plain[17, 23] += 0.25
    assert measure_tensors(packed, plain, block=100).max_abs_at == (17, 23)


def test_many_blocks_give_what_one_block_gives(engine: str) -> None:
    ref = torch.randn(20_000)
    other = ref * 1.001 + 1e-4
    one, many = measure_tensors(ref, other), measure_tensors(ref, other, block=338)
    for field in dataclasses.fields(Metrics):
        a, b = getattr(one, field.name), getattr(many, field.name)
        if field.name in ("ref", "other", "difference"):
            assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-11)
        else:
            assert a == (pytest.approx(b, rel=1e-12) if field.name in SUMS else b), field.name


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=60))
def test_the_kernel_and_numpy_agree_on_anything(pairs: list[tuple[float, float]]) -> None:
    if native.library() is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    both = torch.tensor(pairs, dtype=torch.float64).to(torch.float32)
    by_kernel = measure_tensors(both[:, 0], both[:, 1])
    with mock.patch.object(native, "library", return_value=None):
        by_numpy = measure_tensors(both[:, 0], both[:, 1])
    assert_same(by_kernel, by_numpy)


def assert_same(one: Metrics, two: Metrics) -> None:
    for field in dataclasses.fields(Metrics):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, Side):
            for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True):
                slack = 1e-13 * (a.absmax or 0)
                assert x == (None if x is None else pytest.approx(y, rel=1e-10, abs=slack))
        elif field.name in SUMS and a is not None:
            assert a == pytest.approx(b, rel=1e-10, abs=1e-12), field.name
        else:
            assert a == b, field.name


def test_equal_tensors_have_no_error(engine: str) -> None:
    x = torch.randn(3000)
    found = measure_tensors(x, x.clone())
    assert found.bitwise_equal
    assert (found.mse, found.max_abs, found.relative_max, found.ulp_max) == (0.0, 0.0, 0.0, 0)
    assert set(found.percentiles.values()) == {0.0}
    assert found.sqnr_db == math.inf
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.error_histogram.absolute == Octaves({}, 3000, {})
    assert found.max_abs_at == (0,)


def test_constant_tensors_have_no_correlation_and_exactly_no_spread(engine: str) -> None:
    found = measure_tensors(torch.full((5000,), 0.1), torch.full((5000,), 0.3), block=700)
    assert found.correlation is None
    assert (found.ref.std, found.other.std, found.difference.std) == (0.0, 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)
    assert found.mae == pytest.approx(np.float64(np.float32(0.3)) - np.float64(np.float32(0.1)))
    assert len(set(found.percentiles.values())) == 1


def test_a_zero_reference_has_no_relative_norm_and_no_cosine(engine: str) -> None:
    zero = torch.zeros(100)
    found = measure_tensors(zero, torch.ones(100))
    assert (found.relative_l2, found.cosine, found.correlation) == (None, None, None)
    assert found.sqnr_db == -math.inf
    assert found.relative_mse == pytest.approx(1e8)
    both = measure_tensors(zero, -zero)
    assert (both.sqnr_db, both.relative_l2, both.mse, both.ulp_max) == (math.inf, None, 0.0, 0)
    assert not both.bitwise_equal


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty_tensors_have_counts_and_nothing_else(shape: tuple[int, ...], engine: str) -> None:
    found = measure_tensors(torch.empty(shape), torch.empty(shape))
    assert (found.count, found.compared, found.bitwise_equal) == (0, 0, True)
    assert (found.mse, found.cosine, found.max_abs_at, found.ulp_max) == (None,) * 4
    assert found.ref == Side(*(None,) * 6)
    assert found.percentiles == {}
    other = measure_tensors(torch.empty(shape), torch.empty(shape, dtype=torch.int8))
    assert not other.bitwise_equal


def test_nan_and_infinities_are_counted_and_the_rest_is_compared(engine: str) -> None:
    ref, other = torch.randn(4000), torch.randn(4000)
    ref[[5, 700, 3999]], other[[5, 701]] = math.nan, math.nan
    ref[[9, 10, 11]] = math.inf
    other[[9, 10]] = torch.tensor([math.inf, -math.inf])
    found = measure_tensors(ref, other)
    assert_close(found, oracle(ref, other), (4000,))
    assert found.nonfinite_mismatches == 5  # 10, 11, 700, 701, 3999


def test_where_nothing_is_finite_metrics_are_undefined(engine: str) -> None:
    found = measure_tensors(torch.full((7,), math.nan), torch.ones(7))
    assert (found.count, found.compared, found.nonfinite_mismatches) == (7, 0, 7)
    assert (found.mse, found.max_abs, found.sqnr_db) == (None, None, None)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e300, 1e-300])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(scale: float, engine: str) -> None:
    small = torch.randn(3000, dtype=torch.float64)
    apart = small + 0.01 * torch.randn(3000, dtype=torch.float64)
    wanted = oracle(small, apart)
    found = measure_tensors(small * scale, apart * scale)
    for name in ("cosine", "correlation", "sqnr_db", "relative_l2"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=1e-11), name
    for name in ("rmse", "mae", "max_abs"):
        assert getattr(found, name) == pytest.approx(wanted[name] * scale, rel=1e-9), name
    for name in ("ref", "other", "difference"):
        side = getattr(found, name)
        assert side.std == pytest.approx(wanted[name].std() * scale, rel=1e-9)
        assert side.mean == pytest.approx(wanted[name].mean() * scale, rel=1e-9)
    for percent, value in found.percentiles.items():
        assert value == pytest.approx(wanted["percentiles"][percent] * scale, rel=1e-9)
    if scale > 1:
        assert found.relative_mse == pytest.approx(
            (wanted["difference"] ** 2).mean() / (wanted["ref"] ** 2).mean(), rel=1e-9
        )


def test_a_difference_beyond_float64_is_infinite_and_the_rest_is_not(engine: str) -> None:
    big = torch.tensor([1.5e308, 1.0, 2.0], dtype=torch.float64)
    found = measure_tensors(big, -big)
    assert found.max_abs == found.mse == math.inf
    assert found.max_abs_at == (0,)
    assert (found.cosine, found.relative_l2, found.relative_max) == (-1.0, 2.0, 2.0)
    assert found.percentiles[50] == 4.0
    assert found.error_histogram.absolute.negative == {1: 1, 2: 1, 1024: 1}


def test_a_large_mean_does_not_cancel_the_variance(engine: str) -> None:
    noise, more = torch.randn(50_000, dtype=torch.float64), torch.randn(50_000).double() * 0.1
    shifted = noise + 1e8
    found = measure_tensors(shifted, shifted + more, block=4096)
    assert found.ref.std == pytest.approx(shifted.numpy().std(), rel=1e-9)
    assert found.correlation == pytest.approx(
        np.corrcoef(shifted.numpy(), (shifted + more).numpy())[0, 1], rel=1e-9
    )
    assert found.difference.std == pytest.approx((shifted + more - shifted).numpy().std(), rel=1e-9)


@pytest.mark.parametrize("name", FLOATS)
def test_ulp_distance_is_how_many_steps_of_the_dtype_lie_between(name: str, engine: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    if "float4" in name:
        ref, other, far = torch.tensor([0xA1]), torch.tensor([0x12]), [1, 3]
        bits = torch.uint8
    else:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        ref, other, far = torch.tensor([60, 61, 70]), torch.tensor([60, 64, 69]), [0, 3, 1]
    found = measure_tensors(ref.to(bits).view(dtype), other.to(bits).view(dtype))
    assert found.ulp_max == max(far)
    assert found.ulp_mean == pytest.approx(sum(far) / len(far))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ulp_distance_across_zero_counts_zero_once(dtype: torch.dtype, engine: str) -> None:
    tiny = torch.nextafter(torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype))
    found = measure_tensors(tiny * torch.tensor([1, 0], dtype=dtype), -tiny)
    assert (found.ulp_max, found.ulp_mean) == (2, 1.5)
    top = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert measure_tensors(top, -top).ulp_max == 2 * int(top.view(bits))


def test_integers_and_complex_numbers_have_ulps_only_where_they_are_floats(engine: str) -> None:
    whole = torch.arange(9)
    assert measure_tensors(whole, whole + 1).ulp_max is None
    z = torch.randn(9, dtype=torch.complex64)
    assert measure_tensors(z, z).ulp_max == 0


def test_the_index_of_a_complex_difference_is_that_of_its_element(engine: str) -> None:
    ref = torch.zeros(4, 5, dtype=torch.complex64)
    other = ref.clone()
    other[2, 3] = 7j
    found = measure_tensors(ref, other)
    assert (found.max_abs, found.max_abs_at, found.count) == (7.0, (2, 3), 40)
    assert measure_tensors(other.conj(), other).max_abs == 14.0


def test_the_first_of_equal_largest_differences_is_named(engine: str) -> None:
    ref, other = torch.zeros(100, 1000), torch.zeros(100, 1000)
    other[3, 4], other[70, 8] = -2.0, 2.0
    for block in (64, 1 << 22):
        assert measure_tensors(ref, other, block=block).max_abs_at == (3, 4)


def test_a_result_survives_json(engine: str) -> None:
    ref, other = torch.randn(30, 40), torch.randn(30, 40)
    ref[0, 0] = math.nan
    pairs = [(ref, other), (ref, ref), (torch.zeros(0), torch.zeros(0)), (other * 0, other)]
    for one, two in pairs:
        found = measure_tensors(one, two)
        text = json.dumps(found.to_json(), allow_nan=False)
        assert Metrics.from_json(json.loads(text)) == found


def test_octaves_count_the_signed_differences(engine: str) -> None:
    ref = torch.tensor([1.0, 1.0, 1.0, 2.0, 4.0])
    other = torch.tensor([1.0, 2.0, -2.0, 2.75, 3.0])
    histogram = measure_tensors(ref, other).error_histogram
    assert histogram.absolute == Octaves(negative={0: 1, 1: 1}, zero=1, positive={0: 1, -1: 1})
    assert histogram.relative == Octaves(negative={-3: 1, 1: 1}, zero=1, positive={-1: 1, -2: 1})


def test_errors_of_one_distribution_are_alike_and_others_are_not(engine: str) -> None:
    ref = torch.randn(40_000)
    noise = [measure_tensors(ref, ref + torch.randn(40_000) * 0.01) for _ in range(2)]
    larger = measure_tensors(ref, ref + torch.randn(40_000) * 0.02)
    biased = measure_tensors(ref, ref + torch.randn(40_000).abs() * 0.01)
    alike = bhattacharyya(*noise)
    assert alike is not None
    assert alike > 0.999
    assert bhattacharyya(noise[0], noise[0]) == pytest.approx(1.0)
    # Of normal distributions, sqrt(2 s / (1 + s**2)); octaves see a little less.
    for other, most in ((larger, 0.93), (biased, 0.72)):
        found = bhattacharyya(noise[0], other)
        assert found is not None
        assert math.sqrt(0.5) - 0.01 < found < most
    empty = measure_tensors(torch.zeros(0), torch.zeros(0))
    assert bhattacharyya(noise[0], empty) is None


def test_pairs_without_a_common_bin_have_nothing_in_common(engine: str) -> None:
    one, zero = torch.ones(8), torch.zeros(8)
    up, down = measure_tensors(zero, one), measure_tensors(one, zero)
    assert bhattacharyya(up, down) == 0.0
    assert bhattacharyya(up, down, relative=True) == 0.0


def test_blocks_are_measured_as_the_tensors_they_make_up(engine: str) -> None:
    ref, other = torch.randn(6, 50), torch.randn(6, 50)
    found = measure(lambda: zip(ref.split(2), other.split(2), strict=True), shape=(6, 50))
    assert_close(found, oracle(ref, other), (6, 50))


def test_blocks_that_do_not_make_up_the_shape_are_refused(engine: str) -> None:
    ref = torch.randn(10)
    with pytest.raises(NotSupported, match=r"hold 10 values, the shape 12"):
        measure(lambda: [(ref, ref)], shape=(12,))
    with pytest.raises(NotSupported, match="cut them alike"):
        measure(lambda: [(ref, ref[:5])], shape=(10,))
    with pytest.raises(NotSupported, match="several dtypes"):
        measure(lambda: [(ref, ref), (ref, ref.half())], shape=(20,))
    codes = torch.zeros(10, dtype=torch.int8)
    with pytest.raises(NotSupported, match=r"hold 10 values, the shape 12"):
        measure(lambda: [(codes, codes)], shape=(12,))
    with pytest.raises(NotSupported, match=r"\[10\] and \[2, 5\]"):
        measure_tensors(ref, ref.view(2, 5))


def test_values_that_change_between_the_passes_are_an_error(engine: str) -> None:
    ref, calls = torch.zeros(1000), iter(range(9))

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = 10 ** (5 * next(calls))
        yield ref, torch.rand(1000) * size
        yield ref, torch.rand(1000) * size

    with pytest.raises(RunError, match="changed while"):
        measure(blocks, shape=(2000,))


CODES = [getattr(torch, name) for name in FLOATS[4:] + OTHERS[:3] if hasattr(torch, name)]


@pytest.mark.parametrize("count", [1000, 70_000])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_codes_give_what_their_values_give(dtype: torch.dtype, count: int, engine: str) -> None:
    random = torch.Generator().manual_seed(7)
    ref, other = (
        torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=random)
        .to(torch.uint8)
        .view(dtype)
        for _ in range(2)
    )
    wide = [torch.from_numpy(values(x)) for x in (ref, other)]
    by_codes, by_values = measure_tensors(ref, other, block=700), measure_tensors(*wide)
    for field in dataclasses.fields(Metrics):
        a, b = getattr(by_codes, field.name), getattr(by_values, field.name)
        if field.name in ("ref", "other", "difference"):
            assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-11)
        elif not field.name.startswith("ulp"):
            assert a == (pytest.approx(b, rel=1e-12) if field.name in SUMS else b), field.name


def test_codes_of_two_dtypes_are_not_the_same_bits(engine: str) -> None:
    codes = torch.arange(100, dtype=torch.uint8)
    found = measure_tensors(codes, codes.to(torch.int8))
    assert (found.max_abs, found.bitwise_equal, found.ulp_max) == (0.0, False, None)
    if hasattr(torch, "float4_e2m1fn_x2"):
        packed = torch.tensor([0x21, 0x43], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        plain = torch.tensor([0.5, 1.0, 1.5, 4.0]).to(torch.float8_e4m3fn)
        assert measure_tensors(packed, plain).max_abs_at == (3,)


def test_the_first_of_equal_largest_differences_of_codes_is_named(engine: str) -> None:
    ref = torch.zeros(3, 100_000, dtype=torch.int8)
    other = ref.clone()
    other[1, 70_000], other[2, 5], ref[2, 6] = -3, 3, 3
    for block in (1 << 10, 1 << 22):
        found = measure_tensors(ref, other, block=block)
        assert (found.max_abs, found.max_abs_at) == (3.0, (1, 70_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_change_from_one_tensor_to_another_is_the_largest_and_the_sum(
    dtype: torch.dtype, engine: str
) -> None:
    ref, other = made(dtype, 1), made(dtype, 2)
    apart = np.abs(values(other) - values(ref))
    half = len(ref) // 4 * 2
    largest, total = change([(ref[:half], other[:half]), (ref[half:], other[half:])])
    assert largest == apart.max()
    assert total == pytest.approx(apart.sum(), rel=1e-12)
    assert change([]) == (0.0, 0.0)


def test_a_change_that_is_no_number_is_not_lost_among_others(engine: str) -> None:
    ref, other = torch.zeros(3000), torch.ones(3000)
    other[1700] = -math.inf
    assert change([(ref, other)]) == (math.inf, math.inf)
    ref[1700] = -math.inf
    for blocks in ([(ref, other)], list(zip(ref.split(600), other.split(600), strict=True))):
        assert all(map(math.isnan, change(blocks)))
    assert change([(torch.zeros(0), torch.zeros(0))]) == (0.0, 0.0)


def test_a_parameter_is_measured_and_left_as_it_is(engine: str) -> None:
    weight = torch.nn.Parameter(torch.randn(300))
    before = weight.detach().clone()
    assert measure_tensors(weight, weight * 2).relative_max == pytest.approx(1.0, rel=1e-3)
    assert torch.equal(weight, before)
