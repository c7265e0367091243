"""Canonical names of all modules of a model, read along their native paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortap import wrappers
from tensortap.names import ROOT
from tensortap.wrappers import claim, unwrapped_modules
from tensortap_hf.words import CONTAINERS, CONTEXTS, LISTS, TOP, Words, layer_words


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A module, its native path in the model, and its canonical name."""

    name: str
    native: str
    module: nn.Module


def named(model: nn.Module, config: Any) -> list[Named]:
    """Every module under its canonical name, in the order of `named_modules`.

    Wrappers (DDP, `torch.compile`, PEFT, …) are left out: what they wrap has their name. No two
    names are equal: a module whose name is taken keeps its native path.
    """
    found = list(unwrapped_modules(model, wrapped))
    grammar = _Grammar([(path, module) for _, path, module in found], config, _embedding(model))
    taken: set[str] = set()
    return [
        Named(claim(taken, grammar.name(path, module), path), native, module)
        for native, path, module in found
    ]


def wrapped(module: nn.Module) -> str | None:
    """The attribute under which a wrapper, PEFT's among them, holds the module it stands for."""
    if type(module).__module__.startswith("peft."):  # A PEFT model, and the tuner inside of it.
        return next((key for key in ("base_model", "model") if key in module._modules), None)
    return wrappers.wrapped(module)


def _embedding(model: nn.Module) -> Any:
    """The token embedding, as the outermost transformers model gives it."""
    for module in model.modules():
        get: Any = getattr(module, "get_input_embeddings", None)
        if get is not None:
            try:
                return get()
            except (AttributeError, NotImplementedError):  # A model of images has none.
                return None
    return None


class _Grammar:
    """Where the layers of one model are, and how paths inside and outside of them are read."""

    def __init__(self, paths: Sequence[tuple[str, nn.Module]], config: Any, embedding: Any) -> None:
        self._layer = layer_words(config)
        self._embedding = embedding
        self._containers = CONTAINERS | {
            str(getattr(module, "base_model_prefix", "")) for _, module in paths
        }
        self._stems = self._towers(_layer_lists(paths))
        self._known: dict[str, str] = {}

    def name(self, path: str, module: nn.Module) -> str:
        """The canonical name; parents come before their children."""
        if not path:
            return ROOT
        self._known[path] = name = self._inside(path) or self._outside(path, module)
        return name

    def _towers(self, lists: Sequence[str]) -> Mapping[str, str]:
        """List of layers -> what precedes its names: nothing, unless there are several."""
        if len(lists) < 2:
            return dict.fromkeys(lists, "")
        stems: dict[str, str] = {}
        for path in lists:
            words = path.split(".")[:-1]
            stem = "".join(f"{word}." for word in words if word not in self._single())
            stems[path] = stem if stem not in stems.values() else "".join(f"{w}." for w in words)
        return stems

    def _single(self) -> frozenset[str]:
        """Containers that do not tell one tower of a model from the other."""
        return self._containers - {"encoder", "decoder"}

    def _inside(self, path: str) -> str | None:
        for layers, stem in self._stems.items():
            if path == layers:
                return f"{stem}layers"
            if path.startswith(layers + "."):
                index, _, rest = path[len(layers) + 1 :].partition(".")
                return f"{stem}layers.{index}" + _read(rest, self._layer)
        return None

    def _outside(self, path: str, module: nn.Module) -> str:
        if module is self._embedding:
            return "embed"
        stem, rest = self._tower(path)
        words = rest.split(".")
        while len(words) > 1 and words[0] in self._containers and ".".join(words) not in TOP:
            words.pop(0)
        found = TOP.get(".".join(words))
        if found is not None:
            return stem + found
        parent, _, word = path.rpartition(".")
        known = self._known.get(parent, parent)
        return path if known == parent else f"{known}.{word}"

    def _tower(self, path: str) -> tuple[str, str]:
        """Stem of the tower that a module next to a list of layers belongs to, and the rest."""
        for layers, stem in self._stems.items():
            prefix = layers.rpartition(".")[0] + "."
            if path.startswith(prefix):
                return stem, path[len(prefix) :]
        return "", path


def _layer_lists(paths: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Paths of the outermost lists of layers."""
    found: list[str] = []
    for path, module in paths:
        inside = any(path.startswith(layers + ".") for layers in found)
        if isinstance(module, nn.ModuleList) and path.split(".")[-1] in LISTS and not inside:
            found.append(path)
    return found


def _read(rest: str, words: Words) -> str:
    """Translate a path inside of a layer, longest known beginning first; `""` or `.attn.q`."""
    native = rest.split(".") if rest else []
    name = ""
    while native:
        length, word = _longest(native, words)
        name += "." + word
        del native[:length]
        last = word.rpartition(".")[2]
        context = "expert" if words is CONTEXTS["experts"] and last.isdigit() else last
        words = CONTEXTS.get(context, {})
    return name


def _longest(native: Sequence[str], words: Words) -> tuple[int, str]:
    for length in range(len(native), 0, -1):
        found = words.get(".".join(native[:length]))
        if found is not None:
            return length, found
    return 1, native[0]
