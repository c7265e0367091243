"""Canonical names and axes of modules, read from their paths in NxDI and vLLM models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tensortap.names import escape

CONTAINERS = frozenset({"model", "language_model", "transformer", "decoder", "backbone"})
"""Modules around the layers that add nothing to a name."""

_TOP = {
    "embed_tokens": "embed", "wte": "embed", "embeddings": "embed",
    "norm": "final_norm", "ln_f": "final_norm", "norm_f": "final_norm",
    "final_layernorm": "final_norm", "lm_head": "lm_head",
}  # fmt: skip
_LAYER = {
    "self_attn": "attn", "attention": "attn", "attn": "attn",
    "mlp": "mlp", "feed_forward": "mlp", "block_sparse_moe": "mlp",
    "mixer": "mixer", "linear_attn": "mixer",
    "input_layernorm": "input_norm", "ln_1": "input_norm",
    "post_attention_layernorm": "post_attn_norm", "ln_2": "post_attn_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm", "post_feedforward_layernorm": "post_mlp_norm",
}  # fmt: skip
_INNER: Mapping[str, Mapping[str, str]] = {
    "attn": {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "c_attn": "qkv",
        "o_proj": "out", "c_proj": "out", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
        # NxDI's group of projections: its own output is a tuple, so the name stays its own.
        "qkv_proj.q_proj": "q", "qkv_proj.k_proj": "k", "qkv_proj.v_proj": "v",
        "qkv_proj.Wqkv": "qkv",
    },
    "mlp": {
        "gate_proj": "gate", "up_proj": "up", "gate_up_proj": "gate_up", "down_proj": "down",
        "c_fc": "up", "c_proj": "down", "act_fn": "act", "gate": "router",
        "router.linear_router": "router",
    },
}  # fmt: skip
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


def canonical(path: str) -> str:
    """`layers.3.attn.q` for `model.layers.3.self_attn.q_proj`; a path no rule knows stays."""
    words = path.split(".")
    while len(words) > 1 and words[0] in CONTAINERS:
        words.pop(0)
    plain = ".".join(words)
    if len(words) == 1:
        return _TOP.get(plain, escape(path))
    if words[0] in ("layers", "h") and re.fullmatch(r"\d{1,6}", words[1]):
        return ".".join(["layers", str(int(words[1])), *_inside(words[2:])])
    return escape(path)


def _inside(words: list[str]) -> list[str]:
    """Canonical words for a path inside of a layer; what is not known stays."""
    if not words:
        return []
    first = _LAYER.get(words[0])
    if first is None:
        return [escape(word) for word in words]
    inner = _INNER.get(first, {})
    for length in (2, 1):
        known = inner.get(".".join(words[1 : 1 + length])) if len(words) > length else None
        if known is not None:
            return [first, known, *map(escape, words[1 + length :])]
    return [first, *map(escape, words[1:])]


def canonical_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> name, each name once: a second path of one name keeps its own."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        if path not in found:
            name = canonical(path)
            name = name if name not in taken else escape(path)
            while name in taken:
                name += "_"
            taken.add(name)
            found[path] = name
    return found


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
