"""How many threads numpy's linear algebra uses while weights are measured: one.

The scan measures several matrices at once; numpy's OpenBLAS would share each of them among all
cores as well, and add numbers up in an order that depends on how many there are.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

_PREFIXES, _SUFFIXES = ("scipy_openblas", "openblas"), ("64_", "_64", "")
_Threads = tuple[Callable[[], int], Callable[[int], None]]


class _Users:
    """Measures that run now, and how many threads there were before the first of them."""

    lock = threading.Lock()
    count = 0
    before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenBLAS works on the calling thread only until the last one has left.

    Another BLAS (Accelerate, MKL) is left as it is.
    """
    found = _openblas()
    if found is None:
        yield
        return
    get, put = found
    with _Users.lock:
        if _Users.count == 0:
            _Users.before = get()
            put(1)
        _Users.count += 1
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if _Users.count == 0:
                put(_Users.before)


@lru_cache(maxsize=1)
def _openblas() -> _Threads | None:
    """Functions to get and set the number of threads of the OpenBLAS in numpy's wheel."""
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    for path in (path for folder in folders for path in sorted(folder.glob("*openblas*"))):
        # The name of a library that is loaded already: the same one, not a second.
        library = ctypes.CDLL(str(path))
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    put.restype = None
                    return get, put
    return None
