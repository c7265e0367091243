"""Sparsity, norms and the contract of all measures, against numpy in float64."""

from __future__ import annotations

import gc
import math
import weakref
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
    gaussian,
    norms_oracle,
    sparsity_oracle,
    stored,
)

from tensortap import native
from tensortap_analysis.weights import METHODS, Options
from tensortap_analysis.weights.measures import measure


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        with mock.patch.object(native, "library", return_value=None):
            yield request.param
    elif native.library() is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    else:
        yield request.param


def sparsity(matrix: torch.Tensor) -> dict[str, Any]:
    return measure(matrix, matrix.dtype, ["sparsity"], Options())["sparsity"]


def norms(matrix: torch.Tensor) -> dict[str, Any]:
    return measure(matrix, matrix.dtype, ["norms"], Options())["norms"]


def planted() -> Doubles:
    """Dead rows 4 and 9, dead columns 0 and 6, row 12 equal to 3, rows 15 and 20 to 1."""
    values = gaussian(30, 25)
    values[[4, 9]] = 0
    values[:, [0, 6]] = 0
    values[12], values[15], values[20] = values[3], values[1], values[1]
    return values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dead_and_duplicated_rows_are_counted_and_named(dtype: torch.dtype) -> None:
    matrix = stored(planted(), dtype)
    found, expected = sparsity(matrix), sparsity_oracle(as_stored(matrix))
    assert {name: found[name] for name in expected} == expected
    assert found["dead_rows_at"] == [4, 9]
    assert found["dead_columns_at"] == [0, 6]
    assert found["duplicated_rows_at"] == [[12, 3], [15, 1], [20, 1]]
    assert found["zero_fraction"] == found["zeros"] / 750
    assert found["unresolved"] == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_rows_are_found_whatever_their_length_and_wherever_they_lie(
    dtype: torch.dtype,
) -> None:
    for width in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 2047, 2049):
        values = gaussian(7, width)
        values[[2, 4, 6]] = values[1] + 1
        somewhere = torch.empty(7 * width + 3, dtype=dtype)[3:].view(7, width)
        somewhere.copy_(stored(values, dtype))
        found = sparsity(somewhere)["duplicated_rows_at"]
        assert {(4, 2), (6, 2)} <= {tuple(pair) for pair in found}


