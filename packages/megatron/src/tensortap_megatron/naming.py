"""Canonical names of all modules of a Megatron-core model, with global layer and expert numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortap.names import ROOT
from tensortap.wrappers import claim, unwrap, unwrapped_modules
from tensortap_megatron.words import BLOCK, CONTEXTS, EDGES, GATED, LAYER, TOP, Words

_IDENTITIES = frozenset({"IdentityOp", "IdentityFuncOp"})


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A module, its native path in the model, and its canonical name."""

    name: str
    native: str
    module: nn.Module

    @property
    def in_expert(self) -> bool:
        """Is it the experts of an MoE layer, or inside of one?"""
        return "experts" in self.name.split(".")

    @property
    def word(self) -> str:
        """`layers.3.attn.qkv` -> `attn.qkv`, `layers.3` -> `layer`, an expert's without number.

        What stands at either end of one of several towers has the word it has in a single one.
        """
        words = self.name.split(".")
        if "layers" not in words and words[-1] in EDGES:
            return words[-1]
        if "layers" in words:
            words = words[words.index("layers") + 2 :] or ["layer"] * (words[-1] != "layers")
        if "experts" in words[:-1]:
            words = [word for word in words if not word.isdecimal()]
        return ".".join(words)


def modules(model: nn.Module) -> list[Named]:
    """Every module under its canonical name, in the order of `named_modules`.

    Wrappers (DDP, Float16Module) are left out: what they wrap has their name. So are Megatron's
    placeholders that do nothing. A module whose name is taken keeps its native path.
    """
    root = unwrap(model)
    found = [
        (native, path, module)
        for native, path, module in unwrapped_modules(root)
        if type(module).__name__ not in _IDENTITIES
    ]
    grammar = _Grammar({path: module for _, path, module in found}, root)
    taken: set[str] = set()
    return [
        Named(claim(taken, grammar.name(path), path), native, module)
        for native, path, module in found
    ]


class _Grammar:
    """Where the layers of one model are, and how paths inside and outside of them are read."""

    def __init__(self, paths: Mapping[str, nn.Module], root: nn.Module) -> None:
        self._paths = paths
        self._gated = bool(getattr(getattr(root, "config", None), "gated_linear_unit", False))
        self._alone = int(getattr(root, "layer_number", 1)) - 1 if is_layer(root) else None
        lists = [path for path in paths if _is_layer_list(path, paths)]
        self._stems = {path: _stem(path, alone=len(lists) == 1) for path in lists}

    def name(self, path: str) -> str:
        """The canonical name of the module at a path."""
        if not path:
            return ROOT
        if self._alone is not None:
            return f"layers.{self._alone}" + self._read("", path)
        for layers, stem in self._stems.items():
            if path == layers:
                return f"{stem}layers"
            if path.startswith(layers + "."):
                return f"{stem}layers.{self._inside(layers, path)}"
            block = layers.removesuffix("layers")
            tower = block.removesuffix("decoder.")
            if path.startswith(block) and path[len(block) :] in BLOCK:
                return stem + BLOCK[path[len(block) :]]
            if tower and path.startswith(tower) and path[len(tower) :] in TOP:
                return stem + TOP[path[len(tower) :]]
        return TOP.get(path, path)

    def _inside(self, layers: str, path: str) -> str:
        index, _, rest = path[len(layers) + 1 :].partition(".")
        at = f"{layers}.{index}"
        number = getattr(self._paths[at], "layer_number", int(index) + 1) - 1
        return f"{number}" + self._read(at, rest)

    def _read(self, at: str, rest: str) -> str:
        """Translate a path inside of a layer, word by word: `""` or `.attn.qkv`."""
        name, words = "", LAYER
        native = rest.split(".") if rest else []
        while native:
            first = native.pop(0)
            below, at = at, f"{at}.{first}" if at else first
            if first == "local_experts" and native:
                number = native.pop(0)
                word = str(_first_expert(self._paths, below) + int(number))
                at, words = f"{at}.{number}", CONTEXTS["expert"]
            else:
                word = self._word(words, first)
                words = CONTEXTS.get(word, {})
            name += "." + word
        return name

    def _word(self, words: Words, native: str) -> str:
        word = words.get(native, native)
        return GATED.get(word, word) if self._gated else word


def is_layer(module: Any) -> bool:
    """Is it a layer, of any kind? Parts of a layer know its number as well."""
    return is_a(module, "TransformerLayer", "MambaLayer")


def is_a(module: Any, *classes: str) -> bool:
    """Is its class, or one that this derives from, of one of these names?"""
    return any(kind.__name__ in classes for kind in type(module).__mro__)


def _is_layer_list(path: str, paths: Mapping[str, nn.Module]) -> bool:
    """Is this the list of a tower's layers? Those of multi-token prediction are not."""
    return (
        path.rpartition(".")[2] == "layers"
        and isinstance(paths[path], nn.ModuleList)
        and not path.startswith("mtp.")
        and ".mtp." not in path
        and ".layers." not in path
    )


def _stem(path: str, *, alone: bool) -> str:
    """What precedes the names of a tower: nothing where it is the only one."""
    owner = path.removesuffix("layers")
    return "" if alone else owner.removesuffix("decoder.") or owner


def _first_expert(paths: Mapping[str, nn.Module], experts: str) -> int:
    """Global number of the first expert that this rank holds; `experts` is a path."""
    layer: Any = paths.get(experts.rpartition(".")[0])
    indices = getattr(layer, "local_expert_indices", None)
    return int(indices[0]) if indices else 0
