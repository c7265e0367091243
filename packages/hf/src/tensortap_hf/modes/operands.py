"""Where quantised linear layers tell the tap which operands they used.

The tap registers the site of a layer here; the layer calls `enter` once a forward and reports to
the call it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tensortap.integration import Call, Observer, Site
from tensortap.undo import Undo

FORWARD = ("input_quantized", "weight")
BACKWARD = ("grad_output_quantized", "weight")
_TAPPED: dict[nn.Module, tuple[Site, Observer]] = {}


class Replacement:
    """Stands in for `forward` of one module; a copy of the module has its own method."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        # Where this runs, the module's copy exists but is empty: what it has is its class's.
        return getattr, (self.module, "forward")


def sites(name: str, native: str, module: nn.Module, dims: Mapping[str, str]) -> list[Site]:
    """Where the operands of a module are seen: one place if it is quantised, else none."""
    if not isinstance(vars(module).get("forward"), Replacement):
        return []
    axes = {"input_quantized": dims.get("input"), "weight": dims.get("weight")}
    return [
        Site(
            name,
            f"{native}:operands",
            module,
            kind="function",
            tensors=FORWARD,
            dims={key: value for key, value in axes.items() if value is not None},
            forward_only=FORWARD,
            backward=BACKWARD,
        )
    ]


def is_operands(site: Site) -> bool:
    """Is this a site made here?"""
    return site.native.endswith(":operands")


def install(site: Site, observer: Observer, undo: Undo) -> None:
    """Report the operands of `site.module` to `observer` until `undo` runs."""
    undo.set_item(_TAPPED, site.module, (site, observer))


def enter(module: nn.Module) -> Call | None:
    """Begin a call of a quantised layer; `None` when nobody wants to know."""
    tapped = _TAPPED.get(module)
    return None if tapped is None else tapped[1].enter(tapped[0])
