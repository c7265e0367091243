"""Tensors as numpy arrays and back: dtypes numpy has none of, and samples of several lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap.errors import ConfigError, RunError
from tensortap.names import TensorName
from tensortap.stats import statistics

Array = npt.NDArray[Any]

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


def array(tensor: torch.Tensor) -> Array:
    """The values as numpy holds them: bf16 and fp8 become float32, which has all of them."""
    plain = tensor.detach().cpu()
    try:
        found: Array = plain.numpy()
    except TypeError:
        found = plain.to(torch.float32).numpy()
    return found


def tensor(values: Array, dtype: object) -> torch.Tensor:
    """A tensor of the dtype it had (`"bfloat16"`), where that is known and loses nothing."""
    found = torch.from_numpy(np.ascontiguousarray(values))
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(wanted, torch.dtype) or wanted is found.dtype:
        return found
    narrow = found.to(wanted)
    exact = torch.equal(narrow.to(found.dtype).nan_to_num(), found.nan_to_num())
    return narrow if exact else found


def described(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, the first ten values, mean, std (population), min and max, as plain JSON."""
    stats = statistics(tensor)
    return {
        "shape": list(tensor.shape),
        "first_10": [_plain(value) for value in stats.first],
        "mean": stats.mean,
        "std": stats.std,
        "min": stats.min,
        "max": stats.max,
    }


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def together(samples: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Samples of one shape along the batch axis, under `""`; others under `_sample_<n>` each."""
    if len({sample.shape for sample in samples}) == 1:
        return {"": torch.cat(list(samples)) if len(samples) > 1 else samples[0]}
    return {f"_sample_{number}": sample for number, sample in enumerate(samples)}


def apart(whole: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` samples that `together` put along the batch axis."""
    if count < 2 or not whole.dim() or whole.shape[0] % count:
        return [whole]
    return list(whole.chunk(count))


def read(path: Path) -> Any:
    """What `np.load` gives, without pickles; raises `RunError` naming the file."""
    try:
        return np.load(path, allow_pickle=False)
    except Exception as failure:  # zipfile, zlib and numpy each raise their own.
        raise RunError(f"{path} is no numpy file without pickles: {failure}") from failure


def file_word(word: str) -> str:
    """A mode's name as a part of a file's name; raises `RunError` for one that cannot be."""
    if _WORD.fullmatch(word) is None:
        raise RunError(f"mode {word!r} cannot be part of a file's name.")
    return word


def field(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping in a JSON document, empty where there is none: older files hold `{}`."""
    found = document.get(key)
    return found if isinstance(found, Mapping) else {}


def whole(said: Mapping[str, Any], key: str, path: Path) -> int:
    """A whole number of at least 1 in a JSON document, 1 where there is none."""
    found = said.get(key, 1)
    if type(found) is not int or found < 1:
        raise RunError(f"{path}: {key!r} must be a number of at least 1, not {found!r}.")
    return found


def words(said: Mapping[str, Any], key: str, default: tuple[str, str], path: Path) -> Any:
    """Two words in a JSON document, for input and output."""
    found = said.get(key, list(default))
    good = isinstance(found, list) and [type(word) for word in found] == [str, str]
    if not good:
        raise RunError(f"{path}: {key!r} must be two words, not {found!r}.")
    return tuple(found)


def name(text: Any, path: Path) -> str:
    """A canonical tensor name in a JSON document."""
    try:
        return str(TensorName.parse(str(text)))
    except ConfigError as failure:
        raise RunError(f"{path}: {failure}") from failure
