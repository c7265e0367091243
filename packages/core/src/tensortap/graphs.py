"""Stay outside compiled graphs: what reads tensors cannot be traced by Dynamo."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

_REASON = (
    "tensortap reads tensors here, which breaks the graph; detach the tap, or compile without "
    "fullgraph=True"
)
P = ParamSpec("P")
R = TypeVar("R")


def outside_graph(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run by a graph break under `torch.compile`; 0.3 us a call more in eager code.

    Call it at attach rather than at import: the first call imports Dynamo.
    """
    known = inspect.signature(torch.compiler.disable).parameters
    said = {"reason": _REASON} if "reason" in known else {}  # Older torch has no such argument.
    disabled = torch.compiler.disable(function, **said)  # type: ignore[no-untyped-call]
    return cast("Callable[P, R]", disabled)
