"""What would have been compared had it been there: what runs were asked to capture, and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tensortap.selection import Selection
from tensortap_analysis.captured.facts import RunFacts

Covers = Callable[[str, str], bool]
"""Would whatever a module inside this one returned in this phase have been compared?"""

_RESULTS: Mapping[str, str] = {"forward": "output", "backward": "grad_input"}
_OF_ATTENTION: Mapping[str, str] = {"forward": "context", "backward": "grad_query"}
"""What the product of an attention returns, which is no module with an output."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Selections: those that both runs were captured by, and that of the comparison.

    A run that does not say what it was asked for (an imported one) may lack anything.
    """

    captured: tuple[tuple[str | None, tuple[str, ...]], ...]
    compared: str = "*"

    @classmethod
    def of(cls, ref: RunFacts, run: RunFacts, compared: str) -> Scope:
        """Of two runs, and the selection that they are compared by."""
        return cls(((ref.select, ref.phases), (run.select, run.phases)), compared)

    def covers(self, parent: str, phase: str, *, traced: bool) -> bool:
        """Are all modules right inside `parent` compared, or, where `traced`, were at hand?"""
        selections = [text for text, _ in self.captured]
        if any(text is None or phase not in phases for text, phases in self.captured):
            return False
        wanted = selections if traced else [*selections, self.compared]
        return all(_covers(text or "*", parent, phase) for text in wanted)

    def of_pair(self, *, traced: bool) -> Covers:
        """`covers` for a pair whose sources were, or were not, looked for in the whole runs."""
        return lambda parent, phase: self.covers(parent, phase, traced=traced)


@lru_cache(maxsize=1 << 14)
def _covers(select: str, parent: str, phase: str) -> bool:
    selection = _parsed(select)
    if parent.rpartition(".")[2] == "attn":
        core = f"{parent}.core/{phase}/{_OF_ATTENTION[phase]}"
        if not selection.matches(core):
            return False
    return selection.takes_every(f"{parent}." if parent else "", f"/{phase}/{_RESULTS[phase]}")


@lru_cache(maxsize=64)
def _parsed(select: str) -> Selection:
    return Selection.parse(select)
