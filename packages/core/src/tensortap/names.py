"""`TensorName`: the canonical name of a tensor; the only place that knows the grammar.

    layers.3.attn.q/forward/input.1
    └─ module ────┘ └phase┘ └tensor┘

Coordinates (step, microbatch, call, rank) are not part of a name; they live in the record.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from tensortap.errors import ConfigError

PHASES = ("forward", "backward", "param", "grad")
ROOT = "root"
"""Module path of the model itself."""

LAYER = re.compile(r"(^|\.)layers\.(\d+)(?=\.|$)")
"""The outermost layer of a module path; its second group is the number."""
_WORD = re.compile(r"[^\s/,\x00-\x1f]+")
_UNSAFE = re.compile(r"[\s/,%\x00-\x1f]")


@dataclass(frozen=True, slots=True, order=True)
class TensorName:
    """Module path, phase and tensor; equal across frameworks for the same quantity."""

    module: str
    phase: str
    tensor: str

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"{self.phase!r} is not a phase; phases are {', '.join(PHASES)}.")
        for part in (self.module, self.tensor):
            if not _WORD.fullmatch(part):
                raise ConfigError(
                    f"{part!r} cannot be part of a tensor name: it must not be empty or hold "
                    "spaces, '/' or ','. Use `escape` for foreign names."
                )

    def __str__(self) -> str:
        return f"{self.module}/{self.phase}/{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> TensorName:
        """Parse `module/phase/tensor`; raises `ConfigError` naming the text."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ConfigError(
                f"{text!r} is not a tensor name; write module/phase/tensor, "
                "for example 'layers.0.attn.q/forward/output'."
            )
        return cls(*parts)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor or module is in; of nested layers the outermost."""
    found = LAYER.search(name.partition("/")[0])
    return int(found.group(2)) if found else None


def escape(native: str) -> str:
    """A native module or argument name as a legal word: unsafe characters become %XX."""
    return _UNSAFE.sub(lambda found: f"%{ord(found.group()):02X}", native)


@lru_cache(maxsize=65536)
def interned(module: str, phase: str, tensor: str) -> TensorName:
    """The one `TensorName` for these parts; the hot path makes the same few names every step."""
    return TensorName(module, phase, tensor)
