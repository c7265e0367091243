"""Modes for any transformers model: dtypes, and linear layers on the grid of a number format."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensortap import formats
from tensortap.errors import NotSupported
from tensortap.formats import Codec
from tensortap.store.dtypes import dtype_name
from tensortap.undo import Undo
from tensortap_hf import integration, quamba_model
from tensortap_hf.modes import casting, linears
from tensortap_hf.modes.registry import Apply, Changes, Family, Mode, Options

_GRIDS = {
    "int8": ("W8A8: weights per output channel, activations per token", {"scale": "channel"}),
    "hifp8": ("HiFloat8, saturating, no scales", {"overflow": "saturate"}),
    "mxfp8": ("E4M3 in blocks of 32", {}),
    "mxfp4": ("E2M1 in blocks of 32", {}),
    "nvfp4": ("E2M1 in blocks of 16, E4M3 scales", {}),
}


def refuse(model: nn.Module) -> str | None:
    """Why these modes cannot serve a model: it is none of transformers.

    The int8 model of the package quamba is none either, but it can be `loaded`.
    """
    if integration.pretrained(model) or quamba_model.is_quamba(model):
        return None
    return f"{type(model).__name__} holds no transformers PreTrainedModel."


def quantization_method(model: nn.Module) -> str | None:
    """How the weights of a loaded checkpoint are quantised (`torchao`); `None`: they are not."""
    if quamba_model.is_quamba(model):
        return "quamba"
    for found in integration.pretrained(model):
        config: Any = getattr(found.config, "quantization_config", None)
        if config is not None:
            method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
            return str(getattr(method, "value", method))
    return None


def _casting(name: str) -> Apply:
    def apply(model: nn.Module, undo: Undo, options: Options) -> Changes:
        _refuse_quantized(model)
        return casting.cast(model, undo, casting.DTYPES[name])

    return apply


def _quantizing(name: str, codec: Codec) -> Apply:
    def apply(model: nn.Module, undo: Undo, options: Options) -> Changes:
        _refuse_quantized(model)
        return linears.quantize(model, undo, codec, options.exclude)

    return apply


def _as_loaded(model: nn.Module, undo: Undo, options: Options) -> Changes:
    return Changes()


def _refuse_quantized(model: nn.Module) -> None:
    method = quantization_method(model)
    if method is not None:
        raise NotSupported(
            f"The weights of this checkpoint are quantised already ({method}), so nothing else "
            "can be made of them. Use mode loaded, and the unquantised checkpoint for a reference."
        )


_EVERY = (*casting.DTYPES, *_GRIDS)

FAMILY = Family(
    "generic",
    "any transformers model: dtypes, and fake-quantised linear layers",
    refuse,
    {
        "all": _EVERY,
        "essential": ("fp32", "bf16", "int8", "mxfp8", "mxfp4"),
        "quant_only": tuple(name for name in _EVERY if name != "fp32"),
        "fp_only": ("fp32",),
    },
)

MODES = (
    *(
        Mode(
            name,
            "generic",
            f"all weights and products in {dtype_name(dtype)}",
            _casting(name),
            format=name if name in formats.names() else None,
        )
        for name, dtype in casting.DTYPES.items()
    ),
    *(
        Mode(
            name,
            "generic",
            f"fake-quantised linear layers: {says}",
            _quantizing(name, formats.get(name, **options)),
            format=name,
            quantises=True,
        )
        for name, (says, options) in _GRIDS.items()
    ),
    Mode("loaded", "generic", "as it was loaded: for quantised checkpoints", _as_loaded),
)
