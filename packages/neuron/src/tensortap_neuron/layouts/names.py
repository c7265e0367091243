"""Names, axes and order of modules, read from their paths in NxDI and vLLM models.

The words are those of `tensortap_neuron.traced`, so that what was imported and what was captured
have the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tensortap_neuron.traced.naming import names_of

CONTAINERS = frozenset({"model", "language_model", "transformer", "decoder", "backbone"})
"""Modules around the layers that add nothing to a name."""

_HIDDEN = "batch seq hidden"
_RESIDUAL = frozenset(
    {"embed", "layer", "attn", "mlp", "mixer", "input_norm", "post_attn_norm", "pre_mlp_norm",
     "post_mlp_norm", "final_norm", "attn.out", "mlp.down"}
)  # fmt: skip
_DIMS = {
    **dict.fromkeys(_RESIDUAL, _HIDDEN),
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.qkv"), "batch seq (head dim)"),
    **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.gate_up", "mlp.act"), "batch seq ffn"),
    "lm_head": "batch seq vocab",
}
_IN_A_LAYER = (
    "input_norm", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_norm", "attn.k_norm",
    "attn.core", "attn.out", "attn", "mixer", "post_attn_norm", "pre_mlp_norm", "mlp.router",
    "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.act", "mlp.down", "mlp", "post_mlp_norm",
)  # fmt: skip
_LAYER_PATH = re.compile(r"layers\.(\d{1,6})(?:\.(.+))?")


def canonical_names(paths: Iterable[str], *, fused: bool = False) -> dict[str, str]:
    """Path -> name, each name once: a second path of one name keeps its own.

    `fused`: `qkv_proj` is one projection, as in vLLM, and no group of them, as in NxDI.
    """
    bare: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        short = _bare(path)
        bare[path] = short if short not in bare.values() else path
    names = names_of(bare.values())
    found = {path: names[short] for path, short in bare.items()}
    for path, name in found.items():
        joined = f"{name.removesuffix('.qkv_proj')}.qkv"
        if fused and name.endswith(".attn.qkv_proj") and joined not in found.values():
            found[path] = joined
    return found


def _bare(path: str) -> str:
    words = path.split(".")
    while len(words) > 1 and words[0] in CONTAINERS:
        words.pop(0)
    return ".".join(words)


def word_of(module: str) -> str:
    """`attn.q` for `layers.3.attn.q`, `layer` for `layers.3`, `embed` as it is."""
    found = _LAYER_PATH.fullmatch(module)
    return module if found is None else (found[2] or "layer")


def is_residual(module: str) -> bool:
    """Is its output as wide as the model, and whole on every tensor-parallel rank?"""
    return word_of(module) in _RESIDUAL


def dims_of(module: str, rank: int) -> str | None:
    """The axes of its output, where they are known and there are so many."""
    dims = _DIMS.get(word_of(module))
    axes = 0 if dims is None else len(re.sub(r"\([^)]*\)", "x", dims).split())
    return dims if axes == rank else None


def place(module: str) -> tuple[int, int, int, str]:
    """Sorts modules into the order in which their outputs are made, layers by their number."""
    found = _LAYER_PATH.fullmatch(module)
    if found is None:
        outer = {"embed": 0, "final_norm": 2, "lm_head": 3}
        return outer.get(module, 4), 0, 0, module
    inner = found[2]
    if inner is None:  # The layer itself, after all that is in it.
        return 1, int(found[1]), len(_IN_A_LAYER) + 1, module
    at = _IN_A_LAYER.index(inner) if inner in _IN_A_LAYER else len(_IN_A_LAYER)
    return 1, int(found[1]), at, module
