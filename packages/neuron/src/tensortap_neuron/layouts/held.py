"""What one module has in one pass of vLLM-Neuron: files by rank, and what their rows are.

How a tensor lies is told by its size next to the pass: a row for each token of the bucket, a row
for each request (logits of last tokens), an equal share of the bucket's rows on every rank
(sequence parallelism), or a row for each token of a text that was run again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tensortap.store.pieces import raw_bytes
from tensortap_neuron.layouts.names import is_residual
from tensortap_neuron.layouts.requests import Pass, Share

_RANK = re.compile(r"rank(\d{1,6})\.pt", re.ASCII)

Rows = Literal["tokens", "requests", "split", "again", "unknown"]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of one pass. `shape` is that of its rows, of one rank.

    `ranks` are those to be written: one where all hold the same. `whole`: each of them holds
    everything; else, unless rows are `split`, nobody knows what it holds.
    """

    files: Mapping[int, Path]
    rows: Rows
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    whole: bool

    @property
    def by_token(self) -> bool:
        """Do its rows stand for tokens, so that chunks can be put together?"""
        return self.rows in ("tokens", "split")


def modules_of(path: Path) -> dict[str, dict[int, Path]]:
    """Module -> rank -> file of a pass; other entries of its folder are not ours."""
    found = {
        where.name: {
            int(match[1]): file
            for file in sorted(where.iterdir())
            if (match := _RANK.fullmatch(file.name))
        }
        for where in sorted(path.iterdir())
        if where.is_dir()
    }
    return {module: dict(sorted(files.items())) for module, files in found.items() if files}


def held(
    one: Pass, name: str, files: Mapping[int, Path], tensors: Mapping[int, torch.Tensor]
) -> Held:
    """Look at what ranks hold; `tensors` are those of `files` that could be read."""
    first = next(iter(tensors.values()))
    same = all(_equal(first, other) for other in tensors.values())
    rows, shape = _rows(one, name, len(files), tuple(first.shape), same)
    whole = same or (is_residual(name) and rows != "split" and _one_shape(tensors))
    ranks = tuple(tensors)[:1] if same else tuple(tensors)
    return Held({rank: files[rank] for rank in tensors}, rows, shape, ranks, whole)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(raw_bytes(one), raw_bytes(other))


def _one_shape(tensors: Mapping[int, torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors.values()}) == 1


def _rows(
    one: Pass, name: str, ranks: int, stored: tuple[int, ...], same: bool
) -> tuple[Rows, tuple[int, ...]]:
    shape = rows_first(stored, one)
    if one.whole is not None or not shape:
        return "unknown", stored
    if shape[0] == one.rows:
        return "tokens", shape
    if not one.is_prefill and len(one.shares) == 1 and shape[0] == one.last + 1:
        return "again", shape
    if not same and is_residual(name) and shape[0] * ranks == one.rows:
        return "split", shape
    return ("requests", shape) if shape[0] == len(one.shares) else ("unknown", stored)


def rows_first(shape: Sequence[int], one: Pass) -> tuple[int, ...]:
    """The shape without an axis of length 1 for the batch, or for the one position of each row."""
    if len(shape) > 2 and shape[0] == 1 and shape[1] in (one.rows, one.last + 1):
        return tuple(shape[1:])
    if len(shape) > 2 and shape[0] != 1 and shape[1] == 1:
        return (shape[0], *shape[2:])
    return tuple(shape)


def rows_of(kept: Held, number: int, share: Share, rank: int) -> tuple[range, tuple[int, ...]]:
    """The rows of a file that are a request's, and the positions of their tokens.

    `number` is the request's place among those of the pass.
    """
    if kept.rows == "again":
        return range(kept.shape[0] - len(share.positions), kept.shape[0]), share.positions
    if kept.rows == "requests":
        return range(number, number + 1), share.positions[-1:]
    if kept.rows == "tokens":
        return range(share.start, share.stop), share.positions
    first = rank * kept.shape[0]
    start, stop = max(share.start, first), min(share.stop, first + kept.shape[0])
    some = share.positions[start - share.start : max(stop, start) - share.start]
    return range(start - first, max(stop, start) - first), some
