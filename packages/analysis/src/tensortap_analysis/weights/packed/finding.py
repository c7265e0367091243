"""Which tensors of a checkpoint are codes, and which are the scales that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tensortap_analysis.weights.packed import four_bits, integers, scaled
from tensortap_analysis.weights.packed.codes import Found
from tensortap_analysis.weights.sources.source import CheckpointError, Config, Entry, Skipped

_Decoder = Callable[[str, Mapping[str, Entry], Config], "Found | None"]
_LONGEST = 120
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
        with _belonging(name):
            decoders = (decoder(name, by_name, config) for decoder in _DECODERS)
            found = next((one for one in decoders if one), None)
        if found is None:
            continue
        taken.update({other: f"belongs to {found.name}" for other in found.beside})
        if found.entry is None:
            taken[name] = found.reason
        else:
            decoded[name] = _guarded(found.entry)
    skipped += [Skipped(name, reason) for name, reason in taken.items() if name not in decoded]
    kept = [decoded.get(name, entry) for name, entry in by_name.items() if name not in taken]
    return kept, skipped


@contextmanager
def _belonging(name: str) -> Iterator[None]:
    """Shapes and indices that do not go together are told as such, whatever torch calls them."""
    try:
        yield
    except (IndexError, ValueError, RuntimeError, ZeroDivisionError, OverflowError) as failure:
        said = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise CheckpointError(
            f"{name}: its codes and scales do not belong together ({said[:_LONGEST]}). Download or "
            "quantise it again."
        ) from failure


def _guarded(entry: Entry) -> Entry:
    """The same, whose values are read with that care."""
    load, load_parts = entry.load, entry.load_parts

    def guarded() -> torch.Tensor:
        with _belonging(entry.name):
            return load()

    def parts() -> Iterator[torch.Tensor]:
        with _belonging(entry.name):
            yield from load_parts() if load_parts is not None else ()

    return replace(entry, load=guarded, load_parts=None if load_parts is None else parts)
