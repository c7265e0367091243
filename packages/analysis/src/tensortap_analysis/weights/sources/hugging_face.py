"""Folders in the shape of Hugging Face's, with shards and index, and those in its cache."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensortap_analysis.weights.sources import safetensors_files, state_dict
from tensortap_analysis.weights.sources.source import (
    CheckpointError,
    Entry,
    Listing,
    plain_name,
    regular,
    short_text,
)

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_REPOSITORY = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}(?:@[\w.-]{1,96})?")
_LARGEST_DOCUMENT = 256 << 20


def listing(folder: Path) -> Listing | None:
    """The weights of a folder; `None` where it holds none in a way that is known here.

    An index decides which shards are read; without one `model.safetensors`,
    `pytorch_model.bin`, and at last all `.safetensors` files. Raises `CheckpointError` for a
    shard that is missing, and for an index that names tensors its shards do not have.
    """
    for name in _INDICES:
        if (folder / name).exists():
            return _indexed(folder, folder / name)
    names = [name for name in _WHOLE if (folder / name).exists()][:1]
    names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    names = names or sorted(path.name for path in folder.glob("*.bin") if path.is_file())
    return _together(folder, names) if names else None


def cached(name: str) -> Path | None:
    """The snapshot of a hub name (`org/model`, `org/model@revision`) in the local cache.

    `None` where the text cannot be such a name; raises `CheckpointError` where it is not in the
    cache. Nothing is ever downloaded.
    """
    if not _REPOSITORY.fullmatch(name) or any(set(part) <= {"."} for part in name.split("/")):
        return None
    repository, _, revision = name.partition("@")
    home = _cache() / f"models--{repository.replace('/', '--')}"
    if not home.is_dir():
        return None
    commit = _commit(home, revision or "main")
    snapshot = home / "snapshots" / commit
    if not snapshot.is_dir():
        have = ", ".join(sorted(path.name for path in (home / "snapshots").glob("*"))) or "none"
        raise CheckpointError(
            f"{name} is not in the cache at revision {revision or 'main'} (there: {have}). "
            f"Download it first: hf download {repository}."
        )
    return snapshot


def _cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    set_ = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(set_ or os.path.join(home, "hub")).expanduser()


def _commit(home: Path, revision: str) -> str:
    """What a branch or tag stands for; a commit stands for itself."""
    reference = home / "refs" / revision
    if not reference.is_file():
        return revision
    return plain_name(short_text(reference), reference)


def _indexed(folder: Path, index: Path) -> Listing:
    where = document(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise CheckpointError(f"{index} has no weight_map; it is not the index of a checkpoint.")
    names = sorted({plain_name(shard, index) for shard in where.values()})
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names)} shards: {', '.join(absent[:5])}"
            f"{', …' if len(absent) > 5 else ''}. Download them, or scan one file by its path."
        )
    found = _together(folder, names)
    have = {entry.name: entry for entry in found.entries}
    if lost := [name for name in where if name not in have]:
        raise CheckpointError(
            f"{index} lists {len(lost)} tensors that no shard holds: {', '.join(lost[:3])}. "
            "Index and shards do not belong together."
        )
    return Listing((*found.entries,), (*found.files, index), found.skipped, found.config)


def _together(folder: Path, names: Sequence[str]) -> Listing:
    """All tensors of some files of a folder; no two may have the same name."""
    parts = [_reader(folder / name)(folder / name) for name in names]
    seen: dict[str, str] = {}
    for file, part in zip(names, parts, strict=True):
        for entry in part.entries:
            if entry.name in seen:
                raise CheckpointError(
                    f"{folder}: {entry.name!r} is both in {seen[entry.name]} and in {file}. "
                    "Scan one of the files by its path."
                )
            seen[entry.name] = file
    entries = sorted(
        (entry for part in parts for entry in part.entries),
        key=lambda entry: safetensors_files.in_layers(entry.name),
    )
    return Listing(
        tuple(entries),
        (*(file for part in parts for file in part.files), *_config_file(folder)),
        tuple(skipped for part in parts for skipped in part.skipped),
        config_of(folder),
        tuple(note for part in parts for note in part.notes),
    )


def _reader(path: Path) -> Callable[[Path], Listing]:
    return _safetensors if path.suffix == ".safetensors" else state_dict.listing


def _safetensors(path: Path) -> Listing:
    found: list[Entry] = safetensors_files.entries(path)
    return Listing(tuple(found), (regular(path),))


def single(path: Path) -> Listing:
    """One safetensors file, with the `config.json` beside it."""
    found = _safetensors(path)
    files = (*found.files, *_config_file(path.parent))
    return Listing(found.entries, files, config=config_of(path.parent))


def config_of(folder: Path) -> dict[str, Any]:
    """`config.json` of a model, with the part about its text model on top; empty without one."""
    found = _config_file(folder)
    if not found:
        return {}
    config = document(found[0])
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _config_file(folder: Path) -> tuple[Path, ...]:
    """It says how weights are packed and lie, so a scan depends on it as on the weights."""
    path = folder / "config.json"
    return (path,) if path.is_file() else ()


def document(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `CheckpointError`."""
    try:
        if regular(path).stat().st_size > _LARGEST_DOCUMENT:
            raise ValueError("it is too large to be one")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise CheckpointError(f"{path} is no JSON document: {failure}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return found
