"""`tensortap report`: runs, alone or against a reference, as one HTML file that opens offline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensortap_analysis.report.writing import Report, write_report

__all__ = ["Report", "write_report"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: every `tensortap` command loads this package, and plotly is large."""
    if name in __all__:
        return getattr(importlib.import_module("tensortap_analysis.report.writing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
