"""Singular values and what follows from them, against numpy's SVD in float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis.weights.planted import (
    FLOATS,
    Doubles,
    as_stored,
    gaussian,
    spectral_oracle,
    stored,
    with_spectrum,
)

from tensortap import formats
from tensortap_analysis.weights import Options
from tensortap_analysis.weights.measures import blas, gram, measure

SHAPES = [(48, 48), (200, 40), (40, 200), (1, 30), (30, 1), (1, 1)]
CONDITIONS = [1.0, 1e2, 1e4, 1e5, 1e6, 1e8, 1e10, 1e12]


def spectral(
    matrix: torch.Tensor, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Any]:
    return measure(matrix, dtype or matrix.dtype, ["spectral"], Options(**options))["spectral"]


def moved_by_rounding(values: Doubles, dtype: torch.dtype) -> float:
    """The spectral norm of the rounding errors: no singular value moves farther."""
    return float(np.linalg.norm(values - as_stored(stored(values, dtype)), 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_metric_of_a_random_matrix_is_what_numpy_says(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = stored(gaussian(*shape), dtype)
    found, expected = spectral(matrix), spectral_oracle(as_stored(matrix))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(64, 64), (300, 50), (50, 300)], ids=str)
def test_planted_condition_numbers_are_found_and_resolved_in_float64(
    shape: tuple[int, int], condition: float
) -> None:
    planted = np.geomspace(1, 1 / condition, min(shape))
    found = spectral(stored(with_spectrum(*shape, planted), torch.float64), full_spectrum=True)
    assert found["condition_number"] == pytest.approx(condition, rel=1e-2)
    assert found["condition_number_at_least"] <= condition
    assert found["total_rank"] == min(shape)
    assert found["unresolved"] == {}
    # Singular values are known to some 1e-16 of the largest, not of themselves.
    assert found["spectrum"] == pytest.approx(planted.tolist(), rel=1e-4, abs=1e-14)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_condition_numbers_beyond_what_the_dtype_resolves_are_named(dtype: torch.dtype) -> None:
    planted = with_spectrum(96, 96, np.r_[np.linspace(2, 1, 95), 1e-12])
    found = spectral(stored(planted, dtype))
    name = str(dtype).removeprefix("torch.")
    assert found["condition_number"] > found["condition_number_at_least"] > 1
    assert name in found["unresolved"]["condition_number"]
    assert name in found["unresolved"]["s_min"]
    assert found["condition_number_at_least"] < 2e12


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_condition_numbers_inside_it_are_not_and_agree_with_the_matrix_before_rounding(
    dtype: torch.dtype,
) -> None:
    planted = with_spectrum(96, 96, np.linspace(2, 1, 96))
    found = spectral(stored(planted, dtype))
    assert found["unresolved"] == {}
    assert found["condition_number_at_least"] <= 2 <= 1.35 * found["condition_number"]


def test_a_bfloat16_file_resolves_condition_numbers_up_to_about_600() -> None:
    matrix = stored(gaussian(400, 400), torch.bfloat16)
    found = spectral(matrix)
    assert found["resolution"] / found["s_max"] == pytest.approx(1.7e-3, rel=0.1)
    assert "up to 5" in found["unresolved"]["condition_number"]
    # The value of the matrix as it is stored stays: older rules judge it.
    expected = spectral_oracle(as_stored(matrix))
    assert found["condition_number"] == pytest.approx(expected["condition_number"], rel=1e-3)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (1024, 64), (64, 1024), (600, 200)], ids=str)
def test_rounding_moves_singular_values_by_no_more_than_the_resolution_and_by_not_much_less(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = gaussian(*shape)
    error = moved_by_rounding(values, dtype)
    assert error <= spectral(stored(values, dtype))["resolution"] <= 1.5 * error


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("scaled", ["rows", "columns", "both"])
def test_the_resolution_holds_where_some_rows_or_columns_are_much_larger(
    scaled: str, dtype: torch.dtype
) -> None:
    values = gaussian(300, 200) / 10
    sizes = np.ones((300, 200))
    if scaled != "columns":
        sizes[:3] *= 30
    if scaled != "rows":
        sizes[:, :3] *= 30
    error = moved_by_rounding(values * sizes, dtype)
    assert error <= spectral(stored(values * sizes, dtype))["resolution"] <= 5 * error


def test_the_resolution_of_float16_counts_the_coarse_steps_of_subnormal_values() -> None:
    values = gaussian(200, 200) * 1e-6
    error = moved_by_rounding(values, torch.float16)
    assert error <= spectral(stored(values, torch.float16))["resolution"] <= 1.5 * error


@pytest.mark.parametrize("shape", [(256, 256), (64, 512)], ids=str)
def test_values_dequantised_from_int8_are_resolved_to_their_steps(shape: tuple[int, int]) -> None:
    values = gaussian(*shape) * np.geomspace(1, 20, shape[0])[:, None]
    scale = np.abs(values).max(1, keepdims=True) / 127
    rounded = np.rint(values / scale) * scale
    error = float(np.linalg.norm(values - rounded, 2))
    found = spectral(stored(rounded, torch.float32), torch.int8)
    assert error <= found["resolution"] <= 2 * error


@pytest.mark.parametrize("dtype", FLOATS[4:], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_values_dequantised_from_float8_are_resolved_whatever_their_scale(
    size: float, dtype: torch.dtype
) -> None:
    values = gaussian(256, 192) * size
    scale = np.abs(values).max() / torch.finfo(dtype).max
    rounded = as_stored(stored(values / scale, dtype)) * scale
    error = float(np.linalg.norm(values - rounded, 2))
    found = spectral(stored(rounded, torch.float32), dtype)
    assert error <= found["resolution"] <= 1.5 * error


def grouped(values: Doubles, group: int, last: int) -> Doubles:
    """Values rounded to multiples of a scale for each group of a row."""
    parts = values.reshape(len(values), -1, group)
    scale = np.abs(parts).max(2, keepdims=True) / last
    rounded: Doubles = (np.rint(parts / scale) * scale).reshape(values.shape)
    return rounded


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("last", [7, 127], ids=["4 bits", "8 bits"])
def test_values_dequantised_from_packed_integers_are_resolved_to_their_steps(
    last: int, group: int
) -> None:
    values = gaussian(200, 256) * np.geomspace(1, 5, 200)[:, None]
    rounded = grouped(values, group, last)
    error = float(np.linalg.norm(values - rounded, 2))
    found = spectral(stored(rounded, torch.float32), torch.int32)
    assert error <= found["resolution"] <= 2.2 * error


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(256, 256), (100, 512)], ids=str)
def test_values_dequantised_from_4_bit_floats_are_resolved_to_their_steps(
    shape: tuple[int, int], name: str
) -> None:
    values = gaussian(*shape)
    rounded = formats.get(name).fake_quantize(stored(values, torch.float32))
    error = float(np.linalg.norm(values - as_stored(rounded), 2))
    found = spectral(rounded, torch.uint8)
    assert error <= found["resolution"] <= 2 * error
    assert "uint8" in found["unresolved"].get("condition_number", "uint8")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 63])
def test_a_planted_rank_is_the_total_rank(rank: int, dtype: torch.dtype) -> None:
    planted = with_spectrum(120, 64, np.linspace(2, 1, rank))
    found = spectral(stored(planted, dtype))
    assert found["total_rank"] == rank
    assert found["full_rank"] == 64
    assert found["rank_tolerance"] >= found["resolution"]
    assert "condition_number" in found["unresolved"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 100])
def test_a_product_of_thin_matrices_has_their_rank(rank: int, dtype: torch.dtype) -> None:
    left, right = stored(gaussian(128, rank, 1), dtype), stored(gaussian(rank, 128, 2), dtype)
    product = left @ right
    found = spectral(product)
    assert found["total_rank"] == rank
    if dtype is not torch.bfloat16:
        eps = torch.finfo(dtype).eps
        assert found["total_rank"] == np.linalg.matrix_rank(product.numpy())
        assert found["rank_tolerance"] == pytest.approx(128 * eps * found["s_max"])


@pytest.mark.parametrize("turned", [False, True], ids=["columns", "rows"])
def test_a_dead_vector_makes_the_matrix_singular_without_doubt(turned: bool) -> None:
    values = gaussian(90, 40)
    values[:, [3, 17]] = 0
    found = spectral(stored(values.T if turned else values, torch.bfloat16).contiguous())
    assert (found["s_min"], found["condition_number"]) == (0, math.inf)
    assert found["condition_number_at_least"] == math.inf
    assert found["total_rank"] == 38
    assert found["unresolved"] == {}


def test_dead_rows_of_a_tall_matrix_count_once_fewer_than_its_columns_are_left() -> None:
    values = gaussian(90, 40)
    values[30:] = 0
    found = spectral(stored(values, torch.float32), full_spectrum=True)
    assert found["spectrum"][30:] == [0] * 10
    assert found["unresolved"] == {}
    left = np.linalg.svd(as_stored(stored(values[:30], torch.float32)), compute_uv=False)
    assert found["spectrum"][:30] == pytest.approx(left, rel=1e-6)


def test_the_error_each_rank_leaves_is_that_of_the_truncated_decomposition() -> None:
    values = with_spectrum(60, 33, np.geomspace(1, 1e-6, 33))
    matrix = stored(values, torch.float64)
    u, s, v = np.linalg.svd(as_stored(matrix), full_matrices=False)
    found = spectral(matrix)["rank_errors"]
    assert list(found) == ["1", "2", "4", "8", "16", "32"]
    for rank, error in found.items():
        low = (u[:, : int(rank)] * s[: int(rank)]) @ v[: int(rank)]
        expected = np.linalg.norm(as_stored(matrix) - low) / np.linalg.norm(as_stored(matrix))
        assert error == pytest.approx(expected, rel=1e-6)


def test_equal_rows_leave_a_condition_number_that_no_dtype_resolves() -> None:
    values = gaussian(40, 90)
    values[5] = values[6]
    found = spectral(stored(values, torch.float32))
    assert found["condition_number"] > 1e12
    assert found["condition_number_at_least"] < 1e9
    assert "condition_number" in found["unresolved"]
    assert found["total_rank"] == 39


@pytest.mark.parametrize("shape", [(700, 30), (30, 700), (64, 64)], ids=str)
@pytest.mark.parametrize("condition", [10.0, 1e9])
def test_a_matrix_read_in_many_blocks_has_the_same_spectrum(
    shape: tuple[int, int], condition: float
) -> None:
    planted = np.geomspace(1, 1 / condition, min(shape))
    matrix = stored(with_spectrum(*shape, planted), torch.float64)
    whole = spectral(matrix, full_spectrum=True)["spectrum"]
    with mock.patch.multiple(gram, _BYTES=1 << 13, _FEWEST=1):
        blocks = spectral(matrix, full_spectrum=True)["spectrum"]
    assert blocks == pytest.approx(whole, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("columns", [17, 40, 129])
def test_a_large_gram_matrix_is_added_up_in_panels(columns: int) -> None:
    values = gaussian(columns * 5, columns)
    with (
        mock.patch.multiple(gram, _BYTES=1 << 10, _FEWEST=1),
        mock.patch.object(blas, "_PANEL", 1 << 10),
        mock.patch.object(blas, "openblas", return_value=None),
    ):
        found = spectral(stored(values, torch.float64), full_spectrum=True)["spectrum"]
    assert found == pytest.approx(np.linalg.svd(values, compute_uv=False), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_squares_beyond_float64_do_not_overflow(scale: float) -> None:
    values = with_spectrum(30, 20, np.geomspace(4, 1, 20))
    found = spectral(stored(values * scale, torch.float64))
    assert found["s_max"] == pytest.approx(4 * scale)
    assert found["s_min"] == pytest.approx(1 * scale)
    assert found["condition_number"] == pytest.approx(4)
    assert found["resolution"] < 1e-12 * scale
    assert found["unresolved"] == {}


def test_the_spectrum_of_a_gram_matrix_is_used_only_where_it_is_right() -> None:
    """Its smallest eigenvalues drown at 1e-16 of the largest: singular values at 1e-8."""
    for condition in np.geomspace(1e3, 1e7, 9):
        matrix = stored(with_spectrum(80, 60, np.geomspace(1, 1 / condition, 60)), torch.float64)
        assert spectral(matrix)["condition_number"] == pytest.approx(condition, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_spectrum_and_says_so(bad: float) -> None:
    values = gaussian(8, 5)
    values[2, 3] = bad
    found = spectral(stored(values, torch.bfloat16), full_spectrum=True)
    assert found["s_max"] is None
    assert found["condition_number"] is None
    assert found["full_rank"] == 5
    word = "NaN" if math.isnan(bad) else "infinite"
    assert found["unresolved"]["s_max"] == f"not finite: 1 {word}"


def test_zeros_have_norms_and_no_ratios() -> None:
    found = spectral(torch.zeros(6, 4), full_spectrum=True)
    assert (found["s_max"], found["s_min"], found["total_rank"]) == (0, 0, 0)
    assert found["spectrum"] == [0] * 4
    for name in ("condition_number", "stable_rank", "effective_rank"):
        assert found[name] is None
        assert found["unresolved"][name] == "all values are 0"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_a_matrix_without_elements_has_no_spectrum(shape: tuple[int, int]) -> None:
    found = spectral(torch.zeros(shape))
    assert found["s_max"] is None
    assert found["full_rank"] == 0
    assert found["unresolved"]["condition_number"] == "no element"


def test_a_constant_matrix_has_rank_one() -> None:
    found = spectral(torch.full((30, 20), 0.5))
    assert (found["total_rank"], found["energy_rank_99"]) == (1, 1)
    assert found["stable_rank"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-6)


def test_the_same_matrix_gives_the_same_bits_wherever_it_lies_and_whatever_else_runs() -> None:
    matrix = stored(gaussian(300, 260), torch.float32)
    shifted = torch.empty(matrix.numel() + 5)[5:].view_as(matrix).copy_(matrix)
    alone, answers = spectral(matrix, full_spectrum=True), []

    def work(which: torch.Tensor) -> None:
        torch.set_num_threads(1)
        answers.append(spectral(which, full_spectrum=True))

    workers = [threading.Thread(target=work, args=(one,)) for one in (matrix, shifted) * 3]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == [alone] * 6


@pytest.fixture(params=["in place", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numpy":
        with mock.patch.object(blas, "openblas", return_value=None):
            yield request.param
    elif blas.openblas() is None:
        pytest.skip("numpy has another BLAS here")
    else:
        yield request.param


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (1, 9), (30, 30)], ids=str)
def test_gram_matrices_and_their_eigenvalues_are_those_of_numpy(
    shape: tuple[int, int], engine: str
) -> None:
    values = gaussian(*shape)
    total = np.zeros((shape[1], shape[1]))
    parts = [values, gaussian(5, shape[1]), np.asfortranarray(gaussian(6, shape[1]))]
    parts += [gaussian(8, shape[1] + 2)[:, 1:-1], gaussian(shape[1], 9)[:, 2:].T]
    stacked = np.concatenate(parts)
    wanted = stacked.T @ stacked
    with blas.one_thread():
        for part in parts:
            blas.add_gram(total, part)
        np.testing.assert_allclose(np.tril(total), np.tril(wanted), rtol=1e-12, atol=1e-12)
        found = blas.eigenvalues(np.tril(total))
    exact = np.linalg.eigvalsh(wanted)
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13 * exact[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_numpy_of_another_blas_finds_the_same_spectra(dtype: torch.dtype) -> None:
    matrix = stored(gaussian(50, 33), dtype)
    found = spectral(matrix, full_spectrum=True)["spectrum"]
    with mock.patch.object(blas, "openblas", return_value=None):
        assert spectral(matrix, full_spectrum=True)["spectrum"] == pytest.approx(found, rel=1e-11)


def test_numpy_gets_its_threads_back() -> None:
    found = blas.openblas()
    if found is None:
        pytest.skip("numpy has another BLAS here")
    get, put = found.threads.get, found.threads.put
    before = get()
    try:
        put(2)
        with blas.one_thread(), blas.one_thread():
            assert get() == 1
        assert get() == 2
    finally:
        put(before)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_rank_agrees_with_numpy(
    rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    rank = min(rank, rows, columns)
    values = gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1)
    matrix = stored(values, dtype)
    if not (as_stored(matrix) != 0).any() or not np.isfinite(as_stored(matrix)).all():
        return
    found = spectral(matrix, full_spectrum=True)
    exact = np.linalg.svd(as_stored(matrix), compute_uv=False)
    assert found["spectrum"] == pytest.approx(exact, rel=2e-4, abs=1e-14 * exact[0])
    assert found["total_rank"] == (exact > found["rank_tolerance"]).sum()
    assert found["condition_number_at_least"] <= found["condition_number"] * (1 + 1e-9)
    named = "condition_number" in found["unresolved"]
    assert named == (0 < found["s_min"] < found["resolution"])
