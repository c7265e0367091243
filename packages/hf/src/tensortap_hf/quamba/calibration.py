"""Static scales from samples: run the rotated model in fp32 and watch its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tensortap.errors import AlreadyAttached, ConfigError
from tensortap.undo import Undo
from tensortap_hf.fingerprint import fingerprint
from tensortap_hf.modes.applied import state_of
from tensortap_hf.quamba import editing
from tensortap_hf.quamba.floats import FloatForward
from tensortap_hf.quamba.observers import ALPHA, MinMax, Observer, Percentile
from tensortap_hf.quamba.parts import Parts, parts
from tensortap_hf.quamba.scales import NAMES, LayerScales, Scales, from_maxima

_PERCENTILE = ("x_proj_input", "ssm_state")
"""What is clipped at a quantile; everything else keeps its maximum."""


def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    percentile_alpha: float = ALPHA,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """The scales of every mixer, from samples of token ids; the model is left as it was.

    A sample is a tensor [tokens] or [1, tokens], or a list of numbers; each runs by itself, so
    their lengths may differ. `progress` is called with the number of samples done. Raises
    `NotSupported` for another model than Mamba, `ConfigError` for samples that are none.
    """
    if state_of(model) is not None:
        raise AlreadyAttached(
            "the model is in a mode; calibrate the model as it was loaded: call remove() first."
        )
    return observe(parts(model), samples, percentile_alpha, progress)


@torch.no_grad()
def observe(
    parts: Parts,
    samples: Iterable[Any],
    alpha: float,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """The same for a model taken apart."""
    if not 0 < alpha <= 1:
        raise ConfigError(f"percentile alpha {alpha} is not in (0, 1]; the default is {ALPHA}.")
    ids = _checked(samples, int(parts.embed.weight.shape[0]))
    weights = fingerprint(parts.model)
    watched = [_Watch(block.name, alpha) for block in parts.blocks]
    undo = Undo()
    try:
        editing.to_floats(parts, undo, torch.float32)
        for block, watch in zip(parts.blocks, watched, strict=True):
            undo.replace(block.mixer, "forward", FloatForward(block.mixer, watch))
        for done, sample in enumerate(ids, start=1):
            parts.model.backbone(sample.to(parts.embed.weight.device), use_cache=False)
            if progress is not None:
                progress(done)
    finally:
        undo.run()
    return Scales(
        tuple(watch.scales() for watch in watched),
        parts.hidden_size,
        parts.intermediate_size,
        alpha,
        tuple(sample.shape[1] for sample in ids),
        weights,
    )


class _Watch:
    """The observers of one mixer."""

    def __init__(self, mixer: str, alpha: float) -> None:
        self._mixer = mixer
        self._observers: dict[str, Observer] = {
            name: Percentile(alpha) if name in _PERCENTILE else MinMax() for name in NAMES
        }

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        """One sample passes; tensors without a scale of their own are not looked at."""
        observer = self._observers.get(name)
        if observer is None:
            return
        if not math.isfinite(float(tensor.abs().max())):
            word = name.replace("_input", " input").replace("_output", " output")
            raise ConfigError(
                f"calibration: {self._mixer} has NaN or infinite values ({word}) in a sample, so "
                "that no scale can be made; look at the model in fp32 first."
            )
        observer.see(tensor)

    def scales(self) -> LayerScales:
        """After the last sample."""
        seen = {name: observer.maximum for name, observer in self._observers.items()}
        return from_maxima({name: maximum for name, maximum in seen.items() if maximum is not None})


def _checked(samples: Iterable[Any], vocabulary: int) -> Sequence[torch.Tensor]:
    """Each sample as [1, tokens]."""
    ids = [_sample(sample, at, vocabulary) for at, sample in enumerate(samples)]
    if not ids:
        raise ConfigError("calibration needs at least one sample of token ids; it got none.")
    return ids


def _sample(sample: Any, at: int, vocabulary: int) -> torch.Tensor:
    try:
        given = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise ConfigError(f"calibration sample {at} is no tensor of token ids: {failure}") from None
    ids = given[None] if given.dim() == 1 else given
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.numel() or not _whole(ids):
        raise ConfigError(
            f"calibration sample {at} is a {given.dtype} tensor of shape {tuple(given.shape)}; it "
            "must be token ids [tokens] or [1, tokens]. Samples are never put together as a batch."
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ConfigError(
            f"calibration sample {at} has token ids from {int(ids.min())} to {int(ids.max())}; "
            f"the vocabulary ends at {vocabulary - 1}."
        )
    return ids


def _whole(ids: torch.Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
