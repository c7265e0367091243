"""Which forward a tensor belongs to: prompt or token, its step, and how much of it is padding.

Coordinates are those of Hugging Face's `generate`, so that both runs align: a prompt begins a
step, its forward is microbatch 0, and every token generated after it is the next microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Kind = Literal["cte", "tkg"]
"""Context encoding (the prompt) and token generation, as NxDI calls its two submodels."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward was given, as far as the tensors it returns depend on it.

    `first`: it begins a prompt; the later chunks of one encode context as well. `lengths` are
    the tokens of each row, where they are known and padding is on the right. `requests` are the
    sequence ids of the rows, where they are told.
    """

    kind: Kind
    rows: int
    first: bool
    lengths: tuple[int, ...] | None = None
    left_padded: bool = False
    requests: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of the compiled model.

    `mixed`: it makes tokens of other requests than those of the prompt before it.
    """

    step: int
    microbatch: int
    kind: Kind
    inputs: Inputs | None
    bucket: int | None
    """Length of the prompt it was compiled for, where a tensor of the residual stream tells."""
    mixed: bool = False

    @property
    def valid(self) -> int | None:
        """Positions of the longest row; `None` where that is not known, or nothing is padded."""
        lengths = None if self.inputs is None else self.inputs.lengths
        return max(lengths) if lengths and self.kind == "cte" else None

    def described(self) -> dict[str, Any]:
        """As it is kept beside the coverage."""
        lengths = None if self.inputs is None else self.inputs.lengths
        return {
            "step": self.step,
            "microbatch": self.microbatch,
            "kind": self.kind,
            "bucket": self.bucket,
            "lengths": None if lengths is None else list(lengths),
        }


def read_inputs(given: Sequence[Any]) -> Inputs | None:
    """From what NxDI hands to an `input_capture_hook`: ids, mask, positions, sequence ids, ….

    A forward begins a prompt when its first position is 0 (`NeuronBaseForCausalLM._is_prefill`);
    with several tokens beyond it encodes more of one, whose length nothing tells. `None` when
    these are no tensors.
    """
    ids, mask, positions, requests = (*given, None, None, None, None)[:4]
    if not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
        return None
    found = _from_positions(ids, mask, positions)
    known = isinstance(requests, torch.Tensor)
    return replace(found, requests=frozenset(requests.flatten().tolist())) if known else found


def _from_positions(ids: torch.Tensor, mask: Any, positions: torch.Tensor) -> Inputs:
    rows = int(ids.shape[0])
    if int(positions.min()) != 0:
        return Inputs("cte" if ids.shape[-1] > 1 else "tkg", rows, first=False)
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != ids.shape[-1]:
        return Inputs("cte", rows, True, tuple((positions.amax(-1) + 1).tolist()))
    seen = mask.to(torch.int64).sum(-1)
    right = bool((mask.bool() == (torch.arange(mask.shape[-1]) < seen[:, None])).all())
    return Inputs("cte", rows, True, tuple(seen.tolist()) if right else None, not right)


class Forwards:
    """Counts forwards; told of each one's inputs before it, when the user passes both hooks."""

    def __init__(self) -> None:
        self.step = -1
        self._microbatch = 0
        self._announced: Inputs | None = None
        self._ended = False
        self._requests: frozenset[int] = frozenset()

    def announce(self, given: Sequence[Any]) -> None:
        """The next forward has these inputs."""
        self._announced = read_inputs(given)

    def end_step(self) -> None:
        """Whatever comes next begins a step."""
        self._ended = True

    def begin(self, lengths: Sequence[int], bucket: int | None) -> Forward:
        """The forward that just returned; `lengths` are those of its tensors' sequence axes."""
        inputs, self._announced = self._announced, None
        kind = inputs.kind if inputs is not None else self._guess(lengths)
        first = inputs.first if inputs is not None else kind == "cte"
        if self.step < 0 or self._ended or first:
            self.step, self._microbatch, self._ended = self.step + 1, 0, False
            self._requests = inputs.requests if inputs is not None else frozenset()
        else:
            self._microbatch += 1
        mixed = inputs is not None and not inputs.requests <= self._requests
        # A token's graph is compiled for the length of the cache, which no tensor here tells.
        known = bucket if kind == "cte" else None
        return Forward(self.step, self._microbatch, kind, inputs, known, mixed)

    def _guess(self, lengths: Sequence[int]) -> Kind:
        """Several positions at once are a prompt; so is what comes first, as NxDI has it."""
        return "cte" if max(lengths, default=0) > 1 or self.step < 0 else "tkg"
