"""Fakes of the programs whose files are imported: they write what the public code writes.

Sources, as read in November 2026:
- NxDI: aws-neuron/neuronx-distributed-inference, utils/tensor_capture_utils.py
  (`capture_model_tensors`) and models/model_base.py (`_get_captured_tensors`: `zeros(1)` for a
  module without a tensor, NaN for manual ones that are missing).
- The eager reference: aws-neuron/neuronx-distributed, utils/tensor_capture/model_modification.py
  (`modify_hf_eager_model_for_tensor_capture`).
- vLLM-Neuron: the guide "Tensor Capture Design" of the AWS Neuron documentation (July 2026), which
  describes the `CaptureWriter`; vllm-project/vllm-neuron of November 2025 has no such code yet.
- The older guide: examples/minimax_m2_misc/test_layer_by_layer.py and …_gpu.py
  (`LayerOutputRecorder`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


class FakeNxdiHook:
    """`get_tensor_capture_hook()`: called with the captured tensors after each forward."""

    def __init__(
        self, folder: Path, modules: Sequence[str], *, capture_inputs: bool = False, manual: int = 0
    ) -> None:
        self.folder = folder
        self.modules = modules
        self.capture_inputs = capture_inputs
        self.manual = manual
        self.step = 0
        self.document: dict[str, Any] = {
            "capture_session": {"created_at": time.time(), "version": "1.0"},
            "tensors": {},
        }
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self,
        captured: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor] | None = None,
        manual: Sequence[torch.Tensor] = (),
    ) -> None:
        """One forward; a module of which nothing was captured in this bucket is `zeros(1)`."""
        self.step += 1
        phase = "cte" if self.step == 1 else "tkg"
        stem = f"captured_tensors_{phase}_step_{self.step}"
        nothing = torch.zeros(1, dtype=torch.bfloat16)
        for module in self.modules:
            kinds = {"output": captured}
            if self.capture_inputs:
                kinds["input"] = inputs or {}
            for kind, tensors in kinds.items():
                name = f"{stem}_module_{module}_{kind}.pt"
                about = {"tensor_type": kind, "module_name": module}
                self._save(name, tensors.get(module, nothing), phase, about)
        for number, tensor in enumerate(manual):
            name = f"{stem}_manual_tensor_{number}.pt"
            self._save(name, tensor, phase, {"tensor_type": "manual", "tensor_index": number})

    def _save(self, name: str, tensor: torch.Tensor, phase: str, about: dict[str, Any]) -> None:
        torch.save(tensor.detach().cpu(), self.folder / name)
        self.document["tensors"][name] = {
            "step": self.step,
            "phase": phase,
            "tensor_shape": list(tensor.shape),
            "tensor_dtype": str(tensor.dtype),
            "timestamp": time.time(),
            **about,
        }
        self.save_document()

    def save_document(self) -> None:
        """Written again after each tensor, as the hook does."""
        path = self.folder / "capture_metadata.json"
        path.write_text(json.dumps(self.document, indent=2))


def hook_hf_eagerly(model: nn.Module, modules: Sequence[str], folder: Path) -> None:
    """What NxD does to a reference model: a file for every field of an output, no metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    step = {"now": 1}
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        step["now"] += 1
        return found

    model.forward = counted  # type: ignore[method-assign]

    def save(name: str, found: object) -> None:
        phase = "cte" if step["now"] == 1 else "tkg"
        if isinstance(found, torch.Tensor):
            file = f"captured_tensors_{phase}_step_{step['now']}_module_{name}.pt"
            torch.save(found.detach().cpu(), folder / file)
        elif isinstance(found, tuple):
            for number, item in enumerate(found):
                save(f"{name}_{number}", item)
        elif isinstance(found, dict):
            for key, item in found.items():
                save(f"{name}_{key}", item)

    def watch(name: str, module: nn.Module) -> None:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            save(f"{name}_inputs", args)
            save(f"{name}_inputs_kwargs", kwargs)
            save(f"{name}_output", output)

        module.register_forward_hook(hook, with_kwargs=True)

    for path, module in model.named_modules():
        name = path.removeprefix("model.")
        if name in modules:
            watch(name, module)


class FakeCaptureWriter:
    """vLLM-Neuron's `CaptureWriter` of one replica, for all its tensor-parallel ranks at once."""

    def __init__(self, folder: Path, replica: int = 0) -> None:
        self.folder = folder / f"dp{replica}"
        self.replica = replica
        self.counts: dict[str, int] = {}

    def write(
        self,
        tensors: Mapping[str, torch.Tensor | Mapping[int, torch.Tensor]],
        req_ids: Sequence[str],
        positions: torch.Tensor,
        *,
        prefill: bool,
    ) -> Path:
        """One forward pass; a plain tensor is what rank 0 holds."""
        label = ("prefill_s" if prefill else "decode_b") + str(positions.shape[0])
        name = f"{label}_{self.counts.get(label, 0)}"
        self.counts[label] = self.counts.get(label, 0) + 1
        where = self.folder / name
        where.mkdir(parents=True)
        for module, held in tensors.items():
            ranks = {0: held} if isinstance(held, torch.Tensor) else held
            (where / module).mkdir()
            for rank, tensor in ranks.items():
                torch.save(tensor.clone().detach().cpu(), where / module / f"rank{rank}.pt")
        meta = {"req_ids": list(req_ids), "positions": positions.tolist(), "dp_rank": self.replica}
        (where / f"{name}_meta.json").write_text(json.dumps(meta, indent=2))
        return where


class OldRecorder:
    """The older guide's recorder: hooks on layers, embedding and final norm, then files."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        body: Any = model.model
        for number, layer in enumerate(body.layers):
            self._hook(layer, f"layer_{number}")
        self._hook(body.embed_tokens, "embedding")
        self._hook(body.norm, "final_norm")

    def _hook(self, module: nn.Module, name: str) -> None:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            self.outputs[name] = found.detach().cpu()

        module.register_forward_hook(hook)

    def statistics(self) -> dict[str, Any]:
        """In float32, as `Tensor.float().mean()` and the unbiased `.std()` give them."""
        return {
            name: {
                "shape": list(output.shape),
                "dtype": str(output.dtype),
                "mean": float(output.float().mean()),
                "std": float(output.float().std()),
                "min": float(output.min()),
                "max": float(output.max()),
                "has_nan": bool(torch.isnan(output).any()),
                "has_inf": bool(torch.isinf(output).any()),
            }
            for name, output in self.outputs.items()
        }

    def save(self, folder: Path, **metadata: Any) -> Path:
        """The tensors, and `metadata.pt` with the configuration object in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, output in self.outputs.items():
            torch.save(output, folder / f"{name}_output.pt")
        torch.save({**metadata, "statistics": self.statistics()}, folder / "metadata.pt")
        return folder
