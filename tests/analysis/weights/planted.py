"""Matrices with known properties, and metrics computed the plain way in numpy's float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Doubles = npt.NDArray[np.float64]

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


def gaussian(rows: int, columns: int, seed: int = 0) -> Doubles:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def with_spectrum(rows: int, columns: int, values: npt.ArrayLike, seed: int = 0) -> Doubles:
    """A matrix in random directions whose singular values are these."""
    rng, values = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    side = len(values)
    left, _ = np.linalg.qr(rng.standard_normal((rows, side)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, side)))
    product: Doubles = (left * values) @ right.T
    return product


def stored(values: Doubles, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values).to(dtype)


def as_stored(matrix: torch.Tensor) -> Doubles:
    """The values a stored matrix has, in float64."""
    array: Doubles = matrix.to(torch.float64).numpy()
    return array


def spectral_oracle(values: Doubles) -> dict[str, Any]:
    s = np.linalg.svd(values, compute_uv=False)
    p = s / s.sum()
    energy = np.cumsum(s**2) / (s**2).sum()
    return {
        "s_max": s[0],
        "s_min": s[-1],
        "spectral_norm": np.linalg.norm(values, 2),
        "condition_number": s[0] / s[-1],
        "stable_rank": np.linalg.norm(values) ** 2 / s[0] ** 2,
        "effective_rank": np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()),
        "energy_rank_90": int((energy < 0.90).sum()) + 1,
        "energy_rank_99": int((energy < 0.99).sum()) + 1,
        "full_rank": min(values.shape),
    }


def distribution_oracle(values: Doubles) -> dict[str, Any]:
    apart = values - values.mean()
    size = np.abs(values)
    return {
        "extreme_outlier_percentage": 100 * (np.abs(apart) > 3 * values.std()).mean(),
        "dynamic_range": size.max() / size.mean(),
        "dynamic_range_rms": size.max() / np.sqrt((values**2).mean()),
        "kurtosis": (apart**4).mean() / values.var() ** 2,
    }


def sqnr_oracle(values: Doubles, rounded: Doubles) -> float:
    return 10 * np.log10((values**2).sum() / ((values - rounded) ** 2).sum())


def int8_oracle(values: Doubles, *, axis: int | None) -> Doubles:
    """Symmetric int8 with one scale, or one a row."""
    scale = np.abs(values).max(axis=axis, keepdims=True) / 127
    rounded: Doubles = np.rint(values / scale).clip(-127, 127) * scale
    return rounded


def sparsity_oracle(values: Doubles) -> dict[str, Any]:
    threshold = 1e-3 * np.sqrt((values**2).mean())
    alive = values[(values != 0).any(1)]
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "zeros": int((values == 0).sum()),
        "near_zeros": int((np.abs(values) <= threshold).sum()),
        "dead_rows": int((values == 0).all(1).sum()),
        "dead_columns": int((values == 0).all(0).sum()),
        # -0.0 and 0.0 are one value.
        "duplicated_rows": len(alive) - len(np.unique(alive + 0.0, axis=0)),
    }


def norms_oracle(values: Doubles) -> dict[str, Any]:
    rows = np.linalg.norm(values, axis=1)
    return {
        "l1": np.abs(values).sum(),
        "l2": np.linalg.norm(values),
        "max": np.abs(values).max(),
        "mean": values.mean(),
        "std": values.std(),
        "row_norm_min": rows.min(),
        "row_norm_max": rows.max(),
        "row_norm_mean": rows.mean(),
        "row_norm_median": np.median(rows),
        "row_norm_spread": rows.std() / rows.mean(),
        "nan": 0,
        "inf": 0,
    }
