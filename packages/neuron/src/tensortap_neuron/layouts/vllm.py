"""The layout `vllm-neuron`: what vLLM-Neuron's `tensor_capture` writes.

    dp0/prefill_s128_0/model.layers.0/rank0.pt      a pass over prompts in a bucket of 128 tokens
    dp0/prefill_s128_0/prefill_s128_0_meta.json     req_ids, positions, dp_rank
    dp0/decode_b2_0/model.layers.0/rank0.pt         a pass over one token of each of 2 requests

Every request becomes a step, in the order of the ids, and its forwards microbatches: 0 is the
prompt, whatever chunks and buckets it was processed in, then follows one for each position. So
the steps are those of a reference model that was given the prompts one by one. Tensors get the
axes [batch, sequence, hidden] with a batch of one; padding is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensortap.errors import NotSupported, RunError
from tensortap.layouts import Moved, Progress
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap_neuron.layouts.files import cause, read_json
from tensortap_neuron.layouts.forwards import Request, requests_of
from tensortap_neuron.layouts.importing import Findings, new_info, write
from tensortap_neuron.layouts.requests import Pass, is_pass, parse_pass, pass_key, runs_of
from tensortap_neuron.layouts.shares import Shares

CONFIG = "config.json"
_REPLICA = re.compile(r"dp(\d{1,6})", re.ASCII)


class VllmNeuron:
    """`vllm-neuron`; import only."""

    name = "vllm-neuron"
    exports = False

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """Not offered: raises `NotSupported`."""
        raise NotSupported(
            "The layout 'vllm-neuron' is only imported; export to 'layers-pt' or 'pt'."
        )

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`.

        A `config.json` of the model that the user puts beside `dp0` says how wide the model is:
        Neuron may pad its hidden axis, and nothing else tells.
        """
        findings = Findings()
        passes = _passes(folder, findings)
        findings.require_some(passes, folder, "dp<n>/prefill_s<n>_<n> or decode_b<n>_<n>")
        requests = requests_of(passes)
        config = _config(folder / CONFIG, findings)
        pieces = Shares(folder, findings, _hidden(config)).pieces(requests)
        findings.require_some(pieces.found, folder, "tensor that could be read")
        _note_others(folder, findings)
        info = new_info(layout="vllm-neuron", requests=_described(requests))
        info = replace(info, model_config=config)
        return write(sink, info, pieces.found, findings, progress, pieces.parallel)


def _config(path: Path, findings: Findings) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except RunError as failure:
        findings.skip("*", path.name, cause(failure, path))
        return {}


def _hidden(config: Mapping[str, Any]) -> int | None:
    """The width of the model, or of its text part."""
    text = config.get("text_config")
    for document in (config, text if isinstance(text, dict) else {}):
        found = document.get("hidden_size")
        if type(found) is int and found > 0:
            return found
    return None


def _passes(folder: Path, findings: Findings) -> list[Pass]:
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}.")
    replicas = {
        int(found[1]): folder / entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and (found := _REPLICA.fullmatch(entry.name))
    }
    if not replicas:
        _hint(folder)
    return [
        _pass(path, replica, folder, findings)
        for replica, where in sorted(replicas.items())
        for path in sorted(where.iterdir(), key=lambda path: pass_key(path.name))
        if path.is_dir() and is_pass(path.name)
    ]


def _hint(folder: Path) -> None:
    """Raise `RunError`: the folder is the wrong one, and which may be right."""
    inside = sorted({path.parent.name for path in folder.glob("*/dp*") if path.is_dir()})
    if inside:
        raise RunError(f"{folder} holds several captures; import one: {', '.join(inside[:5])}.")
    if any(is_pass(path.name) for path in folder.iterdir()):
        raise RunError(f"{folder} is one replica of a capture; import the folder that it is in.")
    raise RunError(f"{folder} holds no dp0/, as captures of vLLM-Neuron do.")


def _pass(path: Path, replica: int, folder: Path, findings: Findings) -> Pass:
    name, meta = str(path.relative_to(folder)), path / f"{path.name}_meta.json"
    if not meta.exists():
        why = "its _meta.json is missing"
    else:
        try:
            found = parse_pass(path, replica, read_json(meta))
            if found.whole is not None:
                findings.notes.append((name, f"{found.whole}: kept undivided, with its padding"))
            return found
        except RunError as failure:
            why = f"{meta.name}: {cause(failure, meta)}"
    findings.gaps.append((name, f"{why}, so that requests and padding are not known"))
    return Pass(path, replica, (), 0, why)


def _note_others(folder: Path, findings: Findings) -> None:
    """Captures of a draft model or a vision encoder lie beside those of the model."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _REPLICA.fullmatch(path.name) and any(path.glob("dp*")):
            reason = f"the capture of another model: import {path} by itself"
            findings.notes.append((path.name, reason))


def _described(requests: Sequence[Request]) -> list[Mapping[str, Any]]:
    return [
        {
            "id": request.name,
            "step": step,
            "replica": request.replica,
            "forwards": [
                {
                    "microbatch": forward.microbatch,
                    "call": forward.call,
                    "positions": [[start, n] for start, n in runs_of(forward.positions)],
                    "passes": [one.path.name for one, _ in forward.parts],
                }
                for forward in request.forwards
            ],
        }
        for step, request in enumerate(requests)
    ]


VLLM_NEURON = VllmNeuron()
"""What the entry point names."""
