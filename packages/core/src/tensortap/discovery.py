"""Which integration names a model: the installed ones are asked, highest precedence wins."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from torch import nn

from tensortap.errors import NotSupported, PluginError, nearest
from tensortap.integration import Integration, Observer, Site
from tensortap.names import ROOT
from tensortap.plugins import INTEGRATIONS, load_plugin
from tensortap.undo import Undo
from tensortap.wrappers import claim, unwrapped_modules


class NativeIntegration:
    """Serves any `torch.nn.Module`: a module's name is its own path."""

    name = "native"
    precedence = 0

    def refuse(self, model: nn.Module) -> str | None:
        return None

    def sites(self, model: nn.Module) -> Sequence[Site]:
        taken: set[str] = set()
        return [
            Site(name=claim(taken, path or ROOT, native), native=native, module=module)
            for native, path, module in unwrapped_modules(model)
        ]

    def install(
        self, model: nn.Module, sites: Sequence[Site], observer: Observer, undo: Undo
    ) -> None:
        """Hooks see all there is."""

    def describe(self, model: nn.Module) -> Mapping[str, Any]:
        return {}


def better_integration(model: nn.Module) -> str | None:
    """Which package would name a natively named model better, as a sentence, if one would."""
    framework = type(model).__module__.partition(".")[0]
    extra = {"transformers": "hf", "megatron": "megatron"}.get(framework)
    if extra is None or framework in {entry.name.partition(".")[0] for entry in _entries()}:
        return None
    return f'a {framework} model under native names; pip install "tensortap[{extra}]" knows it'


def _entries() -> EntryPoints:
    return entry_points(group=INTEGRATIONS)


def aliases(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, first path) of every module that lies at more than one place in the model."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen = first.setdefault(id(module), path)
        if seen != path:
            yield path, seen


def discover(model: nn.Module, using: str | None) -> Integration:
    """The integration that names `model`; `using` asks for one by name.

    Raises `NotSupported` when the one asked for cannot serve, `PluginError` for a plugin that
    fails to load, has another version than the core, or ties with another.
    """
    if using is not None:
        return _named(using, model)
    installed = (NativeIntegration(), *_installed())
    serving = [plugin for plugin in installed if plugin.refuse(model) is None]
    best = max(plugin.precedence for plugin in serving)
    winners = [plugin for plugin in serving if plugin.precedence == best]
    if len(winners) > 1:
        names = " and ".join(repr(plugin.name) for plugin in winners)
        raise PluginError(
            f"{names} both claim {type(model).__name__} with precedence {best}; "
            "choose one with attach(model, using=…)."
        )
    return winners[0]


def _named(using: str, model: nn.Module) -> Integration:
    known = []
    for plugin in (NativeIntegration(), *_installed(untriggered=True)):
        if plugin.name == using:
            reason = plugin.refuse(model)
            if reason is not None:
                raise NotSupported(f"using={using!r} cannot serve this model: {reason}")
            return plugin
        known.append(plugin.name)
    raise NotSupported(
        f"There is no integration {using!r}; installed: {nearest(using, known)}. "
        f'Others come as extras: pip install "tensortap[hf]".'
    )


def _installed(*, untriggered: bool = False) -> Iterator[Integration]:
    for entry in _entries():
        if untriggered or entry.name in sys.modules:
            yield load_plugin(entry)


def told_apart(sites: Sequence[Sequence[Site]]) -> list[list[Site]]:
    """Names that occur in several models of a list become `chunks.0.root`, `chunks.1.root`, …."""
    counts = Counter(name for some in sites for name in {site.name for site in some})
    return [
        [
            replace(site, name=f"chunks.{number}.{site.name}") if counts[site.name] > 1 else site
            for site in some
        ]
        for number, some in enumerate(sites)
    ]
