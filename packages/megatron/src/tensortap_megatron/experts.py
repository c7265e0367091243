"""Which tokens the experts of a rank were given: the dispatcher's permutation, as a tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensortap.hooks import Hook
from tensortap.integration import Observer, Site
from tensortap.undo import Undo

TENSORS = ("token_index",)
_INDEX = "reversed_local_input_permutation_mapping"


def dispatcher_of(layer: nn.Module) -> Any | None:
    """The token dispatcher of an MoE layer, if it keeps the permutation."""
    dispatcher = getattr(layer, "token_dispatcher", None)
    names = type(dispatcher).__name__
    known = ("MoEAllGatherTokenDispatcher", "MoEAlltoAllTokenDispatcher")
    return dispatcher if names in known else None


def install(site: Site, observer: Observer, undo: Undo) -> None:
    """Record, when the experts of an MoE layer begin, which token each of their rows is.

    The index is into the tokens as the dispatcher permuted them: those of all ranks it gathered
    from, or, with all-to-all, this rank's own before the exchange.
    """

    layer: Any = site.module
    dispatcher = layer.token_dispatcher

    def before(module: nn.Module, args: Any) -> None:
        call = observer.enter(site)
        if call is not None:
            call.capture({"token_index": getattr(dispatcher, _INDEX, None)})

    undo.keep(layer.experts.register_forward_pre_hook(Hook(observer.guard(before))))
