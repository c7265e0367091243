"""The axes of tensors at canonical names, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_TOKENS = "batch seq"
_HIDDEN = "batch seq hidden"
_HEADS = "batch seq (head dim)"
_WIDE = "batch seq ffn"
_CHANNELS = "batch seq channel"

_ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    # Canonical word -> (input, output); a number is a layer.
    "embed": (_TOKENS, _HIDDEN),
    "embed.norm": (_HIDDEN, _HIDDEN),
    "embed.token_type": (_TOKENS, _HIDDEN),
    "lm_head": (_HIDDEN, "batch seq vocab"),
    **dict.fromkeys(
        (
            "layer",
            "attn",
            "mlp",
            "mixer",
            "norm",
            "input_norm",
            "post_attn_norm",
            "pre_mlp_norm",
            "post_mlp_norm",
            "final_norm",
        ),
        (_HIDDEN, _HIDDEN),
    ),
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.qkv"), (_HIDDEN, _HEADS)),
    "attn.out": (_HEADS, _HIDDEN),
    **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.gate_up"), (_HIDDEN, _WIDE)),
    "mlp.act": (_WIDE, _WIDE),
    "mlp.down": (_WIDE, _HIDDEN),
    "mixer.in_proj": (_HIDDEN, _CHANNELS),
    "mixer.x_proj": (_CHANNELS, _CHANNELS),
    "mixer.norm": (_CHANNELS, _CHANNELS),
    "mixer.out_proj": (_CHANNELS, _HIDDEN),
}


_FLAT = {"opt": ("mlp", "post_attn_norm")}
"""Families that run these with the axes of batch and sequence flattened into one."""


def axes(name: str, module: nn.Module, config: Any) -> dict[str, str]:
    """Axes of the inputs, outputs and parameters of a module under its canonical name."""
    word = _word(name)
    known: tuple[str, ...] = _ACTIVATIONS.get(word, ())
    if word.split(".")[0] in _FLAT.get(config.model_type, ()):
        known = tuple(dims.replace(_TOKENS, "token") for dims in known)
    return {**dict(zip(("input", "output"), known, strict=False)), **_parameters(module)}


def _word(name: str) -> str:
    """`layers.3.attn.q` -> `attn.q`, `layers.3` -> `layer`, `final_norm` as it is."""
    words = name.split(".")
    if "layers" in words:
        words = words[words.index("layers") + 2 :] or ["layer"] * (len(words) > 1)
    return ".".join(words)


def _parameters(module: nn.Module) -> Mapping[str, str]:
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, stored transposed.
        return {"weight": "in out", "bias": "out"}
    if isinstance(module, nn.Embedding):
        return {"weight": "vocab hidden"}
    if isinstance(module, nn.Linear):
        return {"weight": "out in", "bias": "out"}
    if isinstance(module, nn.Conv1d):
        return {"weight": "out in kernel", "bias": "out"}
    if "experts" in type(module).__name__.lower() and hasattr(module, "is_transposed"):
        stacked = "expert in out" if module.is_transposed else "expert out in"
        return {"gate_up_proj": stacked, "down_proj": stacked}
    # Norms: one number a feature.
    own = module.named_parameters(recurse=False)
    return {name: "hidden" for name, parameter in own if parameter.dim() == 1 and name in _NORM}


_NORM = ("weight", "bias")
