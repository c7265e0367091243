"""The layout `nxdi`: what the tensor capture hook of NxD Inference writes.

    captured_tensors_cte_step_1_module_layers.0_output.pt        the prompt (context encoding)
    captured_tensors_tkg_step_2_module_layers.0_output.pt        the first generated token, …
    captured_tensors_cte_step_1_module_layers.0_input.pt         with `capture_inputs`
    captured_tensors_cte_step_1_manual_tensor_0.pt               `register_tensor` in model code
    capture_metadata.json                                        phase, step, module of each file

A forward becomes a microbatch of step 0, as the forwards of one `generate()` are in a capture of
a Hugging Face model; forward 0 is the prompt. Files without `capture_metadata.json`, as NxD's
hook for eager reference models writes them (`…_output_0.pt`, `…_inputs_kwargs_x.pt`), are read by
their names. The hook does not write how long the prompt is: see `lengths` in `load`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from tensortap.errors import ConfigError, NotSupported, RunError
from tensortap.layouts import Moved, Progress
from tensortap.names import TensorName, escape
from tensortap.records import Coordinates, Placement
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap_neuron.layouts.files import cause, read_json, read_tensor
from tensortap_neuron.layouts.importing import Findings, Piece, new_info, write
from tensortap_neuron.layouts.names import canonical_names, dims_of, is_residual, word_of

METADATA = "capture_metadata.json"
STAND_IN = (
    "missing: the file holds a stand-in of one element, because the graph of this bucket does not "
    "make the tensor"
)
_FILE = re.compile(
    r"captured_tensors_(?P<phase>cte|ctx|tkg|tg)_step_(?P<step>\d{1,9})_"
    r"(?:manual_tensor_(?P<manual>\d{1,9})|module_(?P<module>.+)"
    r"_(?P<what>outputs?|inputs?)(?P<rest>_[A-Za-z0-9_.]+)?)\.pt",
    re.ASCII,
)
_SHARDED = frozenset(
    {"attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.act",
     "lm_head"}
)  # fmt: skip
_NO_LENGTH = (
    "the length of the prompt is not in the folder, so that the padding of the bucket is not cut: "
    f'add "lengths": [tokens of each row] to {METADATA}'
)
_UNEQUAL = (
    "the rows of the prompt have different lengths: padding is cut behind the longest, so that "
    "the pads of the others are compared"
)
_ONE_SHARD = (
    "of a layer whose output tensor parallelism divides, of which NxDI returns the shard of rank "
    '0 alone: its placement is unknown (say "tp_degree": 1 in ' + METADATA + " where it is whole)"
)
_FIRST_FIELD = (
    "NxD registers the fields of the attention's output by the alphabet and NxDI keeps the first: "
    "this may be attn_input_hidden_states or cos_cache and not the hidden states"
)


@dataclass(frozen=True, slots=True)
class Named:
    """What the name of a file, or its entry in the metadata, says."""

    path: Path
    step: int
    module: str
    tensor: str

    @property
    def forward(self) -> int:
        """Counted from 0."""
        return self.step - 1


@dataclass(frozen=True, slots=True)
class Told:
    """What the metadata says of the whole folder; `written` by NxDI's hook, or by nobody."""

    tensors: Mapping[str, Any]
    written: bool
    created: str = ""
    lengths: tuple[int, ...] = ()
    tp_degree: int | None = None


