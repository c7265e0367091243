"""The values that a picture shows: all of a small tensor, evenly strided ones of a big one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tensortap.errors import NotSupported
from tensortap.store.logical import LogicalTensor
from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.measuring.boxes import boxes
from tensortap_analysis.plots.style import Floats

_BOX = 1 << 22
_FAR = 1e150
"""Magnitudes beyond are drawn here: their squares are no float64, and matplotlib needs squares."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Every `every`-th of `count` values in logical order; `finite` leaves NaN and Inf out."""

    values: Floats
    count: int
    every: int

    @property
    def finite(self) -> Floats:
        return self.values[np.isfinite(self.values)]

    @property
    def note(self) -> str:
        """What is shown of the tensor, for the foot of a picture."""
        if self.every == 1:
            return f"all {self.count:,} values{_cut(self.values)}"
        shown = f"{self.values.size:,} of {self.count:,} values: every {ordinal(self.every)}"
        return shown + _cut(self.values)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A tensor as rows (its leading axes) and columns (its last): every `every`-th row.

    Where there are too many columns, each shown one is the value of largest magnitude of `pooled`.
    """

    values: Floats
    shape: tuple[int, int]
    every: int
    pooled: int

    @property
    def note(self) -> str:
        rows = f"every {ordinal(self.every)} of {self.shape[0]:,} rows" if self.every > 1 else ""
        columns = (
            f"each column the largest magnitude of {self.pooled} of {self.shape[1]:,}"
            if self.pooled > 1
            else ""
        )
        words = "; ".join(part for part in (rows, columns) if part) or "all values"
        return words + _cut(self.values)


def sample(tensor: Captured, limit: int) -> Sample:
    """At most about `limit` values, evenly strided; raises `RunError` or `NotSupported`."""
    if tensor.values == "sample":
        return _of_sample(tensor, limit)
    logical = tensor.open()
    count = math.prod(logical.shape)
    every = max(1, -(-count // limit))
    found, at = [], 0
    for box in boxes(logical.shape, _BOX) if count else ():
        flat = numbers(logical.read(box)).reshape(-1)
        found.append(wide(flat[-at % every :: every]))
        at += flat.numel()
    return Sample(np.concatenate(found) if found else np.empty(0), count, every)


def _of_sample(tensor: Captured, limit: int) -> Sample:
    """Of the first sampled piece, whose stored sample is strided once more."""
    if tensor.part is not None:
        raise NotSupported("a sample of a fused tensor does not tell its parts")
    record = next(record for record in tensor.records() if record.values == "sample")
    stored = numbers(tensor.run.sample(record)).reshape(-1)
    more = max(1, -(-stored.numel() // limit))
    return Sample(wide(stored[::more]), math.prod(record.shape), record.stride * more)


def sheet(logical: LogicalTensor, rows: int = 400, columns: int = 600) -> Sheet:
    """The tensor as an image of at most so many rows and columns."""
    shape = logical.shape or (1,)
    height, width = math.prod(shape[:-1]), shape[-1]
    every, pooled = max(1, -(-height // rows)), max(1, -(-width // columns))
    found, at = [], 0
    for box in boxes(logical.shape, _BOX, keep=len(shape) - 1) if height * width else ():
        part = numbers(logical.read(box)).reshape(-1, width)
        found.append(_pooled(wide(part[-at % every :: every]), pooled))
        at += part.shape[0]
    values = np.concatenate(found) if found else np.zeros((0, 0))
    return Sheet(values, (height, width), every, pooled)


def image_of(tensor: torch.Tensor, rows: int = 400) -> Sheet:
    """A tensor in memory as an image of at most so many rows, and all its columns."""
    flat = numbers(tensor).reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    every = max(1, -(-flat.shape[0] // rows))
    return Sheet(wide(flat[::every]), (flat.shape[0], flat.shape[1]), every, 1)


def _pooled(values: Floats, by: int) -> Floats:
    """Of each `by` columns the value of largest magnitude; a NaN counts as the largest."""
    if by == 1:
        return values
    missing = -values.shape[1] % by
    wide = np.pad(values, ((0, 0), (0, missing))).reshape(
        len(values), (values.shape[1] + missing) // by, by
    )
    sizes = np.where(np.isnan(wide), np.inf, np.abs(wide))
    picked = np.take_along_axis(wide, sizes.argmax(2)[..., None], 2)
    result: Floats = picked[..., 0]
    return result


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the magnitudes of complex values; raises `NotSupported`."""
    if "x2" in str(tensor.dtype):
        raise NotSupported(f"{tensor.dtype} holds two values in a byte, which are not drawn.")
    return tensor.abs() if tensor.is_complex() else tensor


def wide(tensor: torch.Tensor) -> Floats:
    """The values as they are drawn; infinities stay."""
    values: Floats = tensor.to(torch.float64).numpy()
    return np.where(np.isfinite(values), values.clip(-_FAR, _FAR), values)


def _cut(values: Floats) -> str:
    far = bool((np.abs(values) == _FAR).any())
    return f"; magnitudes beyond {_FAR:g} drawn as {_FAR:g}" if far else ""


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `13th`, `1,024th`."""
    tens = number % 100
    ending = "th" if 10 < tens < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"
