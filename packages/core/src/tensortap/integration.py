"""`Integration`: the plugin for one framework. It says which sites a model has and their names.

Third parties register theirs as an entry point of the group `tensortap.integrations`; the entry
point's name is the module that triggers it, and it is loaded only when that module is already
in `sys.modules`. `tensortap.testing.IntegrationContract` is the test class for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from tensortap.records import FormatInfo, Placement
from tensortap.undo import Undo

PlacementRule = Callable[[str, str, torch.Tensor], "Placement | None"]
"""(phase, tensor, value) -> how the value lies in the logical tensor; `None`: it is whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One place in a model that can be tapped.

    A `module` site is hooked by the core: its inputs and outputs, their gradients, and the
    parameters it owns. A `function` site is reported by its integration through
    `Observer.enter`; `tensors` lists the forward tensors it yields.
    """

    name: str
    native: str
    module: nn.Module
    kind: Literal["module", "function"] = "module"
    tensors: tuple[str, ...] = ("input", "output")
    dims: Mapping[str, str] = field(default_factory=dict)
    """Forward tensor, or parameter, to its named axes: `{"query": "batch head seq dim"}`."""
    placement: PlacementRule | None = None
    silent: str | None = None
    """Why hooks at this site can never fire (`"superseded by layers.0.mixer.conv"`)."""


class Call(Protocol):
    """One call of a site: fixes the coordinates of everything captured in it."""

    def capture(
        self,
        tensors: Mapping[str, Any],
        *,
        dims: Mapping[str, str] | None = None,
        format: FormatInfo | None = None,
    ) -> None:
        """Capture forward tensors now, and their gradients as `grad_…` when backward runs.

        Values that are not tensors (tuples, dicts, dataclasses) are walked; `None` is skipped.
        """


class Observer(Protocol):
    """What an integration reports to; implemented by the tap."""

    def wants(self, site: Site) -> bool:
        """Is any tensor of this site selected? If not, patch nothing for it."""

    def enter(self, site: Site) -> Call | None:
        """Begin a call of a function site; `None` when this step or rank is not selected."""

    def end_step(self) -> None:
        """The framework's own trainer finished one step, also when it skipped an overflow."""

    def one_step(self) -> AbstractContextManager[None]:
        """Everything inside is one step (one `generate`): its forwards are microbatches.

        During training the forwards inside are `eval` and no step ends.
        """

    def note(self, name: str, reason: str) -> None:
        """Put a remark about a site into the coverage report."""


class Integration(Protocol):
    """Names and taps the modules of one framework."""

    name: str
    """What the user writes in `attach(model, using=…)`."""
    precedence: int
    """The highest that does not refuse names the model; a tie is an error."""

    def refuse(self, model: nn.Module) -> str | None:
        """Why this integration cannot serve the model, as a sentence; `None`: it can."""

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Every site, in the order of `named_modules`, function sites after their module."""

    def install(
        self, model: nn.Module, sites: Sequence[Site], observer: Observer, undo: Undo
    ) -> None:
        """Patch what hooks cannot see; every edit goes through `undo`. May do nothing."""

    def describe(self, model: nn.Module) -> Mapping[str, Any]:
        """Fields of `RunInfo`: `model_config`, `versions`, `parallel`, `mode`, `format`."""
