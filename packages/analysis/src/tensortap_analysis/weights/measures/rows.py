"""What is known of a matrix row by row, from one pass: norms, int8 errors, hashes, zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap import native
from tensortap.formats import get
from tensortap.native.surveying import ROW
from tensortap_analysis.weights.measures.codes import Codes
from tensortap_analysis.weights.measures.pieces import cut, floats

_SEED = 0x7E27
_LARGER = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """`rows`: `native.surveying.ROW` of each row; `live`: whether a column holds not only zeros."""

    rows: npt.NDArray[np.void]
    live: npt.NDArray[np.bool_]

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """Whether a row holds only zeros."""
        found: npt.NDArray[np.bool_] = (self.rows["largest"] == 0) & (self.rows["odd"] == 0)
        return found

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """The l2 norm of each row's finite values, in the unit of the survey."""
        lengths: npt.NDArray[np.float64] = np.sqrt(self.rows["squares"])
        return lengths


def rows(matrix: torch.Tensor, unit: float, codes: Codes | None = None) -> Rows:
    """The survey of a contiguous 2-d matrix; sums are of values times `unit`.

    Its codes are counted in `codes` on the way, while a piece is in the cache.
    """
    height, width = matrix.shape
    out = np.zeros(height, ROW)
    wide = floats(matrix[:0]).dtype is torch.float64
    live = np.zeros(width, np.int64 if wide else np.int32)
    keys = np.random.default_rng(_SEED).uniform(1, 2, width)
    kernel = native.library()
    start = 0
    for piece in cut(matrix, _LARGER) if kernel is None or codes is not None else [matrix]:
        values, part = floats(piece), out[start : start + len(piece)]
        if codes is not None:
            codes.add(piece)
        if kernel is None:
            _survey(values, unit, keys, live, part)
        else:
            kernel.surveying.rows(values, unit, keys, live, part)
        start += len(piece)
    return Rows(out, live != 0)


def _survey(
    values: torch.Tensor,
    unit: float,
    keys: npt.NDArray[np.float64],
    live: npt.NDArray[Any],
    out: npt.NDArray[np.void],
) -> None:
    """The same by torch and numpy, where nothing is compiled."""
    wide = values if values.dtype is torch.float64 else values.to(torch.float32)
    finite = wide.isfinite()
    kept = wide.masked_fill(~finite, 0)
    scaled = kept.to(torch.float64) * unit
    out["squares"] = scaled.square().sum(1).numpy()
    out["largest"] = kept.abs().amax(1).numpy() if wide.shape[1] else 0.0
    out["odd"] = (~finite).sum(1).numpy()
    error = kept.to(torch.float64) - get("int8", scale="channel").fake_quantize(kept)
    noise = (error * unit).square().sum(1).numpy()
    out["noise"] = np.where(out["odd"], 0.0, noise)
    live |= (wide != 0).any(0).numpy()
    # Not a matrix product: that may add up rows at its end in another order than the others.
    out["hash"] = (scaled * torch.from_numpy(keys)).sum(1).numpy()
