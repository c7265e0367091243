"""Which modes there are: what each says of itself, and how a name is resolved to one.

A mode turns a loaded model into a numeric variant. It belongs to a family (`generic`, `quamba`),
which says what models it serves. A name may occur in several families: `quamba/fp32` spells it
out, else the model and the other modes asked for decide.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tensortap.errors import ConfigError, nearest
from tensortap.undo import Undo

Basis = Literal["native", "rotated"]
"""In which the residual stream is: the model's own, or multiplied by an orthogonal matrix."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a mode is given besides the model."""

    calibration: Any = None
    """Samples of token ids, or what the family's `calibrate` made of them."""
    exclude: tuple[str, ...] = ()
    """Selections of canonical module names (`layers.0.mlp.*`) that the mode leaves alone."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a mode did to a model, by canonical module names: kept in the metadata of a run."""

    changed: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    """Modules that one might expect to be changed and are not -> why."""


Apply = Callable[[nn.Module, Undo, Options], Changes]
"""Change the (unwrapped) model; every edit goes through the `Undo`. May raise half-way."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A numeric variant of a model."""

    name: str
    family: str
    description: str
    apply: Apply
    basis: Basis = "native"
    format: str | None = None
    """Of `tensortap.formats`: the grid its products are on, or the dtype; for the run."""
    equals: tuple[str, ...] = ()
    """Modes of the family that every tensor must be bitwise equal to; symmetric by itself."""
    needs_calibration: bool = False
    quantises: bool = False
    """Are there modules that it quantises, and that can be left out of it?"""

    @property
    def title(self) -> str:
        """`quamba/2-1`: names it among all families."""
        return f"{self.family}/{self.name}"


@dataclass(frozen=True, slots=True)
class Family:
    """Modes that belong together; later families are preferred where a name is in several."""

    name: str
    description: str
    refuse: Callable[[nn.Module], str | None]
    """Why the family cannot serve a model, as a sentence; `None`: it can."""
    presets: Mapping[str, tuple[str, ...]]
    """`all`, `essential`, `quant_only`, `fp_only` -> names of modes."""
    calibrate: Callable[..., Any] | None = None
    """`(model, samples, *, percentile_alpha, progress) -> calibration`, once for all modes.

    `progress` is called with the number of samples done.
    """
    is_meant_for: Callable[[nn.Module], bool] = lambda model: False
    """Would one expect the family to serve such a model, so that a refusal is worth telling?"""
    ladder: tuple[tuple[str, str], ...] = ()
    """Pairs (mode, reference) that differ in one thing each."""
    unrotate: Callable[[torch.Tensor], torch.Tensor] | None = None
    """A residual stream in the rotated basis -> the same in the model's own."""
    is_residual: Callable[[str], bool] | None = None
    """Does the tensor of this name lie in the residual stream, so that `unrotate` applies?"""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
"""Runs and files are called by the name of their mode."""
_FAMILIES: dict[str, Family] = {}
_MODES: dict[str, dict[str, Mode]] = {}
_BUILT_IN = ("tensortap_hf.modes.generic", "tensortap_hf.quamba.modes")
"""Each has a `FAMILY` and its `MODES`; imported when the first mode is asked for."""


@functools.cache
def _load_built_in() -> None:
    for path in _BUILT_IN:
        module = importlib.import_module(path)
        _add_family(module.FAMILY)
        for mode in module.MODES:
            _add(mode)


def register_family(family: Family) -> None:
    """Make a family known; raises `ConfigError` when its name is taken."""
    _load_built_in()
    _add_family(family)


def _add_family(family: Family) -> None:
    if family.name in _FAMILIES:
        raise ConfigError(f"There is a family of modes called {family.name!r} already.")
    _FAMILIES[family.name] = family
    _MODES[family.name] = {}


def register(mode: Mode) -> None:
    """Make a mode known to `get` and the command line; raises `ConfigError` for a taken name."""
    _load_built_in()
    _add(mode)


def _add(mode: Mode) -> None:
    if mode.family not in _FAMILIES:
        raise ConfigError(
            f"mode {mode.title}: there is no family {mode.family!r}; there are: "
            f"{', '.join(_FAMILIES)}. Make it with register_family()."
        )
    if _NAME.fullmatch(mode.name) is None:
        raise ConfigError(f"mode {mode.title}: a name has letters, digits and . _ - in it.")
    if mode.name in _MODES[mode.family]:
        raise ConfigError(f"There is a mode {mode.title} already.")
    _MODES[mode.family][mode.name] = mode


