"""`generate` of a tapped model is one step; the forwards inside it are its microbatches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tensortap.integration import Observer
from tensortap.undo import Undo


class _OneStep:
    """Stands in for the `generate` of one model; a copy of the model gets its own one back."""

    def __init__(self, original: Callable[..., Any], observer: Observer) -> None:
        functools.update_wrapper(self, original)
        self._original = original
        self._observer = observer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._observer.one_step():
            return self._original(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        # Copying and pickling a bound method binds it to the copy of its model.
        return _itself, (self._original,)


def _itself(value: Any) -> Any:
    return value


def make_one_step(model: nn.Module, observer: Observer, undo: Undo) -> None:
    """Make one step of each `generate` of `model`, where it has one, until `undo` runs."""
    generate: Any = getattr(model, "generate", None)
    if callable(generate):
        undo.replace(model, "generate", _OneStep(generate, observer))
