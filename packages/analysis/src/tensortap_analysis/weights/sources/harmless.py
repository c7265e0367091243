"""What training scripts save beside weights and torch's restricted unpickler does not know.

None of it runs code of its own when it is rebuilt: options, words of enumerations, and the numpy
arrays that a random generator's state is kept in.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

_WORDS = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.LayerType",
)
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


class Word:
    """Stands for a member of an enumeration that is not imported; keeps nothing."""

    def __init__(self, *value: object) -> None:
        pass


def harmless() -> AbstractContextManager[object]:
    """Allow these, and nothing else, while a file is read; older torch reads tensors only."""
    allow: Any = getattr(torch.serialization, "safe_globals", None)
    if allow is None or not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return nullcontext()  # before torch 2.6
    rebuild = getattr(np, "_core", None) or np.core
    arrays = [(rebuild.multiarray._reconstruct, name) for name in _ARRAYS]
    dtypes = [type(np.dtype(word)) for word in ("uint32", "uint64", "int64", "float64")]
    words = [(Word, name) for name in _WORDS]
    return allow([argparse.Namespace, np.ndarray, np.dtype, *dtypes, *arrays, *words])  # type: ignore[no-any-return]
