"""The layout `nxdi`: what the tensor capture hook of NxD Inference writes.

    captured_tensors_cte_step_1_module_layers.0_output.pt        the prompt (context encoding)
    captured_tensors_tkg_step_2_module_layers.0_output.pt        the first generated token, …
    captured_tensors_cte_step_1_module_layers.0_input.pt         with `capture_inputs`
    captured_tensors_cte_step_1_manual_tensor_0.pt               `register_tensor` in model code
    capture_metadata.json                                        phase, step, module of each file

A prompt becomes a step and its forwards microbatches, as those of one `generate()` are in a
capture of a Hugging Face model; microbatch 0 is the prompt. Files without `capture_metadata.json`,
as NxD's hook for eager reference models writes them (`…_output_0.pt`, `…_inputs_kwargs_x.pt`), are
read by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import ConfigError, NotSupported, RunError
from tensortap.layouts import Moved, Progress
from tensortap.names import TensorName, escape
from tensortap.records import Coordinates, Placement
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap_neuron.layouts.files import cause, read_tensor
from tensortap_neuron.layouts.importing import Findings, Piece, new_info, write
from tensortap_neuron.layouts.names import canonical_names, dims_of, is_residual, word_of
from tensortap_neuron.layouts.nxdi_metadata import METADATA, Told, read_told
from tensortap_neuron.layouts.nxdi_prompts import Prompts, prompts_of

STAND_IN = (
    "missing: the file holds a stand-in, one element for each prompt, because the graph of this "
    "bucket does not make the tensor"
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


class Nxdi:
    """`nxdi`; import only."""

    name = "nxdi"
    exports = False

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """Not offered: raises `NotSupported`."""
        raise NotSupported("The layout 'nxdi' is only imported; export to 'layers-pt' or 'pt'.")

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`.

        `capture_metadata.json` may hold two keys more than the hook writes: `lengths`, the tokens
        of each row of the prompt (`[[5], [7]]` of two prompts), from which padding is cut, and
        `tp_degree`.
        """
        if not folder.is_dir():
            raise RunError(f"There is no folder {folder}.")
        findings = Findings()
        told = read_told(folder, findings)
        named = _named(folder, told, findings)
        findings.require_some(named, folder, "captured_tensors_<phase>_step_<n>_module_<m>_….pt")
        pieces = _pieces(named, told, findings)
        findings.require_some(pieces, folder, "tensor that could be read")
        info = new_info(
            told.created,
            layout="nxdi",
            lengths=[list(rows) for rows in told.lengths] or None,
            forwards={str(one.step): phase_of(one.path) for one in named},
        )
        return write(sink, info, pieces, findings, progress)


def phase_of(path: Path) -> str:
    """`cte` or `tkg`, as the file is named."""
    return path.name.removeprefix("captured_tensors_").partition("_")[0]


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


@dataclass(frozen=True, slots=True)
class Folder:
    """What is known of a folder once the shapes of all tensors are: names, prompts, width."""

    names: Mapping[str, str]
    told: Told
    prompts: Prompts
    hidden: frozenset[int]


def _pieces(named: Sequence[Named], told: Told, findings: Findings) -> list[Piece]:
    names = canonical_names(dict.fromkeys(one.module for one in named))
    read = [(one, _shape(one, names, told, findings)) for one in named]
    there = [(one, shape) for one, shape in read if shape is not None]
    streams = [
        (one.step, shape)
        for one, shape in there
        if len(shape) == 3
        and one.tensor == "output"
        and word_of(names[one.module]) in ("embed", "layer", "final_norm")
    ]
    if not streams:
        streams = [(one.step, shape) for one, shape in there if len(shape) == 3]
    prompts = prompts_of(streams, told, findings)
    folder = Folder(names, told, prompts, frozenset(shape[-1] for _, shape in streams))
    return [_piece(one, shape, folder, findings) for one, shape in there]


def _shape(
    one: Named, names: Mapping[str, str], told: Told, findings: Findings
) -> tuple[int, ...] | None:
    """Of a file that holds a tensor; `None`, and a gap, of one that does not."""
    name = f"{names[one.module]}/forward/{one.tensor}"
    try:
        TensorName.parse(name)
        tensor = read_tensor(one.path)
    except (RunError, ConfigError) as failure:
        reason = cause(failure, one.path) if isinstance(failure, RunError) else str(failure)
        findings.skip(name, one.path.name, reason)
        return None
    if _stands_in(tensor, one, told):
        findings.skip(name, one.path.name, STAND_IN)
        return None
    return tuple(tensor.shape)


def _stands_in(tensor: torch.Tensor, one: Named, told: Told) -> bool:
    """A zero, or NaN of a manual tensor; one for each prompt where NxDI encoded them one by one.

    What NxDI's modules make has two axes at least, batch and sequence.
    """
    if tensor.numel() == 1:
        return True
    if not told.written or tensor.dim() > 1:
        return False
    manual = one.module.startswith("manual.")
    return not manual or (tensor.is_floating_point() and bool(tensor.isnan().all()))


def _piece(one: Named, shape: tuple[int, ...], folder: Folder, findings: Findings) -> Piece:
    module, tensor = folder.names[one.module], one.tensor
    if folder.told.written and word_of(module) == "attn" and tensor == "output":
        findings.notes.append((f"{module}/forward/output", _FIRST_FIELD))
        tensor = "output" if shape[-1] in folder.hidden else "output.first"
    number, prompt = folder.prompts.of(one.step)
    placement = prompt.placement(one.step, shape)
    if _is_one_shard(module, tensor, folder.told):
        findings.notes.append((f"{module}/forward/{tensor}", _ONE_SHARD))
        placement = Placement(unknown=True)
    return Piece(
        TensorName(module, "forward", tensor),
        one.module,
        Coordinates(step=number, microbatch=one.step - prompt.begin),
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


NXDI = Nxdi()
"""What the entry point names."""
