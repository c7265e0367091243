"""The layout `layers-pt`: the files of an older guide to comparing a GPU with Neuron.

    layer_0_output.pt … layer_61_output.pt, embedding_output.pt, final_norm_output.pt
    metadata.pt     prompt, input_ids, attention_mask, config, statistics of each tensor

Each file is a tensor [batch, sequence, hidden], padding included; `metadata.pt` says where it
begins. The folder holds one forward. `export` takes the first of a run and names the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress
from tensortap.names import TensorName
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap_neuron.layouts.files import cause, read_tensor
from tensortap_neuron.layouts.importing import Findings, Piece, new_info, write
from tensortap_neuron.layouts.layer_files import export
from tensortap_neuron.layouts.layer_metadata import METADATA, About, read_about

_FILE = re.compile(
    r"(?P<what>layer_(?P<layer>0|[1-9]\d{0,5})|embedding|final_norm)_output\.pt", re.ASCII
)
_TWICE = re.compile(r"layer_0\d+_output\.pt", re.ASCII)
_MODULES = {"embedding": "embed", "final_norm": "final_norm"}
_SHIFTED = (
    "there is an embedding and no layer_0: a version of the script numbers the output of the first "
    "layer as layer_1, so that every layer here may be one too high"
)


class LayersPt:
    """`layers-pt`: import and export."""

    name = "layers-pt"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; what is no output of a layer, embedding or final norm is skipped."""
        return export(run, out, select, progress)

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`; also what the older scripts wrote."""
        if not folder.is_dir():
            raise RunError(f"There is no folder {folder}.")
        findings = Findings()
        found = {m["what"]: path for path in folder.iterdir() if (m := _FILE.fullmatch(path.name))}
        if not found:
            raise RunError(f"{folder} holds no layer_<i>_output.pt, as layers-pt has them.")
        for path in sorted(folder.iterdir()):
            if _TWICE.fullmatch(path.name):
                findings.skip("*", path.name, "the number of its layer begins with 0")
        about = _about(folder / METADATA, findings)
        pieces = _pieces(found, about, findings)
        findings.require_some(pieces, folder, "layer that could be read")
        _note(found, about, findings)
        info = new_info(about.created, **about.metadata)
        return write(sink, about.described(info), pieces, findings, progress)


def _about(path: Path, findings: Findings) -> About:
    if not path.exists():
        findings.gaps.append(("*", f"{METADATA} is missing: prompt and padding are not known"))
        return About()
    try:
        return read_about(path)
    except RunError as failure:
        findings.skip("*", METADATA, cause(failure, path))
        return About()


def _pieces(found: Mapping[str, Path], about: About, findings: Findings) -> list[Piece]:
    pieces: list[Piece] = []
    for what, path in sorted(found.items()):
        module = _MODULES.get(what) or f"layers.{int(what.removeprefix('layer_'))}"
        plain, own = TensorName(module, "forward", "output"), about.name_of(what)
        name = plain if own is None or any(own == piece.name for piece in pieces) else own
        try:
            shape = tuple(read_tensor(path).shape)
        except RunError as failure:
            findings.skip(str(name), path.name, cause(failure, path))
            continue
        pieces.append(
            Piece(
                name,
                about.native_of(what),
                about.at,
                partial(read_tensor, path),
                path.name,
                about.placement_of(what, shape),
                about.dims_of(what),
                about.device_of(what),
            )
        )
    return pieces


def _note(found: Mapping[str, Path], about: About, findings: Findings) -> None:
    if about.left_padded:
        findings.notes.append(("*", "padding on the left of the prompt is not cut"))
    if len(set(about.lengths)) > 1:
        findings.notes.append(("*", "padding is cut behind the longest row of the prompt only"))
    layers = {what for what in found if what.startswith("layer_")}
    if layers and "layer_0" not in layers and "embedding" in found and "layer_1" in layers:
        findings.notes.append(("*", _SHIFTED))
    for what, reason in about.lost(found).items():
        findings.gaps.append((f"{what}_output.pt", reason))


LAYERS_PT = LayersPt()
"""What the entry point names."""
