"""What a canonical name says about a tensor: its layer, its kind of layer, its family."""

from __future__ import annotations

import re

from tensortap.names import LAYER, TensorName, layer_of
from tensortap.records import TensorRecord

__all__ = ["axes_of", "family_of", "format_of", "kind_of", "layer_of"]

_AXES = re.compile(r"\([^)]*\)|[^\s()]+")
_KINDS = ("norm", "attn", "mlp", "mixer", "embed", "lm_head")


def axes_of(dims: str | None) -> list[str]:
    """The names of axes, where they are known: `"seq batch (head dim)"` has three."""
    return _AXES.findall(dims or "")


def family_of(name: str) -> str:
    """The same tensor of all layers: `layers.3.attn.q/…` -> `attn.q/…`, `layers.3/…` -> `layer/…`.

    What is in no layer keeps its name.
    """
    module, slash, rest = name.partition("/")
    found = LAYER.search(module)
    if found is None:
        return name
    inner = module[found.end() :].lstrip(".") or "layer"
    return f"{module[: found.start()]}{found.group(1)}{inner}{slash}{rest}"


def kind_of(name: TensorName) -> str:
    """norm, attn, mlp, mixer, embed, lm_head, or layer: a layer's own inputs and outputs."""
    words = name.module.split(".")
    if words[-1].endswith("norm"):
        return "norm"
    found = LAYER.search(name.module)
    if found and not name.module[found.end() :]:
        return "layer"
    return next((kind for kind in _KINDS if kind in words), "other")


def format_of(record: TensorRecord) -> str:
    """The number format its values lie on, else its dtype."""
    return record.format.name if record.format is not None else record.dtype
