"""Which layers of a model a command looks at, and the tensors it captures of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tensortap import discovery
from tensortap.errors import ConfigError, NotSupported

_LAYER = re.compile(r"(?P<stem>(?:.*\.)?)layers\.(?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers by number, of each tower of a model; names of what is captured, in order."""

    numbers: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def select(self) -> str:
        """As `attach` takes it."""
        return ",".join(self.names)


def layers(model: nn.Module, wanted: str) -> Layers:
    """`first,last`, `0,23` or `all`, as tensors: input, output, and the mixer's output.

    Raises `ConfigError` for a layer there is not, `NotSupported` for a model without layers.
    """
    modules = {site.name for site in discovery.discover(model, None).sites(model)}
    towers: dict[str, set[int]] = {}
    for name in modules:
        found = _LAYER.fullmatch(name)
        if found is not None:
            towers.setdefault(found["stem"], set()).add(int(found["number"]))
    if not towers:
        raise NotSupported(f"{type(model).__name__} has no layers that tensortap knows.")
    chosen = {stem: _chosen(wanted, sorted(numbers)) for stem, numbers in sorted(towers.items())}
    names = tuple(
        tensor
        for stem, numbers in chosen.items()
        for number in numbers
        for tensor in _tensors(f"{stem}layers.{number}", modules)
    )
    return Layers(tuple(sorted(set().union(*chosen.values()))), names)


def require_words(wanted: str) -> None:
    """Raise `ConfigError` for words that are layers of no model; needs no model."""
    for word in _words(wanted):
        if word not in ("first", "last", "all") and re.fullmatch(r"\d+", word) is None:
            raise ConfigError(
                f"--layers {wanted}: {word!r} is none; write first, last, all, or numbers."
            )


def _words(wanted: str) -> list[str]:
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    if not words:
        raise ConfigError("--layers is empty; write first,last or all.")
    return words


def _chosen(wanted: str, numbers: list[int]) -> list[int]:
    words = _words(wanted)
    known: Mapping[str, list[int]] = {
        "first": numbers[:1], "last": numbers[-1:], "all": numbers,
        **{str(number): [number] for number in numbers},
    }  # fmt: skip
    for word in words:
        if word not in known:
            raise ConfigError(
                f"--layers {wanted}: {word!r} is none; write first, last, all, or numbers from "
                f"{numbers[0]} to {numbers[-1]}."
            )
    return sorted({number for word in words for number in known[word]})


def _tensors(layer: str, modules: set[str]) -> list[str]:
    mixers = [f"{layer}.mixer/forward/output"] if f"{layer}.mixer" in modules else []
    return [f"{layer}/forward/input", f"{layer}/forward/output", *mixers]
