"""Quamba's modes, as the registry knows them: seven of int8, and three of floats."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensortap.errors import ConfigError
from tensortap.selection import Selection
from tensortap.store.dtypes import dtype_name
from tensortap.undo import Undo
from tensortap_hf.fingerprint import fingerprint
from tensortap_hf.modes.casting import DTYPES
from tensortap_hf.modes.registry import Apply, Changes, Family, Mode, Options
from tensortap_hf.quamba import editing, rotation
from tensortap_hf.quamba.calibration import calibrate, observe
from tensortap_hf.quamba.codes import CodesForward, Weights
from tensortap_hf.quamba.floats import FloatForward
from tensortap_hf.quamba.observers import ALPHA
from tensortap_hf.quamba.parts import Parts, is_mamba, parts, refusal
from tensortap_hf.quamba.scales import Scales
from tensortap_hf.quamba.variants import VARIANTS, Variant

_NOT_QUANTISED = "rotated and not quantised, as Quamba leaves it unless asked to"
_ALL = ("fp32", *(variant.name for variant in VARIANTS))


def _in_floats(name: str) -> Apply:
    def apply(model: nn.Module, undo: Undo, options: Options) -> Changes:
        found = parts(model)
        editing.to_floats(found, undo, DTYPES[name])
        for block in found.blocks:
            undo.replace(block.mixer, "forward", FloatForward(block.mixer))
        return Changes((*_rotated(found), "embed", "lm_head"))

    return apply


def _in_codes(variant: Variant) -> Apply:
    def apply(model: nn.Module, undo: Undo, options: Options) -> Changes:
        found = parts(model)
        excluded = _excluded(found, options.exclude)
        scales = _scales(found, options.calibration)
        mixers = [block.mixer for block in found.blocks if block.name not in excluded]
        weights = editing.to_codes(found, undo, mixers)
        for block, layer in zip(found.blocks, scales.layers, strict=True):
            forward: Any = FloatForward(block.mixer)
            if block.name not in excluded:
                forward = CodesForward(block.mixer, variant, Weights(weights[block.mixer]), layer)
            undo.replace(block.mixer, "forward", forward)
        kept = dict.fromkeys(("embed", "lm_head"), _NOT_QUANTISED)
        return Changes(_rotated(found), kept | dict.fromkeys(excluded, "excluded: rotated, fp32"))

    return apply


def _rotated(parts: Parts) -> tuple[str, ...]:
    """Canonical names of what folding and rotation change inside of the layers."""
    blocks = [name for block in parts.blocks for name in (block.norm_name, block.name)]
    return (*blocks, "final_norm")


def _scales(parts: Parts, calibration: Any) -> Scales:
    """Scales that fit the model; from samples, if they are what was given."""
    if not isinstance(calibration, Scales):
        return observe(parts, calibration, ALPHA)
    scales = calibration
    wanted = (len(parts.blocks), parts.hidden_size, parts.intermediate_size)
    given = (len(scales.layers), scales.hidden_size, scales.intermediate_size)
    if given != wanted:
        raise ConfigError(
            "these scales are of another model: (layers, hidden size, channels) are "
            f"{given}, the model's are {wanted}. Calibrate this model."
        )
    if scales.weights != fingerprint(parts.model):
        raise ConfigError(
            "these scales are of another model: its sizes are the same, its weights are not. "
            "Calibrate this model, in the dtype it has now."
        )
    return scales


def _excluded(parts: Parts, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """Canonical names of the mixers that stay in floats."""
    if not exclude:
        return ()
    selection = Selection.parse(",".join(exclude))
    names = [block.name for block in parts.blocks]
    found = tuple(name for name in names if selection.matches_module(name))
    if not found:
        raise ConfigError(
            f"exclude={','.join(exclude)!r} names no mixer; the modes of Quamba quantise whole "
            f"mixers: {names[0]} to {names[-1]}."
        )
    return found


FAMILY = Family(
    "quamba",
    "MambaForCausalLM in W8A8 as Quamba computes it, all in the rotated basis",
    refusal,
    {
        "all": _ALL,
        "essential": ("fp32", "0", "2-1", "2-2", "2-4"),
        "quant_only": _ALL[1:],
        "fp_only": ("fp32",),
    },
    calibrate=calibrate,
    is_meant_for=is_mamba,
    ladder=(("0", "fp32"), ("2-1", "0"), ("2-2", "2-1"), ("2-4", "2-2")),
    unrotate=rotation.unrotate,
    is_residual=rotation.is_residual,
)

MODES = (
    *(
        Mode(
            name,
            "quamba",
            f"unquantised weights in {dtype_name(dtype)}, sequential scan in float32",
            _in_floats(name),
            basis="rotated",
            format=None if name == "fp32" else name,
        )
        for name, dtype in DTYPES.items()
    ),
    *(
        Mode(
            variant.name,
            "quamba",
            variant.description,
            _in_codes(variant),
            basis="rotated",
            format="int8",
            equals=variant.equals,
            needs_calibration=True,
            quantises=True,
        )
        for variant in VARIANTS
    ),
)
