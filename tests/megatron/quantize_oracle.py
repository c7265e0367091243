"""Number formats and their products in numpy, float64, written without looking at the codecs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def on_grid(x: Array, format: str, axis: int) -> Array:
    """`x` with its values on the grid of a format, blocks along `axis`."""
    if format == "hifp8":
        return _hifp8(x)
    if format.startswith("int8"):
        scale = np.abs(x).max(axis if format == "int8 channel" else None, keepdims=True) / 127
        return np.clip(np.round(x / scale), -127, 127) * scale
    mantissa, least, emax, largest = {
        "mxfp8": (3, -6, 8, 448.0),
        "mxfp4": (1, 0, 2, 6.0),
    }[format]
    moved = np.moveaxis(x, axis, -1)
    length = moved.shape[-1]
    padded = np.pad(moved, [(0, 0)] * (x.ndim - 1) + [(0, -length % 32)])
    blocks = padded.reshape(*padded.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = np.exp2(_exponent(np.where(amax == 0, 1.0, amax)) - emax)
    scaled = blocks / scale
    unit = np.exp2(np.maximum(_exponent(np.where(scaled == 0, 1.0, scaled)), least) - mantissa)
    rounded = np.clip(np.round(scaled / unit) * unit, -largest, largest) * scale
    return np.moveaxis(rounded.reshape(padded.shape)[..., :length], -1, axis)


def _hifp8(x: Array) -> Array:
    size = np.abs(x)
    exponent = _exponent(np.where(size == 0, 1.0, size))
    bits = 3 - (np.abs(exponent) > 3) - (np.abs(exponent) > 7) - (np.abs(exponent) > 15)
    unit = np.exp2(exponent - bits)
    rounded = np.minimum(np.floor(size / unit + 0.5) * unit, 2.0**15)
    rounded = np.maximum(rounded, 2.0**-22)
    return np.sign(x) * np.where(size < 2.0**-23, 0.0, rounded)


def _exponent(x: Array) -> Array:
    return np.floor(np.log2(np.abs(x)))


def product(a: Array, b: Array, format: str) -> Array:
    """A B over the last axis of A and the second to last of B, both quantised along them."""
    return on_grid(a, format, -1) @ on_grid(b, format, -2)
