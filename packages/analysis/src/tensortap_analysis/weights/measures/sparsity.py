"""What of a matrix is zero, nearly zero, dead or there twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap_analysis.weights.measures.facts import Facts
from tensortap_analysis.weights.options import Options

_SHOWN = 8
"""So many dead or duplicated rows are listed; all are counted."""
_COMPARED = 1 << 20


def sparsity(facts: Facts, options: Options) -> dict[str, Any]:
    """Counts and shares of zeros, and of rows and columns that carry nothing of their own.

    Near zero, zeros included, is |w| <= `near_zero_threshold`, which is 1e-3 of the root mean
    square. A dead row (an output) or column (an input) is all zeros. A duplicated row equals an
    earlier one value for value and is not dead; a row that is not finite equals none.
    """
    height, width = facts.matrix.shape
    count, zeros, near = facts.matrix.numel(), facts.statistics.zero, int(facts.elements.near_zero)
    dead = np.flatnonzero(facts.rows.dead)
    dead_columns = np.flatnonzero(~facts.rows.live)
    duplicated = duplicates(facts)
    reason = facts.empty
    shares = ("zero_fraction", "near_zero_fraction")
    return {
        "rows": height,
        "columns": width,
        "zeros": zeros,
        "near_zeros": near,
        "near_zero_threshold": facts.near_zero,
        "zero_fraction": zeros / count if count else None,
        "near_zero_fraction": near / count if count else None,
        "dead_rows": len(dead) if count else 0,
        "dead_columns": len(dead_columns) if count else 0,
        "duplicated_rows": len(duplicated),
        "dead_rows_at": dead[:_SHOWN].tolist() if count else [],
        "dead_columns_at": dead_columns[:_SHOWN].tolist() if count else [],
        "duplicated_rows_at": duplicated[:_SHOWN].tolist(),
        "unresolved": {} if reason is None else dict.fromkeys(shares, reason),
    }


def duplicates(facts: Facts) -> npt.NDArray[np.int64]:
    """Rows that equal an earlier one, and that one: [n, 2], ascending. Dead rows are left out."""
    survey = facts.rows.rows
    rows = np.flatnonzero(~facts.rows.dead & (survey["odd"] == 0))
    hashes = survey["hash"][rows].view(np.int64)
    # Stable: the first row of a group of equal hashes is the earliest.
    order = np.argsort(hashes, kind="stable")
    rows, hashes = rows[order], hashes[order]
    edges = np.flatnonzero(np.diff(hashes, prepend=hashes[:1] + 1, append=hashes[-1:] + 1))
    found = [np.empty((0, 2), np.int64)]
    for group in np.flatnonzero(np.diff(edges) > 1):
        found += _equal_rows(facts.matrix, rows[edges[group] : edges[group + 1]])
    pairs = np.concatenate(found)
    return pairs[np.argsort(pairs[:, 0])]


def _equal_rows(matrix: torch.Tensor, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The pairs among rows with one hash: different ones may share it, so groups are parted."""
    found = []
    while len(rows) > 1:
        first, rest = rows[0], rows[1:]
        same = _equal_to(matrix, int(first), rest)
        found.append(np.stack([rest[same], np.full(int(same.sum()), first)], axis=1))
        rows = rest[~same]
    return found


def _equal_to(
    matrix: torch.Tensor, first: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which rows equal the first; compared a few at a time, so that no large copy is made."""
    some = max(1, _COMPARED // matrix.shape[1])
    parts = [
        (_comparable(matrix[torch.from_numpy(rows[at : at + some])]) == _comparable(matrix[first]))
        .all(1)
        .numpy()
        for at in range(0, len(rows), some)
    ]
    return np.concatenate(parts)


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """PyTorch does not compare float8."""
    return values.float() if values.dtype.itemsize == 1 else values
