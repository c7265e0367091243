"""Where the products of a module tell the tap which operands they used.

The tap registers the site of a module here. Whoever computes the module's products (the fake
quantisation does) calls `enter` once a forward and reports to the call it gets.
"""

from __future__ import annotations

from torch import nn

from tensortap.integration import Call, Observer, Site
from tensortap.undo import Undo

ATTENTION = ("query_quantized", "key_quantized", "probs_quantized", "value_quantized")
"""What quantised attention products report in forward."""


class Operands:
    """The calls of one module's products."""

    def __init__(self, site: Site, observer: Observer) -> None:
        self._site = site
        self._observer = observer
        self._call: Call | None = None
        self._entered = False

    def enter(self) -> Call | None:
        """Begin a call; `None` when its step is not selected."""
        self._call, self._entered = self._observer.enter(self._site), True
        return self._call

    def leave(self) -> tuple[Call | None, bool]:
        """At the module's end: its call, and whether somebody has reported to it already."""
        reported = self._entered
        call = self._call if reported else self.enter()
        self._call, self._entered = None, False
        return call, reported


_TAPPED: dict[nn.Module, Operands] = {}


def register(site: Site, observer: Observer, undo: Undo) -> Operands:
    """Report the products of `site.module` to `observer` until `undo` runs."""
    operands = Operands(site, observer)
    undo.set_item(_TAPPED, site.module, operands)
    return operands


def enter(module: nn.Module) -> Call | None:
    """Begin a call of a module's products; `None` when nobody wants to know."""
    operands = _TAPPED.get(module)
    return None if operands is None else operands.enter()
