"""Tokens to train on: a text as bytes or through a tokenizer, or a Megatron indexed dataset."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.core.utils import get_batch_on_this_cp_rank

Batch = dict[str, torch.Tensor]

CHECKED = 1 << 20
"""Tokens looked at before training; a dataset can be too large to look at all of them."""


@dataclass(frozen=True)
class Corpus:
    """All tokens in a row, and the vocabulary of the model they are for."""

    ids: np.ndarray
    vocab_size: int

    def check(self, ids: np.ndarray) -> None:
        """Raise `ValueError` for an id beyond the vocabulary."""
        # A parallel embedding takes it for another rank's row: no error, and zeros.
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"The data has the token id {ids.max()}, the model a vocabulary of "
                f"{self.vocab_size}: --hf-model and --tokenizer must fit --data."
            )


def load_corpus(options: Namespace, vocab_size: int) -> Corpus:
    """Raises `ValueError` where the data do not exist, are too short or do not fit the model."""
    ids = _read(options.data, options.tokenizer or _own_tokenizer(options.hf_model))
    if len(ids) <= options.seq_length:
        raise ValueError(f"--data {options.data} has {len(ids)} tokens, too few for one sample.")
    corpus = Corpus(ids, vocab_size)
    corpus.check(ids[:CHECKED])
    return corpus


def _read(data: str, tokenizer: Path | None) -> np.ndarray:
    if Path(get_idx_path(data)).exists() and Path(get_bin_path(data)).exists():
        dtype = IndexedDataset(data).index.dtype
        return np.memmap(get_bin_path(data), dtype=dtype, mode="r")
    if not Path(data).is_file():
        raise ValueError(f"--data {data}: no such file, and no {data}.bin with {data}.idx.")
    if tokenizer is None:
        return np.fromfile(data, dtype=np.uint8)
    return _tokenize(Path(data).read_text(encoding="utf-8"), tokenizer)


def _own_tokenizer(model: Path | None) -> Path | None:
    return model if model and (model / "tokenizer_config.json").exists() else None


def _tokenize(text: str, folder: Path) -> np.ndarray:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("A tokenizer needs transformers: pip install transformers.") from None
    return np.asarray(AutoTokenizer.from_pretrained(folder).encode(text), dtype=np.int32)


def microbatches(
    corpus: Corpus, options: Namespace, step: int, device: torch.device
) -> Iterator[Batch]:
    """The microbatches of one step that are this rank's.

    A sample depends on the seed, the step and its place in the global batch alone: so does the
    loss, however many ranks there are and wherever a run was resumed.
    """
    replica = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    for first in range(
        replica * options.micro_batch, options.global_batch, replicas * options.micro_batch
    ):
        places = range(first, first + options.micro_batch)
        samples = np.stack([_sample(corpus.ids, options, step, place) for place in places])
        corpus.check(samples)
        yield _batch(torch.from_numpy(samples), device)


def _sample(tokens: np.ndarray, options: Namespace, step: int, place: int) -> np.ndarray:
    random = np.random.default_rng((options.seed, step, place))
    start = int(random.integers(len(tokens) - options.seq_length))
    return tokens[start : start + options.seq_length + 1].astype(np.int64)


def _batch(samples: torch.Tensor, device: torch.device) -> Batch:
    """Tokens, the tokens that follow them and their positions, each `[batch, seq / cp]`."""
    tokens, labels = samples[:, :-1], samples[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = {"tokens": tokens, "labels": labels, "positions": positions}
    whole = {name: value.contiguous().to(device) for name, value in batch.items()}
    return get_batch_on_this_cp_rank(whole)