def test_rows_that_differ_in_the_sign_of_zero_are_equal() -> None:
    matrix = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [-0.0, -0.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = sparsity(matrix.to(dtype))
        assert found["duplicated_rows_at"] == [[1, 0]]
        assert found["dead_rows_at"] == [2]


def test_rows_that_only_share_a_hash_are_not_duplicates() -> None:
    """With one column a hash is a multiple of the bits; equal ones are made by hand instead."""
    matrix = stored(gaussian(6, 4), torch.float32)
    matrix[4] = matrix[2]
    from tensortap_analysis.weights.measures.facts import Facts
    from tensortap_analysis.weights.measures.sparsity import duplicates

    facts = Facts(matrix, matrix.dtype)
    facts.rows.rows["hash"] = 7
    assert duplicates(facts).tolist() == [[4, 2]]


def test_many_equal_rows_are_found_in_pieces() -> None:
    matrix = torch.ones(3000, 700, dtype=torch.bfloat16)
    matrix[1500:] = 2
    found = sparsity(matrix)
    assert found["duplicated_rows"] == 2998
    assert found["duplicated_rows_at"][:2] == [[1, 0], [2, 0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(60, 50), (1, 90), (90, 1), (2, 70_000)], ids=str)
def test_norms_are_what_numpy_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = stored(gaussian(*shape), dtype)
    found, expected = norms(matrix), norms_oracle(as_stored(matrix))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert found["unresolved"] == {}


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_norms_of_rows_do_not_overflow(scale: float) -> None:
    values = gaussian(20, 30)
    found = norms(stored(values * scale, torch.float64))
    assert found["row_norm_max"] == pytest.approx(norms_oracle(values)["row_norm_max"] * scale)
    assert found["l2"] == pytest.approx(norms_oracle(values)["l2"] * scale)
    assert found["row_norm_spread"] == pytest.approx(norms_oracle(values)["row_norm_spread"])


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_what_is_not_finite_is_counted_and_left_out(dtype: torch.dtype) -> None:
    values = gaussian(10, 12)
    values[2, 3], values[2, 4], values[5, 5], values[5, 6] = math.nan, math.inf, -math.inf, math.nan
    matrix = stored(values, dtype)
    found = norms(matrix)
    assert (found["nan"], found["inf"]) == (2, 2)
    left = as_stored(matrix)
    left[~np.isfinite(left)] = 0
    assert found["l2"] == pytest.approx(np.linalg.norm(left))
    assert found["row_norm_max"] == pytest.approx(np.linalg.norm(left, axis=1).max())
    assert sparsity(matrix)["dead_rows"] == 0


def test_a_matrix_of_nan_alone_has_no_norm_and_no_equal_rows() -> None:
    matrix = torch.full((2000, 8), math.nan, dtype=torch.bfloat16)
    found = norms(matrix)
    assert (found["nan"], found["l2"]) == (16_000, None)
    assert found["unresolved"]["l2"] == "not finite: 16,000 NaN"
    counted = sparsity(matrix)
    assert (counted["duplicated_rows"], counted["dead_rows"], counted["zeros"]) == (0, 0, 0)


def test_zeros_are_dead_everywhere_and_have_no_spread() -> None:
    matrix = torch.zeros(5, 3, dtype=torch.float16)
    counted, lengths = sparsity(matrix), norms(matrix)
    assert (counted["dead_rows"], counted["dead_columns"], counted["duplicated_rows"]) == (5, 3, 0)
    assert counted["near_zeros"] == counted["zeros"] == 15
    assert (lengths["l2"], lengths["row_norm_max"]) == (0, 0)
    assert lengths["unresolved"] == {"row_norm_spread": "all values are 0"}


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_a_matrix_without_elements_counts_nothing(shape: tuple[int, int]) -> None:
    counted, lengths = sparsity(torch.zeros(shape)), norms(torch.zeros(shape))
    assert (counted["zeros"], counted["dead_rows"], counted["dead_columns"]) == (0, 0, 0)
    assert counted["unresolved"]["zero_fraction"] == "no element"
    assert lengths["l2"] is None
    assert lengths["unresolved"]["l2"] == "no element"


def plain(value: Any) -> bool:
    """Only what JSON has, and infinities; NaN says nothing."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or (type(value) in (int, float, bool, str) and value == value)


MATRICES = {
    "random": gaussian(20, 30),
    "planted": planted(),
    "zero": np.zeros((3, 4)),
    "constant": np.full((3, 4), 0.25),
    "not finite": np.array([[1, math.nan], [math.inf, 2]]),
    "all NaN": np.full((2, 2), math.nan),
    "empty": np.zeros((0, 3)),
    "no columns": np.zeros((3, 0)),
    "one": np.ones((1, 1)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_answers_are_plain_values_and_what_is_missing_has_a_reason(
    name: str, dtype: torch.dtype
) -> None:
    matrix = stored(MATRICES[name], dtype)
    answer = measure(matrix, dtype, METHODS, Options(full_spectrum=True))
    assert tuple(answer) == METHODS
    assert plain(answer)
    for found in answer.values():
        missing = {metric for metric, value in found.items() if value is None}
        assert missing <= set(found["unresolved"])
    assert answer == measure(matrix, dtype, METHODS, Options(full_spectrum=True))


def test_the_matrix_is_not_changed_and_need_not_be_contiguous() -> None:
    matrix = stored(planted(), torch.bfloat16)
    before, turned = matrix.clone(), matrix.T.contiguous().T
    assert measure(turned, matrix.dtype, METHODS, Options()) == measure(
        matrix, matrix.dtype, METHODS, Options()
    )
    assert torch.equal(matrix, before)


ELEMENTS = st.floats(-300, 300, width=16) | st.sampled_from([0.0, -0.0, 1.0])


@settings(max_examples=120)
@given(
    array=arrays.arrays(
        np.float64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=ELEMENTS
    ),
    copies=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=3),
    dtype=st.sampled_from(FLOATS),
)
def test_any_matrix_agrees_with_numpy(
    array: Doubles, copies: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    for to, of in copies:
        array[to % len(array)] = array[of % len(array)]
    matrix = stored(array, dtype)
    values = as_stored(matrix)
    expected = sparsity_oracle(values)
    # A single value's magnitude is its root mean square, and never 1e-3 of it; others may tie.
    near, threshold = expected.pop("near_zeros"), 1e-3 * np.sqrt((values**2).mean())
    ties = int(np.isclose(np.abs(values), threshold, rtol=1e-12, atol=0).sum())
    found = sparsity(matrix)
    assert {name: found[name] for name in expected} == expected
    assert abs(found["near_zeros"] - near) <= ties
    if values.any():
        lengths, known = norms(matrix), norms_oracle(values)
        assert {name: lengths[name] for name in known} == pytest.approx(known, rel=1e-7, abs=1e-12)


def test_norms_beyond_float64_are_unresolved() -> None:
    matrix = stored(np.random.default_rng(0).uniform(0.5, 1, (40, 30)) * 1.7e308, torch.float64)
    found = measure(matrix, torch.float64, ["norms", "spectral"], Options())
    beyond = {"l1", "l2", "row_norm_min", "row_norm_max", "row_norm_mean", "row_norm_median"}
    assert set(found["norms"]["unresolved"]) == beyond
    assert set(found["spectral"]["unresolved"]) >= {"s_max", "spectral_norm"}
    assert set(found["spectral"]["unresolved"].values()) == {"larger than any number of float64"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_is_let_go_when_it_is_measured(dtype: torch.dtype) -> None:
    matrix = stored(gaussian(20, 30), dtype)
    left = weakref.ref(matrix)
    gc.collect()
    gc.disable()
    try:
        measure(matrix, dtype, METHODS, Options())
        del matrix
        assert left() is None
    finally:
        gc.enable()
