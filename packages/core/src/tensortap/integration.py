"""`Integration`: the plugin for one framework. It says which sites a model has and their names.

Third parties register theirs as an entry point of the group `tensortap.integrations`; the entry
point's name is the module that triggers it, and it is loaded only when that module is already
in `sys.modules`. `tensortap.testing.IntegrationContract` is the test class for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from tensortap.records import FormatInfo, Placement
from tensortap.undo import Undo

P = ParamSpec("P")
R = TypeVar("R")

PlacementRule = Callable[[str, str, torch.Tensor], "Placement | None"]
"""(phase, tensor, value) -> how the value lies in the logical tensor; `None`: it is whole."""

GradientRule = Callable[[nn.Parameter], "torch.Tensor | None"]
"""A parameter whose `.grad` was just accumulated -> its gradient so far in the step."""


def plain_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """Where torch itself accumulates."""
    return parameter.grad


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One place in a model that can be tapped.

    A `module` site is hooked by the core: its inputs and outputs, their gradients, and the
    parameters it owns. A `function` site is reported by its integration through
    `Observer.enter`; `tensors` lists the forward tensors it yields. Several sites may share a
    name, as long as their tensors and native names differ.
    """

    name: str
    native: str
    module: nn.Module
    kind: Literal["module", "function"] = "module"
    tensors: tuple[str, ...] = ("input", "output")
    dims: Mapping[str, str] = field(default_factory=dict)
    """Forward tensor, or parameter, to its named axes: `{"query": "batch head seq dim"}`."""
    placement: PlacementRule | None = None
    words: Mapping[str, str | None] = field(default_factory=dict)
    """What hooks and modules call a tensor or parameter -> its name here; `None`: not recorded.
    `{"input.1": "key", "layer_norm_weight": "weight"}`."""
    parts: tuple[str, ...] = ()
    """Names this site is selected by as well: those of what is fused in it."""
    forward_only: tuple[str, ...] = ()
    """Of `tensors`: those whose gradients are not watched."""
    backward: tuple[str, ...] = ()
    """Tensors of the backward of a function site that are no gradients of `tensors`."""
    gradient: GradientRule = plain_gradient
    late_parameters: bool = False
    """Are its parameters valid only once its module runs, not when the step begins?"""
    silent: str | None = None
    """Why hooks at this site can never fire (`"superseded by layers.0.mixer.conv"`)."""

    @property
    def key(self) -> str:
        """What its calls are counted by: sites that share a name are called side by side."""
        return f"{self.name} {self.native}"


class Call(Protocol):
    """One call of a site: fixes the coordinates of everything captured in it."""

    def capture(
        self,
        tensors: Mapping[str, Any],
        *,
        dims: Mapping[str, str] | None = None,
        format: FormatInfo | None = None,
        phase: Literal["forward", "backward"] = "forward",
    ) -> None:
        """Capture forward tensors now, and their gradients as `grad_…` when backward runs.

        With `phase="backward"`, called from inside the backward of this call: capture tensors of
        its backward under the names given. Values that are not tensors (tuples, dicts,
        dataclasses) are walked; `None` is skipped.
        """


class Observer(Protocol):
    """What an integration reports to; implemented by the tap."""

    def wants(self, site: Site) -> bool:
        """Is any tensor of this site selected? If not, patch nothing for it."""

    def enter(self, site: Site) -> Call | None:
        """Begin a call of a function site; `None` when this step or rank is not selected."""

    def guard(self, hook: Callable[P, R]) -> Callable[P, R | None]:
        """`hook`, whose failures are reported like those of the tap, and never reach the model."""

    def end_step(self) -> None:
        """The framework's own trainer finished one step, also when it skipped an overflow."""

    def one_step(self) -> AbstractContextManager[None]:
        """Everything inside is one step (one `generate`): its forwards are microbatches.

        During training the forwards inside are `eval` and no step ends.
        """

    def note(self, name: str, reason: str) -> None:
        """Put a remark about a site into the coverage report."""


@runtime_checkable
class SpreadModels(Protocol):
    """What an integration also has when a model is spread over ranks, as pipelines are."""

    def elsewhere(self, model: nn.Module) -> Sequence[str]:
        """Forward names (`layers.7.mlp/forward/output`) that sites of other ranks may have.

        Found without a collective; a selection that matches one of them may be empty here.
        """


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
        """Fields of `RunInfo`: model_config, versions, parallel, mode, format, metadata.

        What the user gives to `attach` as metadata is added to it.
        """
