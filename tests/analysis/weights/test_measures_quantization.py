"""Outliers, ranges and SQNR against numpy in float64, by the kernel and without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.analysis.weights.planted import (
    FLOATS,
    Doubles,
    as_stored,
    distribution_oracle,
    gaussian,
    int8_oracle,
    sqnr_oracle,
    stored,
)

from tensortap import formats, native
from tensortap_analysis.weights import Options
from tensortap_analysis.weights.measures import measure, pieces

NONE = Options(formats=())


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        with mock.patch.object(native, "library", return_value=None):
            yield request.param
    elif native.library() is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    else:
        yield request.param


def quantization(matrix: torch.Tensor, options: Options = NONE) -> dict[str, Any]:
    return measure(matrix, matrix.dtype, ["quantization"], options)["quantization"]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Doubles:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.1


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-41), (torch.float32, 1e-36), (torch.float32, 1e38),
        (torch.bfloat16, 3e-39), (torch.bfloat16, 1e-32), (torch.float16, 1e-6),
        (torch.float64, 1e-310), (torch.float64, 1e-200), (torch.float64, 1e307),
    ],
    ids=str,
)  # fmt: skip
def test_values_at_the_ends_of_their_dtype_have_the_numbers_of_any_others(
    dtype: torch.dtype, size: float
) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (40, 30))
    matrix = stored(values * size, dtype)
    exact = as_stored(matrix)
    # In float64 and near 1, where numpy loses nothing.
    exact = np.ldexp(exact, -int(np.frexp(np.abs(exact).max())[1]))
    found = measure(matrix, dtype, ["quantization"], Options(("int8", "mxfp8")))["quantization"]
    assert found["sqnr_db"] == pytest.approx(
        sqnr_oracle(exact, int8_oracle(exact, axis=None)), abs=0.01
    )
    assert found["sqnr_db_per_channel"] == pytest.approx(
        sqnr_oracle(exact, int8_oracle(exact, axis=1)), abs=0.01
    )
    expected = distribution_oracle(exact)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    if size in (1e38, 1e-6):
        assert found["formats"]["int8"] == found["sqnr_db"]
    else:
        assert found["formats"] == {"int8": None, "mxfp8": None}
        assert "scales of formats would be lost" in found["unresolved"]["formats"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(70, 50), (1, 300), (300, 1), (3, 70_000)], ids=str)
def test_the_distribution_is_what_numpy_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = stored(heavy_tailed(*shape), dtype)
    found, expected = quantization(matrix), distribution_oracle(as_stored(matrix))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found["unresolved"] == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_costs_what_rounding_in_float64_costs(dtype: torch.dtype) -> None:
    matrix = stored(heavy_tailed(90, 64), dtype)
    values = as_stored(matrix)
    found = quantization(matrix)
    per_tensor = sqnr_oracle(values, int8_oracle(values, axis=None))
    per_channel = sqnr_oracle(values, int8_oracle(values, axis=1))
    # float32 codecs round a few ties the other way.
    assert found["sqnr_db"] == pytest.approx(per_tensor, abs=2e-3)
    assert found["sqnr_db_per_channel"] == pytest.approx(per_channel, abs=2e-3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(40, 96), (3, 70_001), (5, 37)], ids=str)
def test_every_format_costs_what_its_codec_makes_of_the_whole_matrix(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = stored(heavy_tailed(*shape), dtype)
    wide = matrix if dtype in (torch.float64, torch.float32) else matrix.float()
    found = quantization(matrix, Options())["formats"]
    assert set(found) == set(formats.names())
    for name, sqnr_db in found.items():
        codec = formats.get(name)
        rounded = as_stored(codec.dequantize(codec.quantize(wide)))
        with np.errstate(divide="ignore"):
            assert sqnr_db == pytest.approx(sqnr_oracle(as_stored(matrix), rounded), abs=1e-5), name


def test_per_channel_int8_is_the_codec_with_a_scale_a_row() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        matrix = stored(heavy_tailed(200, 130), dtype)
        wide = matrix if dtype is torch.float64 else matrix.float()
        rounded = formats.get("int8", scale="channel").fake_quantize(wide)
        expected = sqnr_oracle(as_stored(matrix), as_stored(rounded))
        assert quantization(matrix)["sqnr_db_per_channel"] == pytest.approx(expected, abs=1e-6)


def test_int8_of_a_gaussian_matrix_loses_to_its_size_per_tensor_and_not_per_channel() -> None:
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16)
    found = quantization(matrix)
    assert found["sqnr_db"] == pytest.approx(37.8, abs=1)
    assert found["sqnr_db_per_channel"] == pytest.approx(41, abs=0.5)
    assert found["extreme_outlier_percentage"] == pytest.approx(0.27, abs=0.02)
    assert found["kurtosis"] == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("dtype", FLOATS[:5], ids=str)
@pytest.mark.parametrize("planted", [1, 20, 100])
def test_planted_outliers_are_counted(planted: int, dtype: torch.dtype) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (100, 100))
    values.reshape(-1)[:: 10_000 // planted][:planted] = 100
    found = quantization(stored(values, dtype))
    assert found["extreme_outlier_percentage"] == pytest.approx(planted / 100)
    assert found["dynamic_range"] > 50


def test_outliers_never_exceed_a_ninth() -> None:
    values = np.zeros((90, 10))
    values[:9] = np.where(np.arange(10) % 2, 1, -1)
    assert quantization(stored(values, torch.float32))["extreme_outlier_percentage"] == 10
    assert quantization(torch.eye(100))["extreme_outlier_percentage"] == 1


def test_blocks_lie_along_the_rows() -> None:
    blocked = Options(formats=tuple(name for name in formats.names() if formats.get(name).block))
    signs = np.sign(gaussian(256, 256))
    values = stored(signs * (2.0 ** np.arange(256) % 3)[:, None], torch.float32)
    rows = quantization(values, blocked)["formats"]
    columns = quantization(values.T.contiguous(), blocked)["formats"]
    assert all(sqnr_db > 140 for sqnr_db in rows.values())
    assert rows["int4"] > columns["int4"] + 100


def test_rows_longer_than_a_piece_and_pieces_of_many_rows_count_alike() -> None:
    matrix = stored(heavy_tailed(64, 256), torch.float32)
    whole = quantization(matrix, Options())
    with mock.patch.object(pieces, "_VALUES", 100):
        parts = quantization(matrix, Options())
    assert parts.pop("unresolved") == whole.pop("unresolved")
    assert parts.pop("formats") == pytest.approx(whole.pop("formats"), abs=1e-9)
    assert parts == pytest.approx(whole, rel=1e-12)


def test_a_format_the_values_are_exact_in_costs_nothing() -> None:
    found = quantization(stored(gaussian(8, 8), torch.bfloat16), Options(formats=("bf16", "fp16")))
    assert found["formats"]["bf16"] == math.inf
    signs = torch.where(torch.randn(20, 32) < 0, -1.0, 1.0)
    found = quantization(signs, Options())
    assert found["sqnr_db"] > 140
    assert found["formats"]["mxfp4"] == math.inf


def test_what_overflows_a_format_counts_as_its_largest_value() -> None:
    values = np.full((4, 32), 1.0)
    values[0, 0] = 131_008
    for dtype in (torch.float32, torch.bfloat16):
        found = quantization(stored(values, dtype), Options(formats=("fp16",)))["formats"]["fp16"]
        exact = as_stored(stored(values, dtype))
        rounded = exact.clip(max=65_504)
        assert found == pytest.approx(sqnr_oracle(exact, rounded), abs=1e-6)


def test_the_range_of_float64_is_no_limit() -> None:
    values = heavy_tailed(30, 40)
    for scale in (1e-250, 1e250):
        found = quantization(stored(values * scale, torch.float64))
        expected = distribution_oracle(values) | {
            "sqnr_db": sqnr_oracle(values, int8_oracle(values, axis=None)),
            "sqnr_db_per_channel": sqnr_oracle(values, int8_oracle(values, axis=1)),
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_quantised_and_says_so(bad: float, dtype: torch.dtype) -> None:
    values = gaussian(8, 32)
    values[3, 3] = bad
    found = quantization(stored(values, dtype), Options())
    word = "NaN" if math.isnan(bad) else "infinite"
    for name in ("sqnr_db", "sqnr_db_per_channel", "formats", "kurtosis", "dynamic_range"):
        assert found[name] is None
        assert found["unresolved"][name] == f"not finite: 1 {word}"


def test_zeros_and_constants_have_what_can_be_said_of_them() -> None:
    zero = quantization(torch.zeros(4, 4), Options())
    assert zero["extreme_outlier_percentage"] == 0
    assert zero["unresolved"]["sqnr_db"] == "all values are 0"
    assert zero["unresolved"]["formats"] == "all values are 0"
    assert set(zero["formats"].values()) == {None}
    constant = quantization(torch.full((4, 4), 0.3, dtype=torch.bfloat16))
    assert (constant["dynamic_range"], constant["kurtosis"]) == (1, None)
    assert constant["unresolved"] == {"kurtosis": "all values are equal"}


def test_a_matrix_without_elements_has_no_metrics() -> None:
    for shape in ((0, 4), (4, 0)):
        found = quantization(torch.zeros(shape), Options())
        assert found["sqnr_db"] is None
        assert set(found["unresolved"].values()) == {"no element"}


@settings(max_examples=80)
@given(
    array=arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-400, 400, width=32),
    ),
    dtype=st.sampled_from(FLOATS),
)
def test_any_matrix_agrees_with_numpy(array: Doubles, dtype: torch.dtype) -> None:
    matrix = stored(array, dtype)
    values = as_stored(matrix)
    size = np.abs(values)
    if size.max() == 0 or size.max() < 1e-30 or values.std() < 1e-6 * size.max():
        return
    found, expected = quantization(matrix), distribution_oracle(values)
    # A value exactly 3 standard deviations away may fall on either side.
    edge = np.isclose(np.abs(values - values.mean()), 3 * values.std(), rtol=1e-12).mean() * 100
    outliers = expected.pop("extreme_outlier_percentage")
    assert found["extreme_outlier_percentage"] == pytest.approx(outliers, abs=edge + 1e-9)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-7)
