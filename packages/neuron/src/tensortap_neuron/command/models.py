"""The model of `--model`: a folder, or a name in the local cache of the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from tensortap.errors import NotSupported
from tensortap_neuron.command.devices import DTYPES, tried


def require_transformers() -> None:
    """Raise `NotSupported` unless transformers and the names of its models are there."""
    for module, package in (
        ("transformers", '"tensortap-hf[framework]"'),
        ("tensortap_hf", '"tensortap[hf]"'),
    ):
        if importlib.util.find_spec(module) is None:
            raise NotSupported(f"{module} is not installed: pip install {package}.")


def configuration(name: str) -> Any:
    """The configuration of a decoder; raises `ConfigError`, or `NotSupported` for others."""
    import transformers

    found = tried(where(name), lambda: transformers.AutoConfig.from_pretrained(name, **LOCAL))
    if getattr(found, "is_encoder_decoder", False):
        raise NotSupported(f"{name} has an encoder; `neuron layers` runs decoders.")
    return found


def load(name: str, dtype: str) -> nn.Module:
    """Load a decoder on the CPU, in evaluation mode; downloads nothing.

    Raises `ConfigError` where that fails, `NotSupported` for a model that is no decoder.
    """
    make = _class(configuration(name))
    model: nn.Module = tried(
        where(name),
        lambda: make.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"), **LOCAL),
    )
    return model.eval()


LOCAL: dict[str, Any] = {"local_files_only": True}
"""Whatever is loaded, nothing is downloaded."""


def where(name: str) -> str:
    """How a message about a model that cannot be loaded begins."""
    if Path(name).exists():
        return f"--model {name} cannot be loaded"
    return (
        f"--model {name} is no folder here, and is not in the local cache (download it with "
        f"`hf download {name}`)"
    )


def _class(config: Any) -> Any:
    """The class a checkpoint was made with, where transformers has it."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def context_of(config: Any) -> int | None:
    """How many tokens the model was made for; a lazy device reads past its table in silence."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None


def vocabulary_of(name: str, config: Any) -> int:
    """How many token ids the model knows, of the text part where it has several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise NotSupported(f"{name} takes no token ids.")
    return size
