"""Token ids to run a model on: from a text, a JSONL file, or random.

A `.jsonl` file holds one sample a line: a string, `{"text": …}` or `{"input_ids": […]}`; samples
have the lengths they have, up to the limit. Any other file is one text, cut into samples of the
limit. A model without a tokenizer gets the bytes of the text in UTF-8, modulo its vocabulary.
Samples of different lengths are never put together: each is a batch of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids, each [1, length], and what they were made from."""

    ids: tuple[torch.Tensor, ...]
    source: str
    tokens: str
    """`tokenizer`, `bytes`, `ids` or `random`."""

    @property
    def lengths(self) -> list[int]:
        """Tokens in each sample."""
        return [sample.shape[1] for sample in self.ids]

    def to_json(self) -> dict[str, Any]:
        """What a run keeps in its metadata."""
        return {
            "source": self.source,
            "tokens": self.tokens,
            "lengths": self.lengths,
            "token_ids": [sample[0].tolist() for sample in self.ids],
        }


def read(
    data: Path | None, count: int, length: int, tokenizer: Any, vocabulary: int, *, seed: int = 0
) -> Samples:
    """`count` samples of at most `length` tokens; random ones without `data`.

    Fewer where the data has no more. Raises `ConfigError` for data that cannot be read or is
    empty, and for ids beyond the vocabulary.
    """
    if data is None:
        return _random(count, length, vocabulary, seed)
    text = _text(data)
    encode = _Encoder(tokenizer, vocabulary)
    found: Iterator[list[int]]
    if data.suffix == ".jsonl":
        found = (encode.line(content, where) for where, content in _lines(text, data))
    else:
        found = _cut(encode.text(text), length)
    ids = tuple(islice((sample[:length] for sample in found if sample), count))
    if not ids:
        raise ConfigError(f"{data} holds no text.")
    beyond = max(max(sample) for sample in ids)
    if beyond >= vocabulary:
        raise ConfigError(
            f"{data} has token id {beyond}, and the vocabulary ends at {vocabulary - 1}."
        )
    kind = "ids" if encode.given else "bytes" if tokenizer is None else "tokenizer"
    return Samples(tuple(torch.tensor([sample]) for sample in ids), str(data), kind)


def _random(count: int, length: int, vocabulary: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(vocabulary, (1, length), generator=generator) for _ in range(count))
    return Samples(ids, f"random token ids (seed {seed})", "random")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as failure:
        raise ConfigError(f"{path} cannot be read: {failure.strerror}.") from failure
    except UnicodeDecodeError as failure:
        raise ConfigError(f"{path} is no text in UTF-8: {failure.reason}.") from failure


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as failure:
                raise ConfigError(f"{where} is no JSON: {failure}.") from failure


def _cut(ids: list[int], length: int) -> Iterator[list[int]]:
    """Pieces of `length`; a shorter rest only where there is nothing else."""
    whole = len(ids) // length
    if not whole:
        yield ids
    for number in range(whole):
        yield ids[number * length : (number + 1) * length]


class _Encoder:
    """From text to token ids."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.given = False
        """Were there ids in the data itself?"""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def text(self, text: str) -> list[int]:
        """Ids of a text."""
        if self._tokenizer is None:
            return [byte % self._vocabulary for byte in text.encode()]
        # Many lines at once are longer than the model's window, which is cut afterwards.
        return list(self._tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def line(self, content: Any, where: str) -> list[int]:
        """Ids of one line of JSONL."""
        found = self._line(content, where)
        if not found:
            raise ConfigError(f"{where} becomes no token ids.")
        return found

    def _line(self, content: Any, where: str) -> list[int]:
        ids = content.get("input_ids") if isinstance(content, dict) else None
        if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids):
            self.given = True
            return ids
        text = content.get("text") if isinstance(content, dict) else content
        if not isinstance(text, str):
            raise ConfigError(
                f'{where} is neither a string, {{"text": …}} nor {{"input_ids": […]}}.'
            )
        return self.text(text)
