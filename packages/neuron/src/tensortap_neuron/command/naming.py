"""The tensors that are looked at layer by layer, and what older scripts called them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from tensortap import discovery
from tensortap.errors import NotSupported

_OUTPUT, _INPUT = "/forward/output", "/forward/input"
_MODULE = re.compile(r"(?P<stem>(?:.*\.)?)(?P<word>embed|final_norm|layers\.(?P<number>\d+))")


@dataclass(frozen=True, slots=True)
class Place:
    """The output of the embedding, of a layer, or of the final norm."""

    name: str
    """Canonical, of the tensor."""
    stem: str
    word: str
    number: int | None

    @property
    def given(self) -> str | None:
        """The tensor that is captured beside it: what goes in, where no other layer puts it out.

        Without, a fault of the embedding or the final norm could be inherited for all one knows.
        """
        if self.number is not None:
            return None
        return f"{self.name.removesuffix(_OUTPUT)}{_INPUT}"

    @property
    def title(self) -> str:
        """`embedding`, `layer 3`, `final norm`; after the tower's name where there are several."""
        said = {"embed": "embedding", "final_norm": "final norm"}
        tower = f"{self.stem.rstrip('.')}: " if self.stem else ""
        return tower + (said[self.word] if self.number is None else f"layer {self.number}")

    @property
    def file(self) -> str:
        """The stem of its file in the layout `layers-pt`: `layer_3_output`."""
        said = {"embed": "embedding_output", "final_norm": "final_norm_output"}
        return said[self.word] if self.number is None else f"layer_{self.number}_output"

    def matches(self, pattern: str) -> bool:
        """Does a glob match its file, with or without `_output` or `.pt`, or its name?"""
        module = self.name.removesuffix(_OUTPUT)
        words = (self.file, self.file.removesuffix("_output"), f"{self.file}.pt", module, self.name)
        return any(fnmatchcase(word, pattern) for word in words)


def place(name: str) -> Place | None:
    """What a canonical tensor name is; `None` for anything but these three."""
    module, _, rest = name.partition("/")
    found = _MODULE.fullmatch(module)
    if found is None or f"/{rest}" != _OUTPUT:
        return None
    number = None if found["number"] is None else int(found["number"])
    return Place(name, found["stem"], found["word"], number)


def places(names: Iterable[str]) -> list[Place]:
    """Those of the names, in the order given."""
    return [found for name in names if (found := place(name)) is not None]


def places_of(model: nn.Module) -> list[Place]:
    """All of a decoder: embedding, layers by their number, final norm.

    Towers beside it, which have no token embedding, are left out: a text does not go through them.
    Raises `NotSupported` for a model without layers that tensortap knows.
    """
    modules = (site.name for site in discovery.discover(model, None).sites(model))
    found = places(f"{module}{_OUTPUT}" for module in dict.fromkeys(modules))
    if not any(one.number is not None for one in found):
        raise NotSupported(
            f"{type(model).__name__} has no layers that tensortap knows. Names of Hugging Face "
            'models come with tensortap-hf: pip install "tensortap[hf]".'
        )
    text = {one.stem for one in found if one.word == "embed"}
    return in_order([one for one in found if not text or one.stem in text])


def with_inputs(found: Iterable[Place]) -> list[str]:
    """Their tensors, and those that say whether an error came in."""
    known = list(found)
    return [*(one.name for one in known), *(one.given for one in known if one.given is not None)]


def in_order(found: Iterable[Place]) -> list[Place]:
    """Embedding, layers by their number, final norm; tower by tower."""
    return sorted(found, key=_order)


def _order(one: Place) -> tuple[str, int, int]:
    words = ("embed", None, "final_norm")
    return one.stem, words.index(None if one.number is not None else one.word), one.number or 0
