"""Find the tensors inside what a module is given and returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from tensortap.names import escape


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`(name, tensor)` pairs of a nested value, each tensor named by its path.

    The first element of an outer tuple keeps the bare name if it is a tensor itself: `output`,
    `output.1`, `output.2.0`; else it is `output.0.…`. Tuples, lists, mappings and dataclasses
    are walked, each object once; other objects are left alone.
    """
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        if value and isinstance(value[0], torch.Tensor):
            yield name, value[0]
            rest: Iterator[tuple[int, Any]] = enumerate(value[1:], start=1)
        else:
            rest = enumerate(value)
        for index, item in rest:
            yield from _nested(f"{name}.{index}", item, {id(value)})
    else:
        yield from _nested(name, value, set())


def _nested(name: str, value: Any, above: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif id(value) not in above:
        for key, item in _members(value):
            yield from _nested(f"{name}.{escape(key)}", item, above | {id(value)})


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name, None)) for f in fields(value))


def arguments(
    first: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Name the arguments of a call: the first parameter is `input` however it is passed.

    Further positional arguments are `input.1`, …, keywords `input.attention_mask`.
    """
    named: dict[str, Any] = {"input": args}
    for key, value in kwargs.items():
        if key == first and not args:
            named["input"] = (value,)
        else:
            named[f"input.{escape(key)}"] = value
    return named


def first_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter of a module's `forward`, or `None` when it has none."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # A forward implemented in C has no signature.
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return parameters[0].name if parameters and parameters[0].kind in named else None
