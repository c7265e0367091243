"""`quantize`: put the products of a model on the grid of a format, until it is removed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tensortap import formats
from tensortap.errors import ConfigError
from tensortap.selection import Selection
from tensortap.undo import Undo
from tensortap.wrappers import unwrap
from tensortap_megatron.quantization.operand import Quantizer
from tensortap_megatron.quantization.targets import EVERYTHING, Target, choose

VARIABLE = "CUSTOM_QUANT_TYPE"
_FORMATS: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""Formats by model: a pipeline stage may hold nothing of what is quantised, and says so too."""


def quantize(
    model: nn.Module | Sequence[nn.Module],
    format: str | None = None,
    *,
    select: str | Iterable[str] = EVERYTHING,
    **options: Any,
) -> Quantization:
    """Fake-quantise the linear layers and attention products of a Megatron-core model.

        with quantize(model, "mxfp4"):
            train_step()
        q = quantize(model, "hifp8", rounding="hybrid")    # …
        q.remove()

    `model` may be wrapped, or a list of pipeline chunks. `format=None` reads CUSTOM_QUANT_TYPE.
    `select` is a selection of canonical module names (`"layers.*.mlp.*,!layers.0.*"`); without it
    all linear layers and attention cores but `embed` and `lm_head`. `options` are those of
    `tensortap.formats.get`; hifp8 saturates on overflow here unless told otherwise. Different
    modules of one model may be quantised to different formats.

    Forward and backward of a step belong inside: a backward that runs later is still quantised,
    except for what activation checkpointing recomputes by then.

    Raises `ConfigError` for a format or option there is not, `SelectionError` when nothing is
    selected, `NotSupported` when a selected module cannot be quantised, `AlreadyAttached` when
    one is quantised already; the model is untouched then.
    """
    name = _from_environment() if format is None else format
    if name == "hifp8":
        options = {"overflow": "saturate", **options}
    quantizer = Quantizer.of(formats.get(name, **options))
    models = [unwrap(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    if not models:
        raise ConfigError("quantize() was given an empty list of models.")
    return Quantization(models, choose(models, Selection.parse(select)), quantizer)


def format_of(model: nn.Module) -> str | None:
    """The format a model is quantised to now; several are joined by commas, `None`: it is not."""
    found = {name for module in model.modules() for name in _FORMATS.get(module, ())}
    return ",".join(sorted(found)) or None


class Quantization:
    """A quantised model, until `remove`; works as a context manager as well."""

    def __init__(
        self, models: Sequence[nn.Module], targets: Sequence[Target], quantizer: Quantizer
    ) -> None:
        self.format = quantizer.info
        self.modules = tuple(target.name for target in targets)
        """Canonical names of what is quantised."""
        self._undo = Undo()
        with self._undo:
            for target in targets:
                assert target.kind is not None
                put = target.kind(target.module, quantizer)
                self._undo.replace(target.module, put.method, put)
            for model in models:
                self._mark(model)

    def remove(self) -> None:
        """Leave the model exactly as it was; a second call does nothing."""
        self._undo.run()

    def __enter__(self) -> Quantization:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Quantization {self.format.name} of {len(self.modules)} modules>"

    def _mark(self, model: nn.Module) -> None:
        formats_of_model = _FORMATS.setdefault(model, [])
        formats_of_model.append(self.format.name)
        self._undo.call(lambda: formats_of_model.remove(self.format.name))


def _from_environment() -> str:
    """CUSTOM_QUANT_TYPE; the error names the variable, the format is checked like any other."""
    known = ", ".join(formats.names())
    name = os.environ.get(VARIABLE)
    if not name:
        raise ConfigError(f"{VARIABLE} is not set, and no format was given; there are: {known}.")
    if name.lower() not in formats.names():
        raise ConfigError(f"{VARIABLE}={name!r} is not a number format; there are: {known}.")
    return name
