"""The layout `first-layer-npz`: input and output of the first layer, all modes in one file.

`first_layer_io_all_modes.npz` holds `mode_<m>_input` and `mode_<m>_output` [batch, seq, hidden],
compressed, and `first_layer_io_all_modes_stats.json` statistics of each. As in the older scripts
the output is the mixer's, before the residual is added; of a layer without a mixer its own.
Samples of one length lie along the batch axis; else each has a file, `…_sample_<n>.npz`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensortap.errors import RunError, RunExists
from tensortap.layouts import Moved, Progress
from tensortap.selection import Selection
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap.store.dtypes import dtype_name
from tensortap_hf.layouts import arrays
from tensortap_hf.layouts.exported import Told, require, samples
from tensortap_hf.layouts.imported import UNKNOWN, OldRun, by_sample, json_of
from tensortap_hf.layouts.imported import write as write_runs

FILE = "first_layer_io_all_modes.npz"
_KEY = re.compile(r"mode_(?P<mode>[A-Za-z0-9][A-Za-z0-9._-]*)_(?P<what>input|output)", re.ASCII)
_LAYER = re.compile(r"(?P<layer>(?:.*\.)?layers\.(?P<number>\d+))(?P<mixer>\.mixer)?/forward/.*")
NOTE = (
    "`output` is that of the tensor named under `tensors`: the mixer's, before the residual is "
    "added, where there is one; `basis` is that of the residual stream"
)


@dataclass(frozen=True, slots=True)
class FirstLayer:
    """What one mode gives to its first layer, and gets."""

    mode: str
    family: str
    basis: str
    format: str | None
    tensors: tuple[str, str]
    """Names of input and output."""
    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, slots=True)
class About:
    """What the JSON says besides."""

    model: str
    pretrained_dir: str | None
    seq_len: int
    timestamp: str = ""


def choose(names: Sequence[str]) -> tuple[str, str]:
    """Names of the input of the first layer, and of the output that goes with it."""
    found = [match for name in names if (match := _LAYER.fullmatch(name))]
    if not found:
        raise RunError("No tensor of a layer was captured.")
    # An encoder runs before the decoder beside it.
    first = min(found, key=lambda m: (int(m["number"]), "decoder" in m["layer"]))["layer"]
    mixer = f"{first}.mixer/forward/output"
    return f"{first}/forward/input", mixer if mixer in names else f"{first}/forward/output"


def described(one: FirstLayer) -> dict[str, dict[str, Any]]:
    """Statistics of input and output, as the JSON has them."""
    return {"input": arrays.described(one.input), "output": arrays.described(one.output)}


def statistics(seen: Sequence[FirstLayer], about: About) -> dict[str, Any]:
    """The JSON beside the arrays; what follows `modes` is more than the older scripts wrote."""
    return {
        "timestamp": about.timestamp or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": about.model,
        "pretrained_dir": about.pretrained_dir,
        "seq_len": about.seq_len,
        "modes": {one.mode: described(one) for one in seen},
        "tensors": {one.mode: list(one.tensors) for one in seen},
        "family": {one.mode: one.family for one in seen},
        "basis": {one.mode: one.basis for one in seen},
        "format": {one.mode: one.format for one in seen},
        "dtypes": {
            one.mode: [dtype_name(t.dtype) for t in (one.input, one.output)] for one in seen
        },
        "note": NOTE,
    }


def stats_path(path: Path) -> Path:
    """Where the statistics of an .npz lie."""
    return path.with_name(f"{path.stem}_stats.json")


def write(path: Path, seen: Sequence[FirstLayer], about: About, *, add: bool = False) -> None:
    """Write both files; with `add`, next to the modes that are in them already."""
    values = {
        f"mode_{arrays.file_word(one.mode)}_{what}": arrays.array(getattr(one, what))
        for one in seen
        for what in ("input", "output")
    }
    document = statistics(seen, about)
    if add and path.exists():
        with arrays.read(path) as before:
            taken = [key for key in values if key in before]
            if taken:
                raise RunExists(f"{path} holds {taken[0]} already; choose another --out.")
            values = {**{key: before[key] for key in before}, **values}
        document = _merged(json_of(stats_path(path)), document)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save: Any = np.savez_compressed
    with partial.open("wb") as file:
        save(file, **values)
    partial.replace(path)
    text = json.dumps(document, indent=2)
    stats_path(path).write_text(text + "\n", encoding="utf-8")


def _merged(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    by_mode = ("modes", "tensors", "family", "basis", "format", "dtypes")
    return {**now, **{key: {**arrays.field(before, key), **now[key]} for key in by_mode}}


class FirstLayerNpz:
    """`first-layer-npz`; an import makes a run of each mode."""

    name = "first-layer-npz"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; adds to a folder whose file lacks this mode."""
        told, selection = Told.by(run), Selection.parse(select)
        names = [name for name in run.names() if selection.matches(name)]
        require((name for name in names if _LAYER.fullmatch(name)), run, "a first layer")
        tensors = choose(names)
        inputs, why = samples(run, tensors[0], progress, 0) if tensors[0] in names else ([], [])
        outputs, more = samples(run, tensors[1], progress, len(inputs))
        if not inputs or len(inputs) != len(outputs):
            lost = (*why, *more, f"no values of {tensors[0]}")[0]
            raise RunError(f"{run.path} holds {lost}.")
        both = arrays.together(inputs), arrays.together(outputs)
        for suffix, given in both[0].items():
            seen = FirstLayer(
                told.mode, told.family, told.basis, told.format, tensors, given, both[1][suffix]
            )
            about = About(told.model, None, given.shape[1], told.created)
            path = out / FILE.replace(".npz", f"{suffix}.npz")
            write(path, [seen], about, add=True)
        return Moved(2 * len(inputs), 2 * len(both[0]), (*why, *more))

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`; also what the older scripts wrote, and one file of a folder."""
        files = [folder] if folder.is_file() else sorted(folder.glob("*.npz"), key=_sample_of)
        found: dict[str, list[FirstLayer]] = {}
        documents = {path: json_of(stats_path(path)) for path in files}
        for path in files:
            for one in _read(path, documents[path]):
                found.setdefault(one.mode, []).append(one)
        if not found:
            raise RunError(f"{folder} holds no .npz with mode_<m>_input and mode_<m>_output.")
        first = documents[files[0]]
        runs = [_old_run(mode, pieces, first) for mode, pieces in found.items()]
        return write_runs(runs, sink, len(files), progress)


def _read(path: Path, document: Mapping[str, Any]) -> list[FirstLayer]:
    """The modes in one file."""
    with arrays.read(path) as values:
        names = [m["mode"] for key in values if (m := _KEY.fullmatch(key)) and m["what"] == "input"]
        both = [mode for mode in names if f"mode_{mode}_output" in values]
        return [_first_layer(mode, values, document, stats_path(path)) for mode in both]


def _first_layer(
    mode: str, values: Mapping[str, Any], document: Mapping[str, Any], stats_file: Path
) -> FirstLayer:
    dtypes = arrays.words(arrays.field(document, "dtypes"), mode, ("", ""), stats_file)
    names = ("layers.0/forward/input", "layers.0.mixer/forward/output")
    names = arrays.words(arrays.field(document, "tensors"), mode, names, stats_file)
    first, second = (arrays.name(name, stats_file) for name in names)
    return FirstLayer(
        mode,
        str(arrays.field(document, "family").get(mode, "")),
        str(arrays.field(document, "basis").get(mode, UNKNOWN)),
        arrays.field(document, "format").get(mode),
        (first, second),
        arrays.tensor(values[f"mode_{mode}_input"], dtypes[0]),
        arrays.tensor(values[f"mode_{mode}_output"], dtypes[1]),
    )


def _old_run(mode: str, pieces: Sequence[FirstLayer], document: Mapping[str, Any]) -> OldRun:
    one = pieces[0]
    inputs = [sample for piece in pieces for sample in _samples(piece.input)]
    outputs = [sample for piece in pieces for sample in _samples(piece.output)]
    return OldRun(
        mode,
        one.family,
        one.basis,
        one.format,
        str(document.get("timestamp", "")),
        str(document.get("model", "")),
        by_sample([(one.tensors[0], inputs), (one.tensors[1], outputs)]),
        {"pretrained_dir": document.get("pretrained_dir"), "seq_len": document.get("seq_len")},
    )


def _samples(values: torch.Tensor) -> list[torch.Tensor]:
    """The batch axis holds samples."""
    return arrays.apart(values, values.shape[0] if values.dim() == 3 else 1)


def _sample_of(path: Path) -> tuple[str, int]:
    stem, _, number = path.stem.rpartition("_sample_")
    return (stem, int(number)) if stem and number.isdecimal() else (path.stem, -1)


FIRST_LAYER_NPZ = FirstLayerNpz()
"""What the entry point names."""
