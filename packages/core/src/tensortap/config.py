"""Settings of a tap: keyword arguments come first, then the environment, then the defaults."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from tensortap.errors import CaptureWarning, ConfigError, nearest
from tensortap.names import PHASES
from tensortap.records import Values
from tensortap.selection import Indices, Selection

OnFull = Literal["wait", "drop"]
OnError = Literal["warn", "raise"]
Durable = Literal["close", "step"]

DEFAULT_MAX_BYTES = 64 << 30
"""A forgotten tap must not fill a disk; raise it with `max_bytes=`."""

_UNITS = {"": 1, "B": 1} | {
    prefix + infix + "B": base**power
    for infix, base in (("i", 1024), ("", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class ValueRules:
    """Which tensors are recorded with their values; the first matching rule wins."""

    rules: tuple[tuple[Selection, Values], ...]

    @classmethod
    def parse(cls, given: str | Mapping[str, str]) -> ValueRules:
        """From `"full"`, `{"layers.0.*": "full", "*": "stats"}` or `"layers.0.*=full,*=stats"`."""
        if isinstance(given, str):
            given = _assignments(given) if "=" in given else {"*": given}
        rules = ((Selection.parse(key), _choice("values", v, Values)) for key, v in given.items())
        return cls(tuple(rules))

    def __call__(self, name: str) -> Values:
        return next((values for rule, values in self.rules if rule.matches(name)), "stats")


def _assignments(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {key.strip(): value.strip() for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what a tap does; `Settings.resolve` makes it."""

    enabled: bool = True
    directory: str = "tensortap_runs"
    """Where runs go when `attach` is given no path: `<directory>/<UTC time>-<model class>`."""
    select: Selection = field(default_factory=lambda: Selection.parse("*"))
    explicit: bool = False
    """Did the user choose the selection? Then a chosen module that never runs is a gap."""
    values: ValueRules = field(default_factory=lambda: ValueRules.parse("stats"))
    steps: Indices = field(default_factory=lambda: Indices.parse(None, "steps"))
    ranks: Indices = field(default_factory=lambda: Indices.parse(None, "ranks"))
    phases: tuple[str, ...] = PHASES
    exponents: bool = False
    max_pending: int = 256 << 20
    max_bytes: int = DEFAULT_MAX_BYTES
    on_full: OnFull = "wait"
    on_error: OnError = "warn"
    durable: Durable = "close"
    overwrite: bool = False
    using: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls,
        given: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        *,
        values: Values = "stats",
    ) -> Settings:
        """Merge keyword arguments with the environment; raises `ConfigError`.

        `values` is the default of the sink in use.
        """
        unknown = [key for key in given if key not in _READERS]
        if unknown:
            raise ConfigError(
                f"attach() has no option {unknown[0]!r}; did you mean "
                f"{nearest(unknown[0], _READERS, 1)}? Options: {', '.join(_READERS)}."
            )
        chosen: dict[str, Any] = {"values": ValueRules.parse(values)}
        chosen |= _from_environment(os.environ if environ is None else environ)
        for key, value in given.items():
            if value is not None:
                chosen[key] = _read(key, key, value)
        return cls(**chosen, explicit="select" in chosen)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if environ.get("TENSOR_SAVE_ENABLED") is not None or environ.get("TENSOR_SAVE_DIR"):
        chosen["enabled"] = _boolean(
            "TENSOR_SAVE_ENABLED", environ.get("TENSOR_SAVE_ENABLED") or "1"
        )
        chosen["directory"] = environ.get("TENSOR_SAVE_DIR") or "./tensor_logs"
        chosen["values"] = ValueRules.parse("full")
    for variable in environ:
        if variable.startswith("TENSORTAP_") and variable not in (*_VARIABLES, *_ELSEWHERE):
            close = nearest(variable, _VARIABLES, 1)
            warnings.warn(f"{variable} means nothing; {close}?", CaptureWarning, stacklevel=4)
    for variable, key in _VARIABLES.items():
        if environ.get(variable):
            chosen[key] = _read(key, variable, environ[variable])
    return chosen


def _read(key: str, what: str, value: Any) -> Any:
    """One setting; every error names where the value came from."""
    try:
        return _READERS[key](what, value)
    except ConfigError as error:
        raise error if what in str(error) else ConfigError(f"{what}: {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what}={value!r} is of the wrong kind: {error}.") from error


def parse_bytes(what: str, value: str | int) -> int:
    """`"256MiB"`, `"2GB"` or a number of bytes; raises `ConfigError` naming `what`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?b?)\s*", str(value), re.IGNORECASE)
    unit = found.group(2).upper().replace("I", "i") if found else "?"
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    if found is None or unit not in _UNITS or float(found.group(1)) == 0:
        raise ConfigError(f"{what}={value!r} is not a size; write for example 256MiB or 2GB.")
    return int(float(found.group(1)) * _UNITS[unit])


def _boolean(what: str, value: bool | str) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE + _FALSE:
        raise ConfigError(f"{what}={value!r} is neither on nor off; write 1 or 0.")
    return word in _TRUE


def _choice(what: str, value: Any, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ConfigError(f"{what}={value!r}: choose from {', '.join(get_args(choices))}.")
    return value


def _phases(what: str, value: Any) -> tuple[str, ...]:
    words = [w.strip() for w in value.split(",")] if isinstance(value, str) else list(value)
    wrong = [word for word in words if word not in PHASES]
    if wrong or not words:
        raise ConfigError(f"{what}={value!r}: choose from {', '.join(PHASES)}.")
    return tuple(phase for phase in PHASES if phase in words)


def _metadata(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} is a dictionary of what you want to find again in the run.")
    return cast(Mapping[str, Any], value)


_READERS: dict[str, Any] = {
    "enabled": _boolean,
    "directory": lambda what, value: str(value),
    "select": lambda what, value: Selection.parse(value),
    "values": lambda what, value: ValueRules.parse(value),
    "steps": lambda what, value: Indices.parse(value, what),
    "ranks": lambda what, value: Indices.parse(value, what),
    "phases": _phases,
    "exponents": _boolean,
    "max_pending": parse_bytes,
    "max_bytes": parse_bytes,
    "on_full": lambda what, value: _choice(what, value, OnFull),
    "on_error": lambda what, value: _choice(what, value, OnError),
    "durable": lambda what, value: _choice(what, value, Durable),
    "overwrite": _boolean,
    "using": lambda what, value: str(value),
    "metadata": _metadata,
}
_ELSEWHERE = ("TENSORTAP_NATIVE",)
_VARIABLES = {
    "TENSORTAP_ENABLED": "enabled",
    "TENSORTAP_DIR": "directory",
    "TENSORTAP_SELECT": "select",
    "TENSORTAP_VALUES": "values",
    "TENSORTAP_STEPS": "steps",
    "TENSORTAP_RANKS": "ranks",
    "TENSORTAP_PHASES": "phases",
    "TENSORTAP_MAX_PENDING": "max_pending",
    "TENSORTAP_ON_ERROR": "on_error",
}
