"""What a mixer keeps between decoding steps, in the cache of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class States:
    """The recent inputs of the convolution, and the state of the scan; none without a cache.

    A step goes on from the state before it however many tokens it has. (Transformers' own mixer
    does so for one token, and starts from zeros for more.)
    """

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache = cache
        self._layer = layer
        self.scan = None if cache is None else _recurrent(cache.layers[layer])
        """[batch, channel, state] as `keep` stored it; `None` before the first token."""

    def window(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """`x` [batch, seq, channel] with the width - 1 tokens before it, zeros where none were."""
        needed = width - 1 + x.shape[1]
        seen = x.mT
        if self._cache is not None:
            seen = self._cache.update_conv_state(seen, self._layer, conv_kernel_size=width)
        missing = max(0, needed - seen.shape[-1])
        return F.pad(seen, (missing, 0))[..., -needed:].mT

    def keep(self, state: torch.Tensor) -> None:
        """Store the state of the scan after the last token."""
        if self._cache is not None:
            self._cache.update_recurrent_state(state, self._layer)


def _recurrent(layer: Any) -> torch.Tensor | None:
    """Read before the convolution's state is updated: that marks the layer as begun."""
    if not layer.has_previous_state[0]:
        return None
    found: torch.Tensor = layer.recurrent_states[0].clone()
    return found
