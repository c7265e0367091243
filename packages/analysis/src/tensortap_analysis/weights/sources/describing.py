"""What each tensor of a checkpoint is: a linear layer's weight, an embedding, experts, a vector."""

from __future__ import annotations

import torch

from tensortap.store.dtypes import dtype_name
from tensortap_analysis.weights.packed import unpacked
from tensortap_analysis.weights.sources.kinds import kind_of, offset_of
from tensortap_analysis.weights.sources.source import Entry, Listing, Skipped
from tensortap_analysis.weights.sources.turning import turned as turned_of
from tensortap_analysis.weights.weight import Weight

_LONGEST_STACK = 1 << 16
_LONGEST_SIDE = 1 << 24
"""Metrics of columns take memory by their number; a shape of no values can claim any."""


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
    turned = turned_of(kept, listing.config)
    weights = (
        _weight(entry, names, entry.name in turned, offset_of(entry, listing.config))
        for entry in kept
    )
    return tuple(weights), tuple(skipped)


def _no_weight(entry: Entry) -> str | None:
    """Why these are not the values of a weight; `None` where they are."""
    if entry.dtype is None:
        return f"stored as {entry.stored or 'an unknown dtype'}, which torch does not have"
    stack = len(entry.shape) > 2 and entry.shape[0] > _LONGEST_STACK
    if not entry.numel and (stack or max(entry.shape) > _LONGEST_SIDE):
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
    kind, assumed = kind_of(entry)
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
