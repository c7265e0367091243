"""From what a user names to a `Source`: a path, a name in the hub's cache, or a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from tensortap_analysis.weights.sources import hugging_face, live, megatron, state_dict
from tensortap_analysis.weights.sources.describing import described
from tensortap_analysis.weights.sources.source import (
    CheckpointError,
    Listing,
    Skipped,
    Source,
    identity_of,
)

_STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt")
_FOLDERS: Sequence[Callable[[Path], Listing | None]] = (megatron.listing, hugging_face.listing)


def open_source(model: str | os.PathLike[str] | nn.Module) -> Source:
    """What can be scanned of `model`; reads headers and indices, no values.

    Raises `CheckpointError` where there is nothing of that name, or nothing that can be read.
    """
    if isinstance(model, nn.Module):
        return _source(type(model).__name__, live.listing(model))
    path = Path(model)
    if path.is_dir():
        return _source(str(model), _folder(path))
    if path.exists():
        return _source(str(model), _file(path))
    snapshot = hugging_face.cached(str(model))
    if snapshot is None:
        raise CheckpointError(
            f"There is no file or folder {model}, and no model of that name in the Hugging Face "
            "cache. Nothing is downloaded here: give a path, or download it first."
        )
    return _source(str(model), _folder(snapshot))


def _source(label: str, listing: Listing) -> Source:
    weights, skipped = described(listing)
    if not weights:
        raise CheckpointError(f"{label} holds no weights{_because(skipped)}.")
    return Source(label, weights, skipped, identity_of(listing.files), listing.notes)


def _because(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    return f": {skipped[0].name} and {len(skipped) - 1:,} more are none ({skipped[0].reason})"


def _folder(path: Path) -> Listing:
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} is a run of tensortap, not a checkpoint: it holds what was captured. "
            f"tensortap show {path} lists it, tensortap compare A B compares two."
        )
    path = megatron.latest(path) or path
    for read in _FOLDERS:
        found = read(path)
        if found is not None:
            return found
    named = sorted(one for one in path.iterdir() if one.suffix in _STATE_DICTS and one.is_file())
    if len(named) == 1:
        return state_dict.listing(named[0])
    raise CheckpointError(
        f"{path} holds no checkpoint that is known: safetensors, a Hugging Face folder, a "
        f"distributed or Megatron checkpoint, one file of torch.save.{_hint(path, named)}"
    )


def _hint(path: Path, named: Sequence[Path]) -> str:
    """What else could have been meant: one of several files, or a folder below."""
    below = sorted({one.parent.name for one in path.glob("*/*.safetensors")})
    found = [one.name for one in named] or [f"{name}/" for name in below]
    return f" Scan one of: {', '.join(found[:8])}." if found else ""


def _file(path: Path) -> Listing:
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return hugging_face.single(path)
    if path.suffix == ".json" and path.name.endswith(".index.json"):
        return _folder(path.parent)
    if path.suffix in _STATE_DICTS or path.is_file():
        return state_dict.listing(path)
    raise CheckpointError(f"{path} is neither a file nor a folder.")


def _is_safetensors(path: Path) -> bool:
    """A file without that suffix that begins as one does: a length, and a JSON object of it."""
    if path.suffix in _STATE_DICTS or not path.is_file():
        return False
    with path.open("rb") as file:
        length, start = int.from_bytes(file.read(8), "little"), file.read(1)
    return start == b"{" and length <= path.stat().st_size - 8
