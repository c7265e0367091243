"""numpy's own OpenBLAS, called directly: on one thread, and in place.

The scan measures several matrices at once; numpy would share each of them among all cores as well,
and add numbers up in an order that depends on how many there are. It also copies what it could
overwrite: a Gram matrix is four times as large as a square matrix of 16 bits. Where numpy has
another BLAS (Accelerate, MKL), its functions do the same with those copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tensortap_analysis.weights.threads import OneThread

Doubles = npt.NDArray[np.float64]

_PREFIXES, _SUFFIXES = ("scipy_", ""), ("64_", "_64", "")
_ROWS, _COLUMNS, _LOWER, _AS_IS, _TURNED = 101, 102, 122, 111, 112
"""CBLAS and LAPACKE's names of orders and sides."""
_PANEL, _PANELS = 1 << 25, 8
_WIDTH = 64
"""Columns that LAPACK reduces together, where it has room for them."""


@dataclass(frozen=True)
class _OpenBlas:
    """Functions of the library that numpy has loaded; `None` where its integers have 32 bits."""

    threads: OneThread
    syrk: Callable[..., None] | None
    syevd: Callable[..., int] | None


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenBLAS works on the calling thread only until the last one has left."""
    found = openblas()
    with nullcontext() if found is None else found.threads.used():
        yield


def add_gram(total: Doubles, block: Doubles) -> None:
    """Add `block.T @ block` to `total` on and below the diagonal at least."""
    found = openblas()
    if found is not None and found.syrk is not None:
        _add_in_place(found.syrk, total, block)
    else:
        _add_in_panels(total, block)


def _add_in_place(syrk: Callable[..., None], total: Doubles, block: Doubles) -> None:
    turned = block.strides[1] != block.itemsize
    lying = np.ascontiguousarray(block.T if turned else block)
    syrk(
        _ROWS, _LOWER, _AS_IS if turned else _TURNED, len(total), len(block), 1.0,
        lying.ctypes.data, lying.shape[1], 1.0, total.ctypes.data, len(total),
    )  # fmt: skip


def _add_in_panels(total: Doubles, block: Doubles) -> None:
    """In panels where the whole product, which takes as much memory as `total`, is large."""
    side = len(total)
    width = side if total.nbytes <= _PANEL else -(-side // _PANELS)
    for start in range(0, side, width):
        stop = min(start + width, side)
        total[start:, start:stop] += block[:, start:].T @ block[:, start:stop]


def eigenvalues(gram: Doubles) -> Doubles:
    """Of a contiguous symmetric matrix, ascending; only what is on and below its diagonal counts.

    The matrix is overwritten. Raises `LinAlgError` where they are not found.
    """
    found = openblas()
    if found is None or found.syevd is None:
        return np.linalg.eigvalsh(gram).astype(np.float64, copy=False)
    side, values = len(gram), np.empty(len(gram))
    work, whole = np.empty((2 + _WIDTH) * side + 1), np.empty(1, np.int64)
    # Rows are columns here, so that what is below the diagonal is above it.
    if found.syevd(
        _COLUMNS, b"N", b"U", side, gram.ctypes.data, side, values.ctypes.data,
        work.ctypes.data, len(work), whole.ctypes.data, len(whole),
    ):  # fmt: skip
        raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return values


@lru_cache(maxsize=1)
def openblas() -> _OpenBlas | None:
    """The OpenBLAS in numpy's wheel; `None` for another BLAS."""
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    for path in (path for folder in folders for path in sorted(folder.glob("*openblas*"))):
        # The name of a library that is loaded already: the same one, not a second.
        library = ctypes.CDLL(str(path))
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                if hasattr(library, f"{prefix}openblas_get_num_threads{suffix}"):
                    return _functions(library, prefix, suffix)
    return None


def _functions(library: Any, prefix: str, suffix: str) -> _OpenBlas:
    def function(name: str, *types: Any, result: Any = None) -> Any:
        found = getattr(library, f"{prefix}{name}{suffix}", None)
        if found is not None:
            found.argtypes, found.restype = types, result
        return found

    threads = OneThread(
        function("openblas_get_num_threads", result=ctypes.c_int),
        function("openblas_set_num_threads", ctypes.c_int),
    )
    if "64" not in suffix:
        return _OpenBlas(threads, None, None)
    number, real, place, word = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int
    syrk = function(
        "cblas_dsyrk", word, word, word, number, number, real, place, number, real, place, number
    )
    syevd = function(
        "LAPACKE_dsyevd_work", word, ctypes.c_char, ctypes.c_char, number, place, number, place,
        place, number, place, number, result=number,
    )  # fmt: skip
    return _OpenBlas(threads, syrk, syevd)
