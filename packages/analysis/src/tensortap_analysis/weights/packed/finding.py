"""Which tensors of a checkpoint are codes, and which are the scales that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tensortap_analysis.weights.packed import four_bits, integers, scaled
from tensortap_analysis.weights.packed.codes import Found
from tensortap_analysis.weights.sources.source import Config, Entry, Skipped

_Decoder = Callable[[str, Mapping[str, Entry], Config], "Found | None"]
_DECODERS: Sequence[_Decoder] = (
    scaled.found,
    four_bits.mxfp4,
    four_bits.nvfp4,
    integers.compressed,
    integers.gptq_or_awq,
    four_bits.bitsandbytes,
)


def unpacked(entries: Sequence[Entry], config: Config) -> tuple[list[Entry], list[Skipped]]:
    """Entries whose `load` gives values, and what is left out: scales, and codes nobody can read.

    Codes and scales are found by the names that the tools writing them use; see the modules of
    this package.
    """
    by_name = {entry.name: entry for entry in entries}
    decoded: dict[str, Entry] = {}
    taken: dict[str, str] = {}
    skipped: list[Skipped] = []
    for name in by_name:
        found = next((one for one in (d(name, by_name, config) for d in _DECODERS) if one), None)
        if found is None:
            continue
        taken.update({other: f"belongs to {found.name}" for other in found.beside})
        if found.entry is None:
            taken[name] = found.reason
        else:
            decoded[name] = found.entry
    skipped += [Skipped(name, reason) for name, reason in taken.items() if name not in decoded]
    kept = [decoded.get(name, entry) for name, entry in by_name.items() if name not in taken]
    return kept, skipped
