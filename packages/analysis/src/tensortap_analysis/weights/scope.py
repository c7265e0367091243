"""`Scope`: a checkpoint or module under the microscope."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tensortap.errors import SelectionError, nearest
from tensortap.selection import Selection
from tensortap_analysis.weights.journal import Journal, key_of
from tensortap_analysis.weights.options import Options, chosen_methods
from tensortap_analysis.weights.result import Facts, Peer, ScanResult, check_target
from tensortap_analysis.weights.roles import beside
from tensortap_analysis.weights.scanning import Measured, methods_of, run, same_values
from tensortap_analysis.weights.sources import Skipped, Source, open_source
from tensortap_analysis.weights.weight import Weight

Progress = Callable[[int, int], None]
"""Gets the bytes that are done and the bytes there are."""


class Scope:
    """The weights of a model: a file, a folder, a name in the hub's cache, or a live module.

        for layer, stats in Scope("path/to/model").scan(methods=["spectral"]).items():
            print(layer, stats["spectral"]["condition_number"])

    Raises `CheckpointError` where there is nothing that can be read. Opening reads headers only.
    """

    def __init__(self, model: str | os.PathLike[str] | nn.Module) -> None:
        self._source: Source = open_source(model)

    @property
    def source(self) -> Source:
        """The weights there are, what was skipped, and what is known of the files."""
        return self._source

    def weights(self, select: str | Iterable[str] = "*") -> tuple[Weight, ...]:
        """The weights whose layer is selected; raises `SelectionError` for none."""
        wanted = Selection.parse(select)
        found = tuple(
            weight for weight in self._source.weights if wanted.matches_module(weight.layer)
        )
        if not found:
            names = [weight.layer for weight in self._source.weights]
            raise SelectionError(
                f"The selection {wanted.text!r} matches nothing in {self._source.label}. "
                f"Closest layers: {nearest(wanted.text, names)}."
            )
        return found

    def unmatched(self, select: str | Iterable[str]) -> list[str]:
        """The patterns of a selection that match no layer."""
        return Selection.parse(select).dead([f"{one.layer}/" for one in self._source.weights], ())

    def scan(
        self,
        methods: str | Iterable[str] = "all",
        *,
        select: str | Iterable[str] = "*",
        parallel: bool | int = False,
        options: Options | None = None,
        output: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        progress: Progress = lambda done, total: None,
        told: Callable[[str], None] = lambda sentence: None,
    ) -> ScanResult:
        """Measure the selected weights by `methods` (`"all"`, or some of `METHODS`).

        `parallel`: how many workers, `True` for one a core; the numbers do not depend on it. Each
        holds one weight at a time. With `output` the result is saved there, and until then a
        journal beside it: an interrupted scan of the same files goes on where it was. A file that
        is there is replaced if it is a scan of the same model, any other with `overwrite` only.
        `progress` gets bytes done and bytes in all, `told` what was taken over from before. Raises
        `ConfigError`, `SelectionError`, and `CheckpointError` for a file that turns out broken.
        """
        names, options = chosen_methods(methods), options or Options()
        weights = self.weights(select)
        todo = [weight for weight in weights if methods_of(weight, names)]
        if output is not None:
            check_target(Path(output), self._source.label, overwrite)
        with self._journal(output, names, options) as log:
            if log is not None and (have := [one for one in todo if one.name in log.done]):
                told(f"goes on: {len(have):,} of {len(todo):,} weights are in {log.path} already")
            extra = beside(weights, self._source.weights) if "norms" in names else []
            total = sum(weight.nbytes for weight in extra)
            found = _measure(
                todo, names, options, parallel, log, lambda done, all_: progress(done, all_ + total)
            )
            result = _result(self._source, weights, names, options, found)
            before = sum(weight.nbytes for weight in todo)
            result = _with_peers(result, extra, options, parallel, progress, before)
        if output is not None:
            result.save(output)
        if log is not None:
            log.discard()
        return result

    def compare_with(
        self,
        other: Scope,
        *,
        select: str | Iterable[str] = "*",
        parallel: bool | int = False,
        spectral: bool = True,
    ) -> dict[str, Any]:
        """How the weights became those of `other`: `["layer_comparisons"][layer]`, a dictionary.

        Its `l2_norm_ratio` is other over self; see `tensortap_analysis.weights.drift.track` for
        the rest, and for more than two checkpoints.
        """
        # Imported here: following weights builds on scopes.
        from tensortap_analysis.weights.drift import track

        steps = track((self, other), select=select, parallel=parallel, spectral=spectral)
        return steps[0].as_dict()

    def _journal(
        self, output: str | os.PathLike[str] | None, methods: tuple[str, ...], options: Options
    ) -> Journal | nullcontext[None]:
        """Beside the output; a live module has none, for nobody knows whether it is the same."""
        if output is None or not self._source.identity:
            return nullcontext()
        return Journal(Path(f"{output}.journal"), key_of(self._source, methods, options))


def _measure(
    weights: Sequence[Weight],
    methods: tuple[str, ...],
    options: Options,
    parallel: bool | int,
    log: Journal | None,
    progress: Progress,
) -> dict[str, Measured]:
    """By name; what the journal has is not measured again."""
    total = sum(weight.nbytes for weight in weights)
    have = {} if log is None else log.done
    found = {weight.name: have[weight.name] for weight in weights if weight.name in have}
    read = sum(weight.nbytes for weight in weights if weight.name in found)
    progress(read, total)

    def done(weight: Weight, measured: Measured) -> None:
        nonlocal read
        found[weight.name] = measured
        if log is not None:
            log.add(weight.name, measured)
        read += weight.nbytes
        progress(read, total)

    left = [weight for weight in weights if weight.name not in found]
    run(left, methods, options, parallel=parallel, done=done)
    return found


def _result(
    source: Source,
    weights: Sequence[Weight],
    methods: tuple[str, ...],
    options: Options,
    found: Mapping[str, Measured],
) -> ScanResult:
    """In the order of the checkpoint; copies are told as such, and every gap has a reason."""
    have = [weight for weight in weights if weight.name in found]
    copies = same_values(have, found)
    return ScanResult(
        source=source.label,
        methods=methods,
        options=options,
        layers={w.layer: found[w.name]["stats"] for w in have if w.has_spectrum},
        vectors={w.layer: found[w.name]["stats"] for w in have if not w.has_spectrum},
        facts={weight.layer: Facts.of(weight, copies.get(weight.name)) for weight in have},
        skipped=(*source.skipped, *_left_out(weights, methods)),
        notes=(*source.notes, *_said_of(copies)),
    )


def _with_peers(
    result: ScanResult,
    others: Sequence[Weight],
    options: Options,
    parallel: bool | int,
    progress: Progress,
    before: int,
) -> ScanResult:
    """The scan of a selection, with the norms of weights that tell what is usual.

    `before` are the bytes that were read for the selection.
    """
    if not others:
        return result
    found = _measure(
        others, ("norms",), options, parallel, None,
        lambda done, total: progress(before + done, before + total),
    )  # fmt: skip
    peers = {one.layer: Peer(Facts.of(one), found[one.name]["stats"]) for one in others}
    count = "1 weight" if len(others) == 1 else f"{len(others):,} weights"
    note = f"norms of {count} that were not selected were measured too, to compare with"
    return replace(result, peers=peers, notes=(*result.notes, note))


def _said_of(copies: Mapping[str, str]) -> Iterable[str]:
    if copies:
        name, same = next(iter(copies.items()))
        more = f" (and {len(copies) - 1:,} more)" if len(copies) > 1 else ""
        yield f"{name} has the very values of {same}{more}: tied or copied"


def _left_out(weights: Sequence[Weight], methods: Sequence[str]) -> Iterable[Skipped]:
    for weight in weights:
        has = methods_of(weight, methods)
        for method in methods:
            if method not in has:
                reasons = _TABLE if weight.kind == "table" else _VECTOR
                yield Skipped(weight.name, reasons[method], method)


_VECTOR = {
    "spectral": "a vector has no spectrum",
    "quantization": "vectors stay in their precision when a model is quantised",
}
_TABLE = {
    "spectral": "a table that is no factor of a product: its spectrum says nothing",
    "quantization": "tables stay in their precision when a model is quantised",
}
