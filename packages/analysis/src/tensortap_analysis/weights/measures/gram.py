"""Singular values of a matrix of any length in bounded memory: Gram matrix, or QR, by blocks.

The eigenvalues of the Gram matrix of the shorter side are the squares of the singular values, at a
fraction of the cost of a decomposition. In float64 they are right to about sqrt(side) * 2e-16 of
the largest one (measured over shapes and spectra), so singular values below some 1e-5 of the
largest are lost in that; where there are such, the triangular factor of a QR decomposition is
decomposed instead, which keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tensortap_analysis.weights.measures.blas import Doubles, add_gram, eigenvalues

_BYTES, _FEWEST = 1 << 21, 256
"""Of a block in float64, and the rows it has at least: products of fewer are slow."""
_TRUSTED = 1e-4
"""The relative error of a singular value that is taken from the Gram matrix."""
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values, descending, one for each index of the shorter side, times `unit`.

    `short` and `long` are the largest squared norms of the vectors along each side: of a tall
    matrix its columns, then its rows. `dead` singular values are 0 because vectors are. `error` is
    how far the squares of the values may be off.
    """

    values: Doubles
    short: float
    long: float
    dead: int
    error: float


def spectrum(matrix: torch.Tensor, unit: float) -> Spectrum:
    """All singular values of a finite matrix, times `unit`; one element at least is not 0."""
    gram, along = _gram(matrix, unit)
    squares = gram.diagonal().copy()
    alive = np.flatnonzero(squares > 0)
    rank = min(len(alive), int((along > 0).sum()))
    if len(alive) < len(squares):
        gram = gram[np.ix_(alive, alive)]
    found = eigenvalues(gram)[::-1][:rank]
    del gram
    error = 2 * math.sqrt(len(alive)) * _EPS * float(found[0])
    values = np.zeros(len(squares))
    # To first order a square root is off by half of what its square is.
    if error / 2 > _TRUSTED * found[-1]:
        values[:rank], error = _by_qr(matrix, unit, alive)[:rank], 0.0
    else:
        values[:rank] = np.sqrt(found)
    dead = len(squares) - rank
    return Spectrum(values, float(squares.max()), float(along.max()), dead, error)


def _blocks(matrix: torch.Tensor, unit: float) -> Iterator[Doubles]:
    """[some of the longer side, shorter side] in float64, times `unit`."""
    height, width = matrix.shape
    tall = height >= width
    some = max(_FEWEST, _BYTES // (8 * min(height, width)))
    for piece in torch.split(matrix, some, dim=0 if tall else 1):
        wide = piece.to(torch.float64)
        block: Doubles = (wide if unit == 1.0 else wide * unit).numpy()
        yield block if tall else block.T


def _gram(matrix: torch.Tensor, unit: float) -> tuple[Doubles, Doubles]:
    """The Gram matrix of the shorter side, which is right on and below its diagonal only, and the
    squared norms along the longer side.
    """
    total, along = np.zeros((min(matrix.shape),) * 2), []
    for block in _blocks(matrix, unit):
        add_gram(total, block)
        along.append(_squares(block))
    return total, np.concatenate(along)


def _squares(block: Doubles) -> Doubles:
    found: Doubles = np.einsum("ij,ij->i", block, block)
    return found


def _by_qr(matrix: torch.Tensor, unit: float, alive: npt.NDArray[np.intp]) -> Doubles:
    """Singular values of the columns (of a wide matrix, rows) `alive`, by QR of block on block."""
    side, held = len(alive), 0
    stack = torch.empty(0, side, dtype=torch.float64)
    for block in _blocks(matrix, unit):
        rows = len(block)
        if len(stack) < side + rows:
            # The triangular factor, or as many rows, and a block below: one buffer for all.
            stack = torch.empty(side + rows, side, dtype=torch.float64)
        stack[held : held + rows] = torch.from_numpy(
            block if side == block.shape[1] else block[:, alive]
        )
        held += rows
        if held > side:
            stack[:side] = torch.linalg.qr(stack[:held], mode="r").R
            held = side
    values: Doubles = torch.linalg.svdvals(stack[:held]).numpy()
    return values
