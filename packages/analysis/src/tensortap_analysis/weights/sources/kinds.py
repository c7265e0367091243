"""What a tensor is, by its shape and name: a linear layer's weight, an embedding, experts, …"""

from __future__ import annotations

import math
import re

from tensortap_analysis.weights.sources.source import Config, Entry
from tensortap_analysis.weights.weight import Kind

_EMBEDDING = re.compile(
    r"(?:^|[._])(?:\w*embed(?:s|ding|dings|_tokens|_positions|_in|_layer)?|wte|wpe|shared|"
    r"relative_\w*bias)$|embed_tokens\w*$",
    re.IGNORECASE,
)
"""The last word of a name: `embed_out` and `time_embedding.linear_1` are products."""
_PATCHES = re.compile(r"patch", re.IGNORECASE)
_EXPERTS = re.compile(r"(?:^|[._])(?:experts?|moe)(?:[._]|$)", re.IGNORECASE)
_TABLE = re.compile(
    r"(?:^|[._])(?:log|bias|biases|table|scales?|freqs?|mask|time_(?:decay|first|faaaa|mix_\w+))$",
    re.IGNORECASE,
)
"""Parameters of two axes that are added, multiplied one by one, or looked up."""
_ADDED = re.compile(r"token|pos|embed", re.IGNORECASE)
"""Class and mask tokens, and tables of positions, which have an axis of 1 for the batch."""
_CONVOLUTION = re.compile(r"conv|patch|downsample|upsample", re.IGNORECASE)
_LONGEST_KERNEL = 16
"""Three axes of which the last is no longer than this are a convolution over one axis."""
_LESS_ONE = re.compile(
    r"(?:gemma|gemma2|gemma3|nemotron|recurrent_gemma|t5gemma2?|vaultgemma|paligemma|qwen3_next|"
    r"qwen3_5(?:_moe)?)(?:_text)?$"
)
"""Models of transformers whose RMSNorm multiplies by 1 + weight."""
_NORM = re.compile(r"norm\w*\.weight$", re.IGNORECASE)
_PLAIN = re.compile(r"vision|visual|linear_attn", re.IGNORECASE)
"""Parts of those models whose normalisations multiply by the weight itself."""


def kind_of(entry: Entry) -> tuple[Kind, str | None]:
    """What it is read as, and what was assumed for that."""
    axes, name = len(entry.shape), entry.name
    if axes < 2:
        return "vector", None
    if axes == 2 and _TABLE.search(name):
        return "table", None
    if entry.kind is not None:
        return entry.kind, None
    if axes in (2, 3) and entry.shape[0] == 1 and _ADDED.search(_word(name)):
        return ("vector" if math.prod(entry.shape[:-1]) == 1 else "table"), None
    if axes == 2:
        word = _word(name)
        named = _EMBEDDING.search(word) and not _PATCHES.search(word)
        return ("embedding" if named else "linear"), None
    if axes == 3 and _EXPERTS.search(name):
        return "experts", None
    if axes == 3 and not _CONVOLUTION.search(name) and entry.shape[2] > _LONGEST_KERNEL:
        return "experts", "three axes, read as a stack of matrices"
    return "convolution", f"read as {entry.shape[0]} x {entry.numel // max(entry.shape[0], 1)}"


def offset_of(entry: Entry, config: Config) -> float:
    """What the model adds to a gain before it multiplies by it."""
    less_one = _LESS_ONE.match(str(config.get("model_type") or ""))
    gain = len(entry.shape) == 1 and _NORM.search(entry.name) and not _PLAIN.search(entry.name)
    return 1.0 if less_one and gain else 0.0


def _word(name: str) -> str:
    """`q_proj` of `layers.0.q_proj.weight`, `cls_token` of `embeddings.cls_token`."""
    return name.removesuffix(".weight").rpartition(".")[2]
