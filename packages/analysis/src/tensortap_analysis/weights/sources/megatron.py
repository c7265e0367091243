"""Checkpoints of Megatron: distributed ones, whose layers are stacked, and one file a rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tensortap_analysis.weights.sources import distributed, state_dict
from tensortap_analysis.weights.sources.distributed import Stored
from tensortap_analysis.weights.sources.hugging_face import document
from tensortap_analysis.weights.sources.source import (
    CheckpointError,
    Entry,
    Listing,
    plain_name,
    short_text,
)

_LATEST = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"[0-9]{1,12}")
_RANK = re.compile(r"mp_rank_\d{2,}(?:_\d{3,})*")
_STACKED = re.compile(r"^(?P<before>(?:.*\.)?layers)\.(?P<after>(?!\d+(?:\.|$)).+)$")
"""`decoder.layers.mlp.linear_fc1.weight`: all layers in one tensor, along its first axis."""


def latest(folder: Path) -> Path | None:
    """The checkpoint that a training folder names as its latest; `None` where it names none."""
    path = folder / _LATEST
    if not path.is_file():
        return None
    word = short_text(path)
    number = _ITERATION.fullmatch(word)
    name = word if word == "release" else f"iter_{int(word):07d}" if number else ""
    found = folder / plain_name(name, path)
    if not found.is_dir():
        raise CheckpointError(f"{path} names {found.name}, which is not there.")
    return found


def listing(folder: Path) -> Listing | None:
    """The weights of one checkpoint folder; `None` where it is none of Megatron's or torch's."""
    if (folder / distributed.METADATA).exists():
        return _distributed(folder)
    if _backend(folder) == "zarr":
        raise CheckpointError(
            f"{folder} is in Megatron's old zarr format; convert it to torch_dist with Megatron."
        )
    ranks = sorted(path for path in folder.glob("mp_rank_*") if _RANK.fullmatch(path.name))
    return _by_rank(ranks) if ranks else None


def _backend(folder: Path) -> str | None:
    """The format that a folder's `metadata.json` names; other tools have files of that name."""
    try:
        found = document(folder / "metadata.json").get("sharded_backend")
    except CheckpointError:
        return None
    return found if isinstance(found, str) else None


def _distributed(folder: Path) -> Listing:
    tensors, skipped, files = distributed.stored(folder)
    return Listing(tuple(_in_layers(tensors)), files, skipped)


def _in_layers(tensors: list[Stored]) -> Iterator[Entry]:
    """What comes before the layers, all of layer 0, all of layer 1, …, what comes after."""
    rows = [(place, list(_layers(tensor))) for place, tensor in enumerate(tensors)]
    first = next((place for place, entries in rows if len(entries) > 1), len(rows))
    yield from (entry for place, entries in rows if place < first for entry in entries)
    later = [(len(entries) == 1, entries) for place, entries in rows if place >= first]
    ordered = (
        (alone, index, entry) for alone, entries in later for index, entry in enumerate(entries)
    )
    yield from (entry for *_, entry in sorted(ordered, key=lambda row: row[:2]))


def _layers(tensor: Stored) -> Iterator[Entry]:
    """One tensor of a stack of layers as an entry for each, under the layer's own name."""
    stacked = _STACKED.match(tensor.name)
    if stacked is None or len(tensor.shape) < 2:
        yield Entry(tensor.name, tensor.shape, tensor.dtype, _loader(tensor, None))
        return
    for index in range(tensor.shape[0]):
        name = f"{stacked['before']}.{index}.{stacked['after']}"
        yield Entry(name, tensor.shape[1:], tensor.dtype, _loader(tensor, index))


def _loader(tensor: Stored, index: int | None) -> Callable[[], torch.Tensor]:
    return lambda: tensor.read(index)


def _by_rank(ranks: list[Path]) -> Listing:
    """Files of ranks; of several each is scanned by itself, under the name of its rank."""
    parts = [(path.name, state_dict.listing(path / "model_optim_rng.pt")) for path in ranks]
    several = len(parts) > 1
    notes = [note for _, part in parts for note in part.notes]
    if several:
        notes.append(
            "every rank's file holds its piece of the weights: measured piece by piece, a "
            "condition number or rank is that of the piece"
        )
    entries = (
        entry.renamed(f"{rank}.{entry.name}") if several else entry
        for rank, part in parts
        for entry in part.entries
    )
    return Listing(
        tuple(entries),
        tuple(file for _, part in parts for file in part.files),
        tuple(one for _, part in parts for one in part.skipped),
        notes=tuple(notes),
    )
