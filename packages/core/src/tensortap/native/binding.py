"""`Library`: the compiled kernel behind ctypes; the other side of `stats.c`."""

from __future__ import annotations

import ctypes
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensortap.native.build import digest
from tensortap.native.comparing import Comparing
from tensortap.native.rounding import Rounding
from tensortap.native.surveying import Surveying
from tensortap.records import Statistics

LEADING = 10
"""How many values `Statistics.first` holds; `LEADING` in stats.c."""
EXPONENT_MIN, EXPONENTS = -1074, 2098
"""Exponents of float64, from its smallest subnormal on; as in blocks.h."""

_RESULT = struct.Struct(f"5q8d{LEADING}d")
_BUFFER = ctypes.c_char * _RESULT.size
_NEGATE, _CONJUGATE = 1, 2
_LARGE, _SHARED = 1 << 17, 1 << 19
"""Elements. Below the first, a call takes some 20 microseconds and keeps the GIL: to get it back
from a busy thread can take 5 ms. From the second on it is worth waking torch's threads."""

_VALUE_KINDS = {
    torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int16: 4,
    torch.int32: 5, torch.int64: 6, torch.uint16: 7, torch.uint32: 8, torch.uint64: 9,
}  # fmt: skip
_COMPLEX = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_FP4 = 10
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTE_DTYPES = (
    "uint8", "int8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu",
)  # fmt: skip


class StaleLibrary(Exception):
    """The file was built from other sources than those beside it."""


class Library:
    """Compiled code of `path`: statistics, as `rounding` that of the number formats, as `comparing`
    that of pairs of tensors, and as `surveying` that of matrices of weights.

    Raises `OSError` or `StaleLibrary` if `path` is no use.
    """

    def __init__(self, path: Path) -> None:
        free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        _check_source(free, path)
        self.path = path
        self.threaded = _use_torch_threads(free)
        self._large, self._small = free.tensortap_statistics, held.tensortap_statistics
        for function in (self._large, self._small):
            function.restype = ctypes.c_int64
            function.argtypes = _ARGUMENTS
        self._kinds = _kinds(free)
        self.rounding = Rounding(path)
        self.comparing = Comparing(path)
        self.surveying = Surveying(path)
        os.register_at_fork(after_in_child=self._forget_threads)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether tensors of `dtype` can be reduced."""
        return dtype in self._kinds

    def statistics(self, tensor: torch.Tensor, *, exponents: bool) -> Statistics:
        """Reduce a strided CPU tensor of any layout where it lies."""
        kind, parts = self._kinds[tensor.dtype]
        count = tensor.numel() * parts
        axes, dims = (0, None) if tensor.is_contiguous() else _dims(tensor, parts)
        flags = _NEGATE * tensor.is_neg() + _CONJUGATE * tensor.is_conj()
        powers = np.zeros(EXPONENTS, np.int64) if exponents else None
        threads = torch.get_num_threads() if self.threaded and count >= _SHARED else 1
        out = _BUFFER()
        call = self._large if count > _LARGE else self._small
        failed = call(
            tensor.data_ptr(), kind, count, axes, dims, flags, threads, out,
            None if powers is None else powers.ctypes.data,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to reduce a tensor of {count} values")
        return _statistics(_RESULT.unpack(out), None if powers is None else _histogram(powers))

    def _forget_threads(self) -> None:
        """The threads of an OpenMP runtime do not survive a fork; asking for them hangs."""
        self.threaded = False


_ARGUMENTS: list[Any] = [
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
]  # fmt: skip


def _check_source(library: ctypes.CDLL, path: Path) -> None:
    library.tensortap_source.restype = ctypes.c_char_p
    found = library.tensortap_source().decode()
    if found != digest():
        raise StaleLibrary(f"{path} was built from other sources ({found})")


def _use_torch_threads(library: ctypes.CDLL) -> bool:
    """Run on the threads torch has, found through the library torch itself is linked to.

    A second OpenMP runtime or a pool of our own would compete with torch's threads, which spin
    for a while after each operation. False where torch was built without OpenMP.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return False
    library.tensortap_set_threads(ctypes.cast(start, ctypes.c_void_p))
    return True


def _kinds(library: ctypes.CDLL) -> dict[torch.dtype, tuple[int, int]]:
    """From dtype to (kind in C, values per element); also hands the tables of byte dtypes to C."""
    kinds = {dtype: (kind, 1) for dtype, kind in _VALUE_KINDS.items()}
    kinds |= {dtype: (_VALUE_KINDS[part], 2) for dtype, part in _COMPLEX.items()}
    known = [getattr(torch, name) for name in _BYTE_DTYPES if hasattr(torch, name)]
    for kind, dtype in enumerate(known, start=_FP4 + 1):
        _set_table(library, kind, _table(dtype))
        kinds[dtype] = (kind, 1)
    if hasattr(torch, "float4_e2m1fn_x2"):
        _set_table(library, _FP4, [*FP4_VALUES, *(-value for value in FP4_VALUES)])
        kinds[torch.float4_e2m1fn_x2] = (_FP4, 1)
    return kinds


def _table(dtype: torch.dtype) -> list[float]:
    """The values of all 256 codes, as torch reads them."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    if dtype is torch.bool:
        return [float(code != 0) for code in range(256)]
    values: list[float] = codes.view(dtype).to(torch.float64).tolist()
    return values


def _set_table(library: ctypes.CDLL, kind: int, values: list[float]) -> None:
    padded = values + [math.nan] * (256 - len(values))
    library.tensortap_set_table(ctypes.c_int64(kind), (ctypes.c_double * 256)(*padded))


def _dims(tensor: torch.Tensor, parts: int) -> tuple[int, Any]:
    """Sizes, then strides, as C takes them; a complex tensor has its parts as the last axis."""
    sizes, strides = tuple(tensor.shape), tensor.stride()
    if parts == 2:
        sizes, strides = (*sizes, 2), (*(2 * stride for stride in strides), 1)
    return len(sizes), (ctypes.c_int64 * (2 * len(sizes)))(*sizes, *strides)


def _histogram(powers: np.ndarray[Any, Any]) -> dict[int, int]:
    seen = np.flatnonzero(powers)
    return dict(zip((seen + EXPONENT_MIN).tolist(), powers[seen].tolist(), strict=True))


def _statistics(found: tuple[Any, ...], exponents: dict[int, int] | None) -> Statistics:
    count, nan, posinf, neginf, _ = found[:5]
    moments = (None,) * 8 if count == nan + posinf + neginf else found[5:13]
    first = found[13 : 13 + min(LEADING, count)]
    return Statistics(*(*found[:5], *moments, first, exponents))
