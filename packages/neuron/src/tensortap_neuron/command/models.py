"""The model of `--model`, and the token ids of prompts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortap.errors import ConfigError, NotSupported
from tensortap_neuron.command.devices import DTYPES, tried


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on the CPU, in evaluation mode, and its tokenizer if it has one."""

    model: nn.Module
    tokenizer: Any
    source: str

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as plain data."""
        found: dict[str, Any] = self.model.config.to_dict()  # type: ignore[union-attr,operator]
        return found


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids; `tokens` says what made them: `tokenizer` or `bytes`."""

    number: int
    text: str
    ids: tuple[int, ...]
    tokens: str

    @property
    def folder(self) -> str:
        """Its folder below `--out`."""
        return f"prompt-{self.number}"

    @property
    def tensor(self) -> torch.Tensor:
        """The ids [1, length]."""
        return torch.tensor([self.ids])


def require_transformers() -> None:
    """Raise `NotSupported` unless transformers and the names of its models are there."""
    for module, package in (
        ("transformers", '"tensortap-hf[framework]"'),
        ("tensortap_hf", '"tensortap[hf]"'),
    ):
        if importlib.util.find_spec(module) is None:
            raise NotSupported(f"{module} is not installed: pip install {package}.")


def load(name: str, dtype: str) -> Loaded:
    """Load a decoder from a folder, or from the local cache of the hub; downloads nothing.

    Raises `ConfigError` where that fails, `NotSupported` for a model that is no decoder.
    """
    import transformers

    config = tried(_where(name), lambda: transformers.AutoConfig.from_pretrained(name, **_LOCAL))
    if getattr(config, "is_encoder_decoder", False):
        raise NotSupported(f"{name} has an encoder; `neuron layers` runs decoders.")
    make = _class(config)
    model = tried(
        _where(name),
        lambda: make.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"), **_LOCAL),
    )
    return Loaded(model.eval(), tokenizer(name), name)


_LOCAL: dict[str, Any] = {"local_files_only": True}


def _where(name: str) -> str:
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


def tokenizer(name: str) -> Any:
    """The tokenizer beside a model; `None`: it has none, and bytes stand in."""
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(name, **_LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None  # There is none; every run's metadata says what stood in.
    # Where there are no files, transformers makes one of special tokens only, which loses all text.
    words = found.get_vocab().keys() - set(found.all_special_tokens)
    return found if words else None


def prompts(texts: list[str], encoder: Any, vocabulary: int) -> list[Prompt]:
    """Token ids of each text; raises `ConfigError` for one that has none, or too large ones."""
    found = []
    for number, text in enumerate(texts):
        if encoder is None:
            ids, by = [byte % vocabulary for byte in text.encode()], "bytes"
        else:
            ids, by = list(encoder(text)["input_ids"]), "tokenizer"
        if not ids:
            raise ConfigError(f"--prompt {text!r} becomes no token ids.")
        if max(ids) >= vocabulary:
            raise ConfigError(
                f"--prompt {text!r} has token id {max(ids)}, and the vocabulary of the model ends "
                f"at {vocabulary - 1}: is it the tokenizer of another model?"
            )
        found.append(Prompt(number, text, tuple(ids), by))
    return found


def vocabulary_of(loaded: Loaded) -> int:
    """How many token ids the model has embeddings for."""
    embedding = getattr(loaded.model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None) or loaded.config.get("vocab_size")
    if not isinstance(size, int):
        raise NotSupported(f"{loaded.source} takes no token ids.")
    return size
