"""How many threads numpy's linear algebra uses while weights are measured: one.

The scan measures several matrices at once; numpy's OpenBLAS would share each of them among all
cores as well, and add numbers up in an order that depends on how many there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np

from tensortap_analysis.weights.threads import OneThread

_PREFIXES, _SUFFIXES = ("scipy_openblas", "openblas"), ("64_", "_64", "")


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenBLAS works on the calling thread only until the last one has left.

    Another BLAS (Accelerate, MKL) is left as it is.
    """
    found = _openblas()
    with nullcontext() if found is None else found.used():
        yield


@lru_cache(maxsize=1)
def _openblas() -> OneThread | None:
    """The number of threads of the OpenBLAS in numpy's wheel; `None` for another BLAS."""
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
                    return OneThread(get, put)
    return None
