"""Prompts as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tensortap.errors import ConfigError
from tensortap_neuron.command.models import LOCAL, configuration, context_of, vocabulary_of


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
        return folder_of(self.number)

    @property
    def tensor(self) -> torch.Tensor:
        """The ids [1, length]."""
        return torch.tensor([self.ids])


def folder_of(number: int) -> str:
    """`prompt-0`: where a prompt's run lies below `--out`."""
    return f"prompt-{number}"


def tokenizer(name: str) -> Any:
    """The tokenizer beside a model; `None`: it has none, and bytes stand in."""
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(name, **LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None  # There is none; every run's metadata says what stood in.
    # Where there are no files, transformers makes one of special tokens only, which loses all text.
    words = found.get_vocab().keys() - set(found.all_special_tokens)
    return found if words else None


def tokenized(texts: list[str], model: str) -> list[Prompt]:
    """Token ids of each text, by the model's own tokenizer.

    Raises `ConfigError` for a text that has none, too many, or too large ones.
    """
    config = configuration(model)
    encoder, vocabulary = tokenizer(model), vocabulary_of(model, config)
    context = context_of(config)
    found = []
    for number, text in enumerate(texts):
        if encoder is None:
            ids, by = [byte % vocabulary for byte in text.encode()], "bytes"
        else:
            ids, by = list(encoder(text)["input_ids"]), "tokenizer"
        if not ids:
            raise ConfigError(f"--prompt {text!r} becomes no token ids.")
        if context is not None and len(ids) > context:
            raise ConfigError(
                f"--prompt {text[:40]!r} has {len(ids)} tokens, and the model room for {context}."
            )
        if max(ids) >= vocabulary:
            raise ConfigError(
                f"--prompt {text!r} has token id {max(ids)}, and the vocabulary of the model ends "
                f"at {vocabulary - 1}: is it the tokenizer of another model?"
            )
        found.append(Prompt(number, text, tuple(ids), by))
    return found
