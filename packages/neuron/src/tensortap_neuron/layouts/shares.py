"""Tensors of passes of vLLM-Neuron, cut into what each request has of them.

Ranks that hold the same bits are written once. Where ranks differ their placement is unknown,
except for rows that sequence parallelism divides, and for tensors of the residual stream: these
are whole on every rank, and that ranks disagree is for the reader to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tensortap.errors import ConfigError, RunError
from tensortap.names import TensorName
from tensortap.records import Coordinates, Placement
from tensortap_neuron.layouts.files import cause, read_tensor
from tensortap_neuron.layouts.forwards import Forward, Request
from tensortap_neuron.layouts.held import Held, held, modules_of, rows_of
from tensortap_neuron.layouts.importing import Findings, Piece
from tensortap_neuron.layouts.names import canonical_names, is_residual, place, word_of
from tensortap_neuron.layouts.requests import Pass, Share, runs_of

_SAME = "ranks of one tensor-parallel group hold the same values, which are written once"
_UNKNOWN = "its ranks hold different values, and nothing says how they lie: placement unknown"
_UNDIVIDED = "its rows are neither the tokens nor the requests of a pass: kept as they are"

Part = tuple[Pass, Share | None, Held]


@dataclass(slots=True)
class Pieces:
    """What is there to write, and the place of each rank among the others."""

    found: list[Piece] = field(default_factory=list)
    parallel: dict[int, dict[str, int]] = field(default_factory=dict)


class Shares:
    """Makes pieces of requests; what cannot be read is said in `findings`.

    `hidden` is the width of the model, where that is known: what is beyond it is padding.
    """

    def __init__(self, folder: Path, findings: Findings, hidden: int | None = None) -> None:
        self._folder = folder
        self._findings = findings
        self._hidden = hidden
        self._names: dict[str, str] = {}
        self._held: dict[Path, dict[str, Held]] = {}

    def pieces(self, requests: Sequence[Request]) -> Pieces:
        """Every tensor of every forward, on the ranks that hold it."""
        passes = {one.path: one for r in requests for f in r.forwards for one, _ in f.parts}
        modules = {path: modules_of(path) for path in passes}
        paths = sorted({name for some in modules.values() for name in some})
        self._names = canonical_names(paths, fused=True)
        for path, some in modules.items():
            self._held[path] = {
                module: kept
                for module, files in some.items()
                if (kept := self._hold(passes[path], module, files)) is not None
            }
        ranks = self._ranks(passes)
        pieces = Pieces(parallel=_parallel(ranks))
        for step, request in enumerate(requests):
            for forward in request.forwards:
                pieces.found += self._of_forward(step, request.replica, forward, ranks)
        return pieces

    def _hold(self, one: Pass, module: str, files: Mapping[int, Path]) -> Held | None:
        name, tensors = self._names[module], {}
        for rank, path in files.items():
            try:
                TensorName(name, "forward", "output")
                tensors[rank] = read_tensor(path)
            except (RunError, ConfigError) as failure:
                reason = cause(failure, path) if isinstance(failure, RunError) else str(failure)
                self._findings.skip(f"{name}/forward/output", self._relative(path), reason)
        if not tensors:
            return None
        kept = held(one, name, files, tensors)
        if len(tensors) > 1 and kept.whole and len(kept.ranks) == 1:
            self._findings.notes.append(("*", _SAME))
        if not kept.whole and kept.rows != "split":
            self._findings.notes.append((name, _UNKNOWN))
        if kept.rows == "unknown" and one.whole is None:
            self._findings.notes.append((name, _UNDIVIDED))
        return kept

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._folder))

    def _ranks(self, passes: Mapping[Path, Pass]) -> dict[tuple[int, int], int]:
        """(replica, tensor-parallel rank) -> rank, without gaps, of those that are written."""
        used = {
            (passes[path].replica, rank)
            for path, some in self._held.items()
            for kept in some.values()
            for rank in kept.ranks
        }
        return {where: number for number, where in enumerate(sorted(used))}

    def _of_forward(
        self, step: int, replica: int, forward: Forward, ranks: Mapping[tuple[int, int], int]
    ) -> Iterator[Piece]:
        modules = {module for one, _ in forward.parts for module in self._held[one.path]}
        for module in sorted(modules, key=lambda module: place(self._names[module])):
            parts = [
                (one, share, self._held[one.path][module])
                for one, share in forward.parts
                if module in self._held[one.path]
            ]
            for call, some in enumerate(_calls(forward, parts), start=forward.call):
                for rank in sorted({rank for _, _, kept in some for rank in kept.ranks}):
                    at = Coordinates(step, forward.microbatch, call, ranks[replica, rank])
                    yield from self._piece(module, at, rank, some, forward.positions)

    def _piece(
        self,
        module: str,
        at: Coordinates,
        rank: int,
        parts: Sequence[Part],
        everything: Sequence[int],
    ) -> Iterator[Piece]:
        name, kept = self._names[module], parts[0][2]
        cuts = [_cut(part, rank) for part in parts if rank in part[2].files]
        positions = [position for cut in cuts for position in cut.positions]
        if kept.rows == "split" and not positions:
            return  # This rank has none of the request's tokens.
        batched = kept.rows != "unknown" and word_of(name) != "mlp.router"
        yield Piece(
            TensorName(name, "forward", "output"),
            module,
            at,
            partial(_read, cuts, batched),
            self._relative(cuts[0].path),
            self._placement(name, parts, positions, everything, batched, at.microbatch == 0),
        )

    def _placement(
        self,
        name: str,
        parts: Sequence[Part],
        positions: Sequence[int],
        everything: Sequence[int],
        batched: bool,
        prompt: bool,
    ) -> Placement | None:
        """Where rows lie in the text, unless they are all of it, and where the width ends."""
        kept = parts[0][2]
        if kept.rows != "split" and not all(kept.whole for _, _, kept in parts):
            return Placement(unknown=True)
        valid = {}
        if self._hidden is not None and is_residual(name) and kept.shape[-1] > self._hidden:
            valid = {len(kept.shape) - 1 + int(batched): self._hidden}
        if kept.by_token:
            start = 0 if prompt else everything[0]
            end, runs = everything[-1] + 1 - start, runs_of([at - start for at in positions])
            if runs != ((0, end),):
                shape = (*([1] * batched), end, *kept.shape[1:])
                return Placement(shape, {int(batched): runs}, valid)
        return Placement(valid=valid) if valid else None


@dataclass(frozen=True, slots=True)
class Cut:
    """Some rows of one file; `rows` is `None` where all of it is meant, as it is stored."""

    path: Path
    shape: tuple[int, ...]
    rows: range | None = None
    positions: tuple[int, ...] = ()


def _cut(part: Part, rank: int) -> Cut:
    one, share, kept = part
    if share is None or kept.rows == "unknown":
        return Cut(kept.files[rank], kept.shape)
    rows, positions = rows_of(kept, one.shares.index(share), share, rank)
    return Cut(kept.files[rank], kept.shape, rows, positions)


def _calls(forward: Forward, parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Chunks of tokens are one tensor; of a row for each request only the last chunk counts."""
    kinds = {kept.rows for _, _, kept in parts}
    if len(kinds) == 1 and all(kept.by_token for _, _, kept in parts):
        return [parts]
    if kinds == {"requests"}:
        return [[part] for part in parts[-1:] if part[0] is forward.parts[-1][0]]
    return [[part] for part in parts]


def _read(cuts: Sequence[Cut], batched: bool) -> torch.Tensor:
    """The rows of all chunks, behind an axis for the batch."""
    found = []
    for cut in cuts:
        tensor = read_tensor(cut.path)
        if cut.rows is None:
            return tensor
        found.append(tensor.reshape(cut.shape)[cut.rows.start : cut.rows.stop])
    if len({tensor.dtype for tensor in found}) > 1:
        raise RunError(f"{cuts[0].path} and other chunks of the prompt differ in dtype.")
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole.unsqueeze(0) if batched else whole


def _parallel(ranks: Mapping[tuple[int, int], int]) -> dict[int, dict[str, int]]:
    if len(ranks) < 2:
        return {}
    size = max(rank for _, rank in ranks) + 1
    return {number: {"tp": size, "tp_rank": rank} for (_, rank), number in ranks.items()}
