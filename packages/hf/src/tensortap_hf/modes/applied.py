"""`apply`: put a model into a mode, until it is removed; and which mode a model is in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tensortap.errors import AlreadyAttached, ConfigError
from tensortap.undo import Undo
from tensortap.wrappers import unwrap
from tensortap_hf.modes.registry import Changes, Mode, Options, get


@dataclass(frozen=True, slots=True)
class State:
    """The mode a model is in, and what that changed."""

    mode: Mode
    changes: Changes

    def to_json(self) -> dict[str, Any]:
        """What a run keeps in its metadata, under `mode`."""
        return {
            "name": self.mode.name,
            "family": self.mode.family,
            "basis": self.mode.basis,
            "format": self.mode.format,
            "equals": list(self.mode.equals),
            "changed": list(self.changes.changed),
            "kept": dict(self.changes.kept),
        }


_STATES: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()
"""By module, of every module of a model: two modes may not overlap in a part either."""


def apply(
    model: nn.Module,
    name: str | Mode,
    *,
    calibration: Any = None,
    family: str | None = None,
    exclude: str | Iterable[str] = (),
) -> Applied:
    """Put a model into a mode; a context manager, or until `remove`.

        with modes.apply(model, "2-1", calibration=samples):
            model(**batch)

    `name` is one of `modes.names()`, `family/name`, or a `Mode`. `calibration` is a list of
    token-id tensors, or what the family's calibration made of it; only some modes need it.
    `exclude` selects modules that stay as they are, by canonical names (`"layers.0.*"`).

    Neither copy nor save a model that is in a mode. A deepcopy in a mode of Quamba is refused, and
    one in a quantising generic mode is the unquantised model; what `state_dict()` and
    `save_pretrained` give are the weights of the mode.

    Raises `ConfigError` for a mode there is not or cannot serve the model, `AlreadyAttached` when
    the model is in a mode already; the model is untouched then.
    """
    root = unwrap(model)
    mode = name if isinstance(name, Mode) else get(name, family, model=root)
    _refuse_twice(root, mode)
    if mode.needs_calibration and calibration is None:
        raise ConfigError(f"mode {mode.title} needs calibration=, a list of token-id tensors.")
    excluded = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if excluded and not mode.quantises:
        raise ConfigError(f"mode {mode.title} is of the whole model; it takes no exclude.")
    return Applied(root, mode, Options(calibration, excluded))


def state_of(model: nn.Module) -> State | None:
    """The mode a model, or a part of it, is in; `None`: it is as it was loaded."""
    return next((_STATES[module] for module in model.modules() if module in _STATES), None)


class Applied:
    """A model in a mode, until `remove`; works as a context manager as well."""

    def __init__(self, model: nn.Module, mode: Mode, options: Options) -> None:
        self.mode = mode
        self._undo = Undo()
        with self._undo:
            self.changes = mode.apply(model, self._undo, options)
            state = State(mode, self.changes)
            for module in model.modules():
                self._undo.set_item(_STATES, module, state)

    def remove(self) -> None:
        """Leave the model bitwise as it was; a second call does nothing."""
        self._undo.run()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Applied {self.mode.title}, {len(self.changes.changed)} modules changed>"


def _refuse_twice(model: nn.Module, mode: Mode) -> None:
    earlier = state_of(model)
    if earlier is not None:
        raise AlreadyAttached(
            f"{type(model).__name__} is in mode {earlier.mode.title} already; call remove() on "
            f"what apply() returned before it goes into {mode.title}."
        )
