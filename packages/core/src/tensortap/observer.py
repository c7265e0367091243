"""What integrations report to: the tap's side of the protocol `integration.Observer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

from tensortap.capture import Capture, SiteCall
from tensortap.integration import Site

P = ParamSpec("P")
R = TypeVar("R")


class TapObserver:
    """Knows the selected sites and passes on what integrations see at them."""

    def __init__(self, capture: Capture, selected: Iterable[Site]) -> None:
        self._capture = capture
        self._selected = {id(site) for site in selected}

    def wants(self, site: Site) -> bool:
        """Is any tensor of this site selected?"""
        return id(site) in self._selected

    def enter(self, site: Site) -> SiteCall | None:
        """Begin a call of a function site; `None` when its step is not selected."""
        return self._capture.enter(site) if self.wants(site) else None

    def guard(self, hook: Callable[P, R]) -> Callable[P, R | None]:
        """What the hook raises is reported, and does not reach the model."""
        return self._capture.guarded(hook)

    def end_step(self) -> None:
        """The framework's own trainer finished one step."""
        self._capture.clock.end_step()

    def one_step(self) -> AbstractContextManager[None]:
        """Everything inside is one step."""
        return self._capture.clock.hold()

    def note(self, name: str, reason: str) -> None:
        """Put a remark into the coverage report."""
        self._capture.coverage.note(name, reason)
