"""The `.metadata` of a distributed checkpoint is a pickle: read here without running anything.

Every name in the pickle is looked up in a table. What the table has is a dtype, a container, or
an inert object that keeps what it was built from; nothing is imported, nothing else is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tensortap_analysis.weights.sources.source import CheckpointError, regular

_LARGEST = 1 << 30
_CONTAINERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
}
_INERT = ("torch.distributed", "megatron.core.dist_checkpointing", "pathlib")
"""Modules whose classes a real checkpoint names; an inert object stands for each."""


class Plain:
    """Stands for an object of any class: keeps its attributes, or its state if it has others."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for here; nothing is imported."""
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if any(module == known or module.startswith(f"{known}.") for known in _INERT):
            return Plain
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which no description of a checkpoint needs"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Facts by tensor, and where its chunks lie by index; inert objects with torch's attributes.

    Raises `CheckpointError` for a file that is broken, or that names anything unexpected.
    """
    found = regular(path)
    try:
        if found.stat().st_size > _LARGEST:
            raise ValueError(f"{found.stat().st_size:,} bytes cannot be right")
        with found.open("rb") as file:
            content = _Unpickler(file).load()
        described, places = content.state_dict_metadata, content.storage_data
        if not all(isinstance(index.fqn, str) for index in places):
            raise ValueError("its chunks are not named")
    except Exception as failure:
        # A broken pickle may raise anything; whatever it is, the file is no metadata.
        said = str(failure) or type(failure).__name__
        raise CheckpointError(f"{path} is not read: {said}.") from None
    tables = isinstance(described, dict) and isinstance(places, dict)
    if not tables or not all(isinstance(name, str) for name in described):
        raise CheckpointError(f"{path} is not read: it lists no tensors by name.")
    return described, places
