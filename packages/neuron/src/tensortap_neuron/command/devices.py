"""Where a model runs: what `--device` means, and what has to be there for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from tensortap.errors import ConfigError, NotSupported, TensortapError

DEVICES = ("cpu", "cuda", "xla", "neuron")
DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
_FLAGS = ("NEURON_", "XLA_", "PJRT_", "TORCH_NEURONX_")
_PACKAGES = ("torch-xla", "torch-neuronx", "neuronx-cc", "neuronx-distributed-inference")


def require_words(device: str, dtype: str) -> None:
    """Raise `ConfigError` for a device or dtype there is not; imports nothing."""
    if device.partition(":")[0] not in DEVICES:
        raise ConfigError(f"--device {device}: write one of {', '.join(DEVICES)}.")
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {dtype}: write auto, or one of {', '.join(DTYPES)}.")


def device_of(word: str) -> torch.device:
    """The device; raises `NotSupported` where this machine has none."""
    if word.startswith("xla"):
        return _xla(word)
    if word.startswith("cuda") and not torch.cuda.is_available():
        raise NotSupported(f"--device {word}: torch {torch.__version__} sees no CUDA device here.")
    if word.startswith("neuron"):
        _require_neuron(word)
    return torch.device(word)


def _xla(word: str) -> torch.device:
    try:
        device: torch.device = import_module("torch_xla").device()
    except ImportError as failure:
        raise NotSupported(
            f"--device {word} needs torch_xla (or torch-neuronx for torch 2.9 and before), which "
            f"cannot be imported: {failure}. On the CPU: pip install torch==2.9.0 torch-xla==2.9.0 "
            "and PJRT_DEVICE=CPU."
        ) from failure
    except RuntimeError as failure:
        raise NotSupported(f"--device {word}: {first_line(failure)}") from failure
    return device


def _require_neuron(word: str) -> None:
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AttributeError, AssertionError) as failure:
        # Torch's own message about a device type it does not know lists all others.
        known = not str(failure).startswith("Expected one of")
        why = f" ({first_line(failure)})" if known else ""
        raise NotSupported(
            f"--device {word}: this torch has no such device{why}. It comes with TorchNeuron "
            "(torch-neuronx 2.13.3 and later); for torch_xla write --device xla, for a compiled "
            "model --compiled DIR."
        ) from failure


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model there, its weights uploaded; raises `ConfigError` where they do not fit."""
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as failure:
        raise ConfigError(f"--device {device}: {first_line(failure)}") from failure
    if device.type == "xla":
        # Else the upload would be a part of the first graph.
        import_module("torch_xla").sync()
    return model


def flags() -> dict[str, str]:
    """The settings of compiler and runtime in the environment."""
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(_FLAGS)}


def hardware(device: torch.device) -> str | None:
    """What torch_xla runs on behind its device: `CPU`, `NEURON`, `TPU`, …; `None` for others."""
    if device.type != "xla":
        return None
    return str(import_module("torch_xla.runtime").device_type())


def versions() -> dict[str, str]:
    """Of the packages of devices that are installed."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def tried(what: str, work: Callable[[], Any]) -> Any:
    """What another library raises, as one line: a class of error for every field."""
    try:
        return work()
    except TensortapError:
        raise  # It says what and where by itself.
    except Exception as failure:
        raise ConfigError(f"{what}: {first_line(failure)}") from failure


def first_line(failure: BaseException) -> str:
    """What a message begins with; with the line after it where that gives the reason."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    first = first or type(failure).__name__
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]} …"


_LONGEST = 300
"""Characters: transformers lists every model it knows in a message."""
