"""From a format's name and options to its codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from tensortap.errors import ConfigError, nearest
from tensortap.formats.codec import Codec
from tensortap.formats.hifloat8 import HiFloat8
from tensortap.formats.integer import Int4, Int8
from tensortap.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2
from tensortap.formats.mx import MX
from tensortap.formats.nvfp4 import NVFP4
from tensortap.formats.plain import Plain

_MAKERS: Final[Mapping[str, Callable[..., Codec]]] = {
    "hifp8": HiFloat8,
    "mxfp8": lambda: MX("mxfp8", E4M3),
    "mxfp8_e5m2": lambda: MX("mxfp8_e5m2", E5M2),
    "mxfp6_e3m2": lambda: MX("mxfp6_e3m2", E3M2),
    "mxfp6_e2m3": lambda: MX("mxfp6_e2m3", E2M3),
    "mxfp4": lambda: MX("mxfp4", E2M1),
    "nvfp4": NVFP4,
    "int8": Int8,
    "int4": Int4,
    "fp16": lambda: Plain("fp16", torch.float16),
    "bf16": lambda: Plain("bf16", torch.bfloat16),
}
_OPTIONS: Final[Mapping[str, Mapping[str, tuple[str, ...] | str]]] = {
    "hifp8": {"rounding": ("ta", "hybrid"), "overflow": ("inf", "saturate")},
    "int8": {"scale": ("tensor", "channel")},
    "int4": {"group": "a positive integer"},
}
"""The values an option may have, or what they are."""


def names() -> tuple[str, ...]:
    """The formats there are, as `get` takes them."""
    return tuple(_MAKERS)


def get(name: str, **options: Any) -> Codec:
    """The codec of a format; raises `ConfigError` for a name, option or value there is not.

    Options: `rounding` and `overflow` of hifp8, `scale` of int8, `group` of int4.
    """
    name = name.lower() if isinstance(name, str) else name
    if name not in _MAKERS:
        rest = ", ".join(sorted(_MAKERS))
        close = nearest(str(name), _MAKERS, limit=3)
        raise ConfigError(f"format {name!r} is not known; closest: {close}; there are: {rest}.")
    for option, value in options.items():
        _check(name, option, value)
    return _MAKERS[name](**options)


def _check(name: str, option: str, value: object) -> None:
    known = _OPTIONS.get(name, {})
    if option not in known:
        offered = ", ".join(known) or "none"
        raise ConfigError(f"format {name} has no option {option!r}; it has: {offered}.")
    allowed = known[option]
    if isinstance(allowed, str):
        good, wanted = type(value) is int and value > 0, allowed
    else:
        good, wanted = value in allowed, " or ".join(map(repr, allowed))
    if not good:
        raise ConfigError(f"format {name}: {option}={value!r} cannot be used; it is {wanted}.")
