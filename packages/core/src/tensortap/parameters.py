"""Hooks on parameters: values when a step begins, gradients as backward adds to them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from tensortap.capture import Capture
from tensortap.choices import Choices
from tensortap.errors import CaptureError
from tensortap.gradients import Sighting
from tensortap.hooks import Hook
from tensortap.integration import Site
from tensortap.names import escape
from tensortap.records import Coordinates
from tensortap.steps import Frame
from tensortap.undo import Undo


class ParameterHooks:
    """Captures parameters when a step begins, and gradients as backward accumulates them."""

    def __init__(self, sites: Sequence[Site], choices: Choices) -> None:
        self._choices = choices
        self._capture: Capture | None = None
        self._owners: dict[nn.Parameter, list[tuple[Site, str]]] = {}
        self._late: dict[nn.Module, list[nn.Parameter]] = {}
        self._awaited: set[nn.Parameter] = set()
        self._begun = False
        for site in sites:
            if site.kind == "module":
                self._add(site)

    def _add(self, site: Site) -> None:
        for native, parameter in site.module.named_parameters(recurse=False):
            name = site.words.get(native, escape(native))
            if name is not None:
                self._owners.setdefault(parameter, []).append((site, name))
                if site.late_parameters:
                    self._late.setdefault(site.module, []).append(parameter)

    def names(self) -> list[str]:
        """Every name a parameter or its gradient could be recorded or selected by."""
        return [
            f"{module}/{phase}/{name}"
            for phase in ("param", "grad")
            for owners in self._owners.values()
            for site, name in owners
            for module in (site.name, *site.parts)
        ]

    def install(self, capture: Capture, undo: Undo) -> None:
        """Hook the parameters whose gradients are selected, and modules whose values come late."""
        self._capture = capture
        accumulated = Hook(capture.guarded(self._accumulated))
        for parameter in self._owners:
            if parameter.requires_grad and self._seen(parameter, "grad", Coordinates()):
                register = parameter.register_post_accumulate_grad_hook
                if not parameter._post_accumulate_grad_hooks:
                    undo.call(functools.partial(_forget_hooks, parameter))
                undo.keep(register(accumulated))  # type: ignore[no-untyped-call]
        for module in self._late:
            undo.keep(module.register_forward_pre_hook(Hook(capture.guarded(self._arrived))))

    def begin_step(self, frame: Frame) -> None:
        """Capture every selected parameter, as the first forward of the step will use it."""
        if self._capture is None or not self._capture.active or not frame.selected:
            return
        if not self._begun:
            self._begun = True
            self._capture.guarded(self._refuse_moved)()
        self._awaited = {parameter for late in self._late.values() for parameter in late}
        for parameter in self._owners:
            if parameter not in self._awaited:
                self._emit(parameter, frame)

    def _refuse_moved(self) -> None:
        """Raise `CaptureError` if other parameters are in the model than when it was attached.

        `model.to("xla")` puts new ones there; hooks stay behind on those it replaces.
        """
        for parameter, owners in self._owners.items():
            site = owners[0][0]
            for now in site.module.parameters(recurse=False):
                if now.device.type != parameter.device.type:
                    raise CaptureError(
                        f"{site.name} was on {parameter.device.type} when it was attached and has "
                        f"new parameters on {now.device.type} now. Attach after moving the model."
                    )

    def _arrived(self, module: nn.Module, args: Any) -> None:
        """A module begins to run, so that what it waited for is there."""
        if self._capture is None or not self._capture.active:
            return
        frame = self._capture.clock.frame()
        for parameter in self._late[module]:
            if parameter in self._awaited and frame.selected:
                self._awaited.discard(parameter)
                self._emit(parameter, frame)

    def _emit(self, parameter: nn.Parameter, frame: Frame) -> None:
        seen = self._seen(parameter, "param", frame.whole())
        if seen and self._capture is not None:
            self._capture.emit(parameter, seen)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if self._capture is None or not self._capture.active:
            return
        frame = self._capture.clock.frame()
        if frame.selected:
            seen = self._seen(parameter, "grad", frame.whole(frame.microbatch))
            gradient = seen[0].site.gradient(cast(nn.Parameter, parameter))
            if gradient is not None:
                self._capture.emit(gradient, seen)

    def _seen(self, parameter: torch.Tensor, phase: str, at: Coordinates) -> list[Sighting]:
        chosen = (
            (site, name, self._choices.of(site, phase, name))
            for site, name in self._owners[cast(nn.Parameter, parameter)]
        )
        return [
            Sighting(site, phase, name, at, values, site.dims.get(name))
            for site, name, values in chosen
            if values is not None
        ]


def _forget_hooks(parameter: nn.Parameter) -> None:
    """A parameter that never had such a hook has `None` there, not an empty dictionary."""
    if not parameter._post_accumulate_grad_hooks:
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
