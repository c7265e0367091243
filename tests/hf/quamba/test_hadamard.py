"""Hadamard matrices: orthogonal, of the documented construction, and fast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensortap.errors import NotSupported
from tensortap_hf.quamba import hadamard

SIZES = (1, 2, 12, 24, 40, 48, 64, 80, 128, 160, 768, 1536, 2560)

# Sloane's had.12, the table that fast-hadamard-transform generates its kernel from.
H12 = """
+-++++++++++
--+-+-+-+-+-
+++-++----++
+---+--+-++-
+++++-++----
+-+---+--+-+
++--+++-++--
+--++---+--+
++----+++-++
+--+-++---+-
++++----+++-
+-+--+-++---
"""


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("size", SIZES)
def test_a_matrix_is_orthogonal_with_entries_of_one_magnitude(size: int) -> None:
    h = array(hadamard.matrix(size))
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(h), 1 / np.sqrt(size), rtol=1e-12)


def test_powers_of_two_are_sylvesters() -> None:
    expected = [[(-1) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]
    np.testing.assert_allclose(array(hadamard.matrix(128)) * np.sqrt(128), expected, rtol=1e-12)


def test_the_base_of_twelve_is_that_of_the_kernel() -> None:
    signs = [[1 if sign == "+" else -1 for sign in row] for row in H12.split()]
    np.testing.assert_allclose(array(hadamard.matrix(12)) * np.sqrt(12), signs, rtol=1e-12)


def test_the_base_of_forty_doubles_paleys_of_twenty() -> None:
    """Row 0 of Paley's is + and nineteen -, column 0 is all +, and the rest is circulant."""
    h = np.round(array(hadamard.matrix(40)).T * np.sqrt(40))
    paley = h[:20, :20]
    np.testing.assert_array_equal(h, np.block([[paley, paley], [paley, -paley]]))
    np.testing.assert_array_equal(paley[0], [1] + [-1] * 19)
    np.testing.assert_array_equal(paley[1:, 0], 1)
    first = "".join("+" if entry > 0 else "-" for entry in paley[1])
    assert first == "++-++----+-+-++++--+"
    for row in range(2, 20):
        np.testing.assert_array_equal(paley[row, 1:], np.roll(paley[1, 1:], row - 1))


@pytest.mark.parametrize("size", [24, 80, 768])
def test_larger_sizes_are_the_base_times_sylvesters(size: int) -> None:
    base = 12 if size % 12 == 0 else 40
    expected = np.kron(array(hadamard.matrix(base)), array(hadamard.matrix(size // base)))
    np.testing.assert_allclose(array(hadamard.matrix(size)), expected, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_transform_is_the_product_with_the_matrix(size: int) -> None:
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = array(hadamard.matrix(size))
    np.testing.assert_allclose(array(hadamard.transform(x)), array(x) @ h, atol=1e-12)
    np.testing.assert_allclose(array(hadamard.inverse(x)), array(x) @ h.T, atol=1e-12)


def test_half_precision_is_transformed_in_float32() -> None:
    x = torch.randn(4, 768).half()
    turned = hadamard.transform(x)
    assert turned.dtype == torch.float32
    expected = array(x) @ array(hadamard.matrix(768))
    np.testing.assert_allclose(array(turned), expected, atol=1e-5)


@pytest.mark.parametrize("size", [0, 3, 20, 36, 100, 6])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(NotSupported, match=f"not of {size}"):
        hadamard.transform(torch.zeros(2, size))
