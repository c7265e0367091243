"""What naming and placing need to know about one model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortap.wrappers import unwrap
from tensortap_megatron.naming import is_a
from tensortap_megatron.parallel import Group, Parallel, parallel_of
from tensortap_megatron.shards import Cut, sequence, split


@dataclass(frozen=True, slots=True)
class Facts:
    """Configuration and groups of a model, and the cuts of axes that many tensors have."""

    config: Any
    parallel: Parallel
    vocabulary: int | None
    """Size of the real vocabulary, where the model's is padded and the real one is known."""
    first_stage: bool
    last_stage: bool
    tied: bool
    """Does the output layer use the embedding's weight?"""
    mixers: bool = False
    """May layers be Mamba mixers, here or on another stage?"""
    padded_vocabulary: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """Read off the model inside of DDP and Float16Module."""
        found: Any = unwrap(model)
        return cls(
            getattr(found, "config", None),
            parallel_of(found),
            _vocabulary(found),
            bool(getattr(found, "pre_process", True)),
            bool(getattr(found, "post_process", True)),
            bool(getattr(found, "share_embeddings_and_output_weights", False)),
            mixers=is_a(found, "MambaModel"),
            padded_vocabulary=getattr(found, "vocab_size", None),
        )

    @property
    def tp(self) -> Group:
        """The tensor-parallel group."""
        return self.parallel["tp"]

    @property
    def sequence_parallel(self) -> bool:
        """Are norms, dropouts and residuals split along the sequence?"""
        return bool(getattr(self.config, "sequence_parallel", False)) and self.tp.size > 1

    @property
    def residual(self) -> Cut:
        """The sequence axis of the residual stream."""
        return sequence(self.parallel["cp"], self.tp if self.sequence_parallel else Group())

    @property
    def inner(self) -> Cut:
        """The sequence axis inside of a block, where sequence parallelism has gathered it."""
        return sequence(self.parallel["cp"], Group())

    @property
    def over_tensor(self) -> Cut:
        """An axis that tensor parallelism splits."""
        return split(self.tp)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Groups whose ranks see different tokens: gradients of parameters are sums over them."""
        return tuple(name for name in ("dp", "cp") if self.parallel[name].size > 1)


def configured(config: object, word: str) -> int:
    """A number of a configuration; 0 where it is absent or `None`."""
    return int(getattr(config, word, None) or 0)


def _vocabulary(model: Any) -> int | None:
    """The tokenizer's size, if anybody knows it: the model itself only knows the padded one.

    Asked in turn: `unpadded_vocab_size` of the model, `vocab_size` of its configuration (Megatron
    Bridge), the tokenizer of Megatron-LM's training script.
    """
    padded = getattr(model, "vocab_size", None)
    training = sys.modules.get("megatron.training.global_vars")
    tokenizer = getattr(training, "_GLOBAL_TOKENIZER", None)
    for owner, word in (
        (model, "unpadded_vocab_size"),
        (getattr(model, "config", None), "vocab_size"),
        (tokenizer, "vocab_size"),
    ):
        size = getattr(owner, word, None)
        if isinstance(size, int) and isinstance(padded, int) and size < padded:
            return size
    return None