class Nxdi:
    """`nxdi`; import only."""

    name = "nxdi"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """Not offered: raises `NotSupported`."""
        raise NotSupported("The layout 'nxdi' is only imported; export to 'layers-pt' or 'pt'.")

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`.

        `capture_metadata.json` may hold two keys more than the hook writes: `lengths`, the number
        of tokens of each row of the prompt, from which padding is cut, and `tp_degree`.
        """
        if not folder.is_dir():
            raise RunError(f"There is no folder {folder}.")
        findings = Findings()
        told = _told(folder / METADATA, findings)
        named = _named(folder, told, findings)
        findings.require_some(named, folder, "captured_tensors_<phase>_step_<n>_module_<m>_….pt")
        pieces = _pieces(named, told, findings)
        findings.require_some(pieces, folder, "tensor that could be read")
        info = new_info(
            told.created,
            layout="nxdi",
            lengths=list(told.lengths) or None,
            forwards={str(one.step): phase_of(one.path) for one in named},
        )
        return write(sink, info, pieces, findings, progress)


def phase_of(path: Path) -> str:
    """`cte` or `tkg`, as the file is named."""
    return path.name.removeprefix("captured_tensors_").partition("_")[0]


def _told(path: Path, findings: Findings) -> Told:
    if not path.exists():
        return Told({}, written=False)
    try:
        document = read_json(path)
        return Told(
            _mapping(document, "tensors"),
            True,
            _created(document),
            _lengths(document),
            _whole(document, "tp_degree"),
        )
    except RunError as failure:
        findings.skip("*", METADATA, cause(failure, path) + "; files are taken by their names")
        return Told({}, written=True)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = document.get(key, {})
    if not isinstance(found, dict):
        raise RunError(f"{METADATA}: {key!r} must be an object.")
    return found


def _created(document: Mapping[str, Any]) -> str:
    seconds = _mapping(document, "capture_session").get("created_at")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e11:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _lengths(document: Mapping[str, Any]) -> tuple[int, ...]:
    found = document.get("lengths", [])
    if not isinstance(found, list) or any(type(n) is not int or n < 1 for n in found):
        raise RunError(f"{METADATA}: 'lengths' must list the tokens of each row, not {found!r}.")
    return tuple(found)


def _whole(document: Mapping[str, Any], key: str) -> int | None:
    found = document.get(key)
    if found is not None and (type(found) is not int or found < 1):
        raise RunError(f"{METADATA}: {key!r} must be a number of at least 1, not {found!r}.")
    return found


def _named(folder: Path, told: Told, findings: Findings) -> list[Named]:
    """Every capture in the folder; names in the metadata are looked up, never opened."""
    found = []
    for path in sorted(folder.glob("captured_tensors_*.pt")):
        match = _FILE.fullmatch(path.name)
        if match is None or int(match["step"]) < 1:
            findings.skip("*", path.name, "its name does not say phase, step and module")
            continue
        found.append(_one(path, match, told.tensors.get(path.name)))
    lost = set(told.tensors) - {path.name for path in folder.glob("captured_tensors_*.pt")}
    for name in sorted(map(str, lost)):
        findings.skip("*", escape(name)[:200], f"{METADATA} lists it, and it is not there")
    return found


def _one(path: Path, match: re.Match[str], said: Any) -> Named:
    """By its name; the metadata settles where the module's name ends."""
    step = int(match["step"])
    if match["manual"] is not None:
        return Named(path, step, f"manual.{int(match['manual'])}", "output")
    module, what = match["module"], match["what"] + (match["rest"] or "")
    known = said.get("module_name") if isinstance(said, dict) else None
    if isinstance(known, str) and f"_module_{known}_" in path.name:
        module, what = known, path.stem.partition(f"_module_{known}_")[2]
    return Named(path, step, module, _tensor(what))


def _tensor(what: str) -> str:
    """`output`, `input.1`, `input.hidden_states` for `output`, `inputs_1`, `inputs_kwargs_….`."""
    word, _, rest = what.partition("_")
    word = word.removesuffix("s")
    rest = rest.removeprefix("kwargs_")
    return word if rest in ("", "0") else f"{word}.{escape(rest)}"


def _pieces(named: Sequence[Named], told: Told, findings: Findings) -> list[Piece]:
    names = canonical_names(dict.fromkeys(one.module for one in named))
    read = [(one, _shape(one, names, findings)) for one in named]
    there = [(one, shape) for one, shape in read if shape is not None]
    hidden = {
        shape[-1]
        for one, shape in there
        if one.tensor == "output" and word_of(names[one.module]) in ("embed", "layer", "final_norm")
    }
    bucket = max((s[1] for one, s in there if one.step == 1 and len(s) == 3), default=0)
    if told.written and not told.lengths and bucket > 1:
        findings.notes.append(("*", _NO_LENGTH))
    if len(set(told.lengths)) > 1:
        findings.notes.append(("*", _UNEQUAL))
    return [_piece(one, shape, names, told, hidden, bucket, findings) for one, shape in there]


def _shape(one: Named, names: Mapping[str, str], findings: Findings) -> tuple[int, ...] | None:
    """Of a file that holds a tensor; `None`, and a gap, of one that does not."""
    name = f"{names[one.module]}/forward/{one.tensor}"
    try:
        TensorName.parse(name)
        shape = tuple(read_tensor(one.path).shape)
    except (RunError, ConfigError) as failure:
        reason = cause(failure, one.path) if isinstance(failure, RunError) else str(failure)
        findings.skip(name, one.path.name, reason)
        return None
    if math.prod(shape) == 1:
        findings.skip(name, one.path.name, STAND_IN)
        return None
    return shape


def _piece(
    one: Named,
    shape: tuple[int, ...],
    names: Mapping[str, str],
    told: Told,
    hidden: set[int],
    bucket: int,
    findings: Findings,
) -> Piece:
    module, tensor = names[one.module], one.tensor
    if told.written and word_of(module) == "attn" and tensor == "output":
        findings.notes.append((f"{module}/forward/output", _FIRST_FIELD))
        tensor = "output" if not hidden or shape[-1] in hidden else "output.first"
    placement = _valid(one, shape, told, bucket)
    if _is_one_shard(module, tensor, told):
        findings.notes.append((f"{module}/forward/{tensor}", _ONE_SHARD))
        placement = Placement(unknown=True)
    return Piece(
        TensorName(module, "forward", tensor),
        one.module,
        Coordinates(microbatch=one.forward),
        partial(read_tensor, one.path),
        one.path.name,
        placement,
        dims_of(module, len(shape)) if _like_output(module, tensor) else None,
    )


def _like_output(module: str, tensor: str) -> bool:
    """Does it have the axes of the module's output? The input of a layer does, too."""
    return tensor == "output" or (
        tensor == "input" and is_residual(module) and word_of(module) not in ("embed", "mlp.down")
    )


def _is_one_shard(module: str, tensor: str, told: Told) -> bool:
    sharded = tensor == "output" and word_of(module) in _SHARDED
    return sharded and told.written and told.tp_degree != 1


def _valid(one: Named, shape: tuple[int, ...], told: Told, bucket: int) -> Placement | None:
    """Where the prompt ends in its bucket; rows of other lengths share the longest."""
    longest = max(told.lengths, default=0)
    axis = _token_axis(shape, bucket, len(told.lengths))
    if one.step != 1 or axis is None or not 0 < longest < bucket:
        return None
    return Placement(logical_shape=shape, valid={axis: longest})


def _token_axis(shape: tuple[int, ...], bucket: int, rows: int) -> int | None:
    """The axis with the positions of the bucket: the second, or the first of flattened tokens."""
    if len(shape) > 1 and shape[1] == bucket and (len(shape) > 2 or shape[0] == rows):
        return 1
    return 0 if rows == 1 and len(shape) > 1 and shape[0] == bucket else None


NXDI = Nxdi()
"""What the entry point names."""
