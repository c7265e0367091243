"""What each tensor of a checkpoint is: a linear layer's weight, an embedding, experts, a vector."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tensortap.store.dtypes import dtype_name
from tensortap_analysis.weights.packed import unpacked
from tensortap_analysis.weights.sources.source import Config, Entry, Listing, Skipped
from tensortap_analysis.weights.weight import Kind, Weight

_EMBEDDING = re.compile(
    r"(?:^|[._])(?:\w*embed\w*|wte|wpe|relative_\w*bias)(?:[._]|$)", re.IGNORECASE
)
_EXPERTS = re.compile(r"(?:^|[._])(?:experts?|moe)(?:[._]|$)", re.IGNORECASE)
_TABLE = re.compile(
    r"(?:^|[._])(?:log|bias|biases|table|scales?|freqs?|mask|time_(?:decay|first|faaaa|mix_\w+))$",
    re.IGNORECASE,
)
"""Parameters of two axes that are added, multiplied one by one, or looked up."""
_LESS_ONE = re.compile(
    r"(?:gemma|gemma2|gemma3(?:_text)?|recurrent_gemma|t5gemma2?|vaultgemma|paligemma|qwen3_next|"
    r"qwen3_5(?:_moe)?)(?:_text)?$"
)
"""Models of transformers whose RMSNorm multiplies by 1 + weight."""
_NORM = re.compile(r"norm\w*\.weight$", re.IGNORECASE)
_PLAIN = re.compile(r"vision|visual|linear_attn", re.IGNORECASE)
"""Parts of those models whose normalisations multiply by the weight itself."""
_CONVOLUTION = re.compile(r"conv|patch|downsample|upsample", re.IGNORECASE)
_LONGEST_SIDE = 1 << 24
"""Metrics of columns take memory by their number; a shape of no values can claim any."""
_LONGEST_KERNEL = 16
"""Three axes of which the last is no longer than this are a convolution over one axis."""


def described(listing: Listing) -> tuple[tuple[Weight, ...], tuple[Skipped, ...]]:
    """Weights in the order of the checkpoint, and what is none, with the reason."""
    entries, skipped = unpacked(listing.entries, listing.config)
    skipped = [*listing.skipped, *skipped]
    kept = []
    for entry in entries:
        reason = _no_weight(entry)
        if reason is None:
            kept.append(entry)
        else:
            skipped.append(Skipped(entry.name, reason))
    names = {entry.name for entry in kept}
    turned = _turned(kept, listing.config)
    weights = (
        _weight(entry, names, entry.name in turned, _offset(entry, listing.config))
        for entry in kept
    )
    return tuple(weights), tuple(skipped)


def _offset(entry: Entry, config: Config) -> float:
    """What the model adds to a gain before it multiplies by it."""
    less_one = _LESS_ONE.match(str(config.get("model_type") or ""))
    gain = len(entry.shape) == 1 and _NORM.search(entry.name) and not _PLAIN.search(entry.name)
    return 1.0 if less_one and gain else 0.0


def _no_weight(entry: Entry) -> str | None:
    """Why these are not the values of a weight; `None` where they are."""
    if entry.dtype is None:
        return f"stored as {entry.stored or 'an unknown dtype'}, which torch does not have"
    if not entry.numel and max(entry.shape) > _LONGEST_SIDE:
        return f"{' x '.join(map(str, entry.shape))} has no values"
    if entry.decoded:
        return None
    word = dtype_name(entry.dtype)
    if entry.dtype in (torch.int8, torch.uint8):
        return f"{word} without scales beside it that are known here: its values are not known"
    if not entry.dtype.is_floating_point:
        return f"{word} values are no weights"
    if word.startswith(("float4", "float8_e8m0")):
        return f"{word} without its other half (codes and scales) beside it"
    return None


def _weight(entry: Entry, names: set[str], turned: bool, offset: float) -> Weight:
    assert entry.dtype is not None
    kind, assumed = _kind(entry)
    layer = entry.name.removesuffix(".weight")
    notes = [note for note in (entry.note, assumed) if note]
    return Weight(
        name=entry.name,
        layer=entry.name if layer in names else layer,
        shape=entry.shape,
        dtype=entry.dtype,
        kind=kind,
        load=entry.load,
        load_parts=entry.load_parts,
        transposed=(turned or entry.transposed) and len(entry.shape) > 1,
        note="; ".join(notes) or None,
        offset=offset,
    )


def _kind(entry: Entry) -> tuple[Kind, str | None]:
    """What it is read as, and what was assumed for that."""
    axes, name = len(entry.shape), entry.name
    if axes < 2:
        return "vector", None
    if axes == 2 and _TABLE.search(name):
        return "table", None
    if axes == 2:
        return ("embedding" if _EMBEDDING.search(name) else "linear"), None
    if axes == 3 and _EXPERTS.search(name):
        return "experts", None
    if axes == 3 and not _CONVOLUTION.search(name) and entry.shape[2] > _LONGEST_KERNEL:
        return "experts", "three axes, read as a stack of matrices"
    return "convolution", f"read as {entry.shape[0]} x {entry.numel // max(entry.shape[0], 1)}"


def _turned(entries: Sequence[Entry], config: Config) -> set[str]:
    """Names of weights that lie [in, out].

    A bias is as long as the outputs. Where that leaves a square matrix undecided, those of the
    same last word (`c_proj`) decide. Stacks of experts are told by the model's hidden size.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    votes: dict[str, list[bool]] = {}
    for entry in entries:
        rows, columns = entry.shape if len(entry.shape) == 2 else (0, 0)
        bias = shapes.get(entry.name.removesuffix("weight") + "bias")
        if rows != columns and bias in ((rows,), (columns,)):
            votes.setdefault(_word(entry.name), []).append(bias == (columns,))
    words = {word for word, all_ in votes.items() if all(all_)}
    flat = {e.name for e in entries if len(e.shape) == 2 and _word(e.name) in words}
    return flat | {entry.name for entry in entries if _stack_turned(entry, config)}


def _word(name: str) -> str:
    """`c_proj` of `h.0.attn.c_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else name


def _stack_turned(entry: Entry, config: Config) -> bool:
    """Does `gate_up_proj` [experts, hidden, …] or `down_proj` [experts, …, hidden] lie [in, out]?

    Decided where the hidden size is known and only one axis has it.
    """
    hidden = config.get("hidden_size")
    if len(entry.shape) != 3 or entry.decoded or hidden not in entry.shape[1:]:
        return False
    if entry.shape[1] == entry.shape[2]:
        return False
    first_is_hidden = bool(entry.shape[1] == hidden)
    word = _word(entry.name.removesuffix(".weight") + ".weight")
    if word in ("gate_up_proj", "gate_proj", "up_proj"):
        return first_is_hidden
    return word == "down_proj" and not first_is_hidden
