"""What a tensor was directly computed from that was not compared.

What a module returns is made of what it was given. What it is given was returned by a module that
ran before it inside the same parent, or was given to that parent; which one, names do not tell.
So all of them must have been compared before it can be said that none of them differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensortap.names import ROOT
from tensortap_analysis.divergence.modules import Tensor, Tree
from tensortap_analysis.divergence.scope import Covers

_GIVEN = {"forward": "input", "backward": "grad_output"}
_RETURNED = {"forward": "output", "backward": "grad_input"}
_ENDS = {"forward": "embed", "backward": "final_norm"}
"""What hands the first layer its input, and the last one its gradient."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The modules of a microbatch as far as they were compared, and what was asked for."""

    tree: Tree
    covers: Covers

    def missing(self, tensor: Tensor, *, belated: bool = False) -> tuple[str, ...]:
        """Names, or globs, of what may have differed; `belated`: its gradient is known."""
        if tensor.is_from_outside:
            return ()
        module = tensor.module
        if tensor.phase == "forward":
            return self._input(module, "forward") if tensor.returned else self._before(module)
        if tensor.returned:
            gradient = () if belated else self._input(module, "backward")
            return (*gradient, *self._input(module, "forward"))
        return self._before(module, "backward") or self._beside(module)

    def _input(self, module: str, phase: str) -> tuple[str, ...]:
        """What the module was given in this phase, where neither it nor its origin was compared."""
        if self.tree.has(module, phase, returned=False) or not self._before(module, phase):
            return ()
        return (f"{module}/{phase}/{_GIVEN[phase]}",)

    def _before(self, module: str, phase: str = "forward") -> tuple[str, ...]:
        """Where that which a module is given comes from, as far as it was not compared."""
        if module in ("", ROOT):
            return ()
        parent, _, last = module.rpartition(".")
        follows = self._neighbour(parent, last, phase) if last.isdecimal() else None
        if follows is not None and self.tree.has(follows, phase, returned=True):
            return ()
        if self.covers(parent, phase):
            return self._input(parent, phase)
        if follows is not None:
            return (f"{follows}/{phase}/{_RETURNED[phase]}",)
        around = parent.rpartition(".")[0] if last.isdecimal() else parent
        return (f"{around}.*/{phase}/{_RETURNED[phase]}".removeprefix("."),)

    def _neighbour(self, parent: str, number: str, phase: str) -> str | None:
        """The layer that ran before this one in this phase; at the ends the embedding or norm."""
        before = int(number) + (-1 if phase == "forward" else 1)
        name = f"{parent}.{before}"
        if before >= 0 if phase == "forward" else self.tree.knows(name):
            return name
        end = f"{parent.rpartition('.')[0]}.{_ENDS[phase]}".removeprefix(".")
        return end if parent.endswith("layers") and self.tree.knows(end) else None

    def _beside(self, module: str) -> tuple[str, ...]:
        """The forward pass of what is around a module: its gradient depends on it."""
        parent, _, last = module.rpartition(".")
        if last.isdecimal() or self.covers(parent, "forward"):
            return ()
        return (f"{parent}.*/forward/output".removeprefix("."),)
