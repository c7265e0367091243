"""Reading untrusted JSON values: each function returns the value, or raises `ValueError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensortap.records import decode_float

MAX_INT = (1 << 63) - 1
_MISSING = object()


def integer(
    fields: Mapping[str, Any], key: str, default: Any = _MISSING, *, top: int = MAX_INT
) -> int:
    """A whole number from 0 to `top`."""
    return whole(fields.get(key, default), key, top)


def whole(value: Any, key: str, top: int = MAX_INT) -> int:
    """`value` when it is a whole number from 0 to `top`."""
    if type(value) is not int or not 0 <= value <= top:
        raise ValueError(f"{key} must be a whole number from 0 to {top}, not {_short(value)}")
    return value


def text(fields: Mapping[str, Any], key: str) -> str:
    """A string that can be printed and encoded."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {_short(value)}")
    return value


def optional_text(fields: Mapping[str, Any], key: str) -> str | None:
    """A string, or `None` where there is none."""
    return None if fields.get(key) is None else text(fields, key)


def flag(fields: Mapping[str, Any], key: str) -> bool:
    """True or false; absent is false."""
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {_short(value)}")
    return value


def number(value: Any, key: str) -> float | None:
    """A float or `None`; `nan`, `inf` and `-inf` come as strings."""
    if value is None:
        return None
    if type(value) is float:
        return value
    if type(value) is int and abs(value) <= MAX_INT:
        return float(value)
    if value in ("nan", "inf", "-inf"):
        return decode_float(value)
    raise ValueError(f"{key} must be a number, not {_short(value)}")


def array(fields: Mapping[str, Any], key: str) -> list[Any]:
    """A list; absent is empty."""
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {_short(value)}")
    return value


def mapping(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object; absent is empty."""
    value = fields.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    return "nothing" if value is _MISSING else repr(value)[:60]