def family(name: str) -> Family:
    """The family of this name; raises `ConfigError`."""
    _load_built_in()
    if name not in _FAMILIES:
        raise ConfigError(
            f"There is no family of modes {name!r}; there are: {', '.join(_FAMILIES)}."
        )
    return _FAMILIES[name]


def families() -> tuple[str, ...]:
    """Every family, the most general one first."""
    _load_built_in()
    return tuple(_FAMILIES)


def names(family: str | None = None) -> tuple[str, ...]:
    """The modes of a family; without one, of all families, each name once."""
    _load_built_in()
    chosen = _MODES if family is None else {family: _modes_of(family)}
    return tuple(dict.fromkeys(name for modes in chosen.values() for name in modes))


def families_of(model: nn.Module) -> tuple[str, ...]:
    """Families that serve a model, the preferred one first."""
    _load_built_in()
    return tuple(name for name in reversed(_FAMILIES) if _FAMILIES[name].refuse(model) is None)


def refusals(model: nn.Module) -> dict[str, str]:
    """Families that are meant for such a model and cannot serve this one -> why."""
    _load_built_in()
    meant = {name: family for name, family in _FAMILIES.items() if family.is_meant_for(model)}
    found = {name: family.refuse(model) for name, family in meant.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def get(name: str, family: str | None = None, *, model: nn.Module | None = None) -> Mode:
    """The mode called `name` or `family/name`; raises `ConfigError`, listing what there is.

    A name that several families have is decided by `family`, by what `model` is served by, or is
    an error that says how to spell it out.
    """
    return resolve([name], family, model=model)[0]


def resolve(
    wanted: Sequence[str], family: str | None = None, *, model: nn.Module | None = None
) -> tuple[Mode, ...]:
    """Several modes at once: names that are in one family decide for those that are in several."""
    _load_built_in()
    served = tuple(reversed(_FAMILIES)) if model is None else families_of(model)
    found = [_candidates(name, family, served, model) for name in wanted]
    decided = {modes[0].family for modes in found if len(modes) == 1}
    return tuple(_one(modes, decided, model) for modes in found)


def _candidates(
    name: str, family: str | None, served: Sequence[str], model: nn.Module | None
) -> list[Mode]:
    """The modes that a name may mean, the preferred one first."""
    spelled, _, word = name.rpartition("/")
    chosen = spelled or family
    if chosen:
        modes = _modes_of(chosen)
        if word not in modes:
            raise ConfigError(
                f"family {chosen} has no mode {word!r}; closest: {nearest(word, modes, 3)}; "
                f"there are: {', '.join(modes)}."
            )
        if model is not None and chosen not in served:
            raise ConfigError(f"mode {chosen}/{word}: {_FAMILIES[chosen].refuse(model)}")
        return [modes[word]]
    found = [_MODES[family][word] for family in served if word in _MODES[family]]
    if not found:
        raise ConfigError(_unknown(word, served, model))
    return found


def _unknown(name: str, served: Sequence[str], model: nn.Module | None) -> str:
    elsewhere = [family for family, modes in _MODES.items() if name in modes]
    if elsewhere and model is not None:
        return f"mode {elsewhere[0]}/{name}: {_FAMILIES[elsewhere[0]].refuse(model)}"
    known = list(dict.fromkeys(word for family in served for word in _MODES[family]))
    return (
        f"mode {name!r} is not known; closest: {nearest(name, known, 3)}; "
        f"there are: {', '.join(known)}."
    )


def _one(modes: Sequence[Mode], decided: set[str], model: nn.Module | None) -> Mode:
    if len(modes) == 1:
        return modes[0]
    near = [mode for mode in modes if mode.family in decided]
    if len(near) == 1:
        return near[0]
    if not near and model is not None:
        return modes[0]
    titles = " or ".join(mode.title for mode in reversed(modes))
    raise ConfigError(f"mode {modes[0].name!r} is in several families; write {titles}.")


def _modes_of(family_name: str) -> dict[str, Mode]:
    return _MODES[family(family_name).name]
