"""The layout `layer-npy`: `mode_<m>_layer_<i>.npy` for each layer, and `mode_<m>_stats.json`.

As in the older scripts a layer's file holds the output of its mixer, before the residual is
added; of a layer without a mixer its own output. The JSON says which, and in which basis.
Samples of one length lie along the batch axis; else each is a file, `…_sample_<n>.npy`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tensortap.errors import RunError, RunExists
from tensortap.layouts import Moved, Progress
from tensortap.selection import Selection
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap.store.dtypes import dtype_name
from tensortap_hf.layouts import arrays
from tensortap_hf.layouts.exported import Told, require, samples
from tensortap_hf.layouts.imported import UNKNOWN, OldRun, by_sample, json_of, write

_OUTPUT = re.compile(r"layers\.(?P<layer>\d+)(?P<mixer>\.mixer)?/forward/output")
_FILE = re.compile(
    r"mode_(?P<mode>[A-Za-z0-9][A-Za-z0-9._-]*)_layer_(?P<layer>\d{1,9})"
    r"(?:_sample_(?P<sample>\d{1,9}))?\.npy",
    re.ASCII,
)
NOTE = (
    "a layer is the output of its mixer, before the residual is added, unless `tensor` says "
    "otherwise; `basis` is that of the residual stream"
)


class LayerNpy:
    """`layer-npy`; several modes share a folder, which an import makes a run of each."""

    name = "layer-npy"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; adds to a folder that has nothing of this mode yet."""
        told = Told.by(run)
        mode = arrays.file_word(told.mode)
        names = chosen(run, select)
        require(names, run, "a layer's or mixer's output")
        _require_new(out, mode)
        layers: dict[str, Any] = {}
        skipped, files, records = [], 0, 0
        for layer, name in names.items():
            found, why = samples(run, name, progress, records)
            skipped += why
            records += len(found)
            for suffix, values in arrays.together(found).items() if found else ():
                np.save(out / f"mode_{mode}_layer_{layer}{suffix}.npy", arrays.array(values))
                said = {
                    "tensor": name,
                    "dtype": dtype_name(values.dtype),
                    **arrays.described(values),
                }
                layers[f"{layer}{suffix}"] = {**said, "samples": 1 if suffix else len(found)}
                files += 1
        if not files:
            raise RunError(f"{run.path} holds {skipped[0]}.")
        _write_stats(out / f"mode_{mode}_stats.json", told, layers)
        return Moved(records, files + 1, tuple(skipped))

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`; also what the older scripts wrote, whose JSON is empty."""
        modes: dict[str, dict[tuple[int, int], Path]] = {}
        for path in folder.glob("mode_*_layer_*.npy"):
            found = _FILE.fullmatch(path.name)
            if found is not None:
                key = int(found["layer"]), int(found["sample"] or 0)
                modes.setdefault(found["mode"], {})[key] = path
        if not modes:
            raise RunError(f"{folder} holds no mode_<m>_layer_<i>.npy, as layer-npy has them.")
        runs = [_old_run(folder, mode, files) for mode, files in sorted(modes.items())]
        return write(runs, sink, sum(map(len, modes.values())), progress)


def chosen(run: Run, select: str) -> Mapping[int, str]:
    """Layer -> its tensor: the mixer's output where that is selected, else the layer's."""
    selection = Selection.parse(select)
    found: dict[int, str] = {}
    for name in run.names():
        match = _OUTPUT.fullmatch(name)
        if match is not None and selection.matches(name):
            layer = int(match["layer"])
            if match["mixer"] or layer not in found:
                found[layer] = name
    return dict(sorted(found.items()))


def _require_new(out: Path, mode: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = [match["mode"] for path in out.iterdir() if (match := _FILE.fullmatch(path.name))]
    if mode in found or (out / f"mode_{mode}_stats.json").exists():
        raise RunExists(f"{out} holds mode {mode} already; choose another --out, or remove it.")


def _write_stats(path: Path, told: Told, layers: Mapping[str, Any]) -> None:
    document = {
        "timestamp": told.created,
        "model": told.model,
        "mode": told.mode,
        "family": told.family,
        "basis": told.basis,
        "format": told.format,
        "note": NOTE,
        "layers": layers,
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _old_run(folder: Path, mode: str, files: Mapping[tuple[int, int], Path]) -> OldRun:
    stats_file = folder / f"mode_{mode}_stats.json"
    stats = json_of(stats_file)
    tensors: dict[str, list[Any]] = {}
    for (layer, sample), path in sorted(files.items()):
        key = f"{layer}_sample_{sample}" if "_sample_" in path.name else str(layer)
        said = arrays.field(arrays.field(stats, "layers"), key)
        name = arrays.name(said.get("tensor", f"layers.{layer}.mixer/forward/output"), stats_file)
        values = arrays.tensor(arrays.read(path), said.get("dtype"))
        count = arrays.whole(said, "samples", stats_file)
        tensors.setdefault(name, []).extend(arrays.apart(values, count))
    return OldRun(
        mode,
        str(stats.get("family", "")),
        str(stats.get("basis", UNKNOWN)),
        stats.get("format"),
        str(stats.get("timestamp", "")),
        str(stats.get("model", "")),
        by_sample(tensors.items()),
        {"layers": sorted({layer for layer, _ in files})},
    )


LAYER_NPY = LayerNpy()
"""What the entry point names."""
