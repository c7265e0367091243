"""Hooks on modules: what a module is given, what it returns, its parameters and their gradients.

Hooks are objects, not closures: a copied or pickled model carries inert ones, so copies of a
tapped model are not tapped. Under `torch.compile` a hook runs outside the compiled graph.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tensortap.capture import Capture, SiteCall
from tensortap.graphs import outside_graph
from tensortap.integration import Site
from tensortap.undo import Undo
from tensortap.walk import arguments, first_parameter


class Inert:
    """What a hook becomes in a copy of a tapped model."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class Hook:
    """A function as a hook that stays behind when its module is copied or pickled."""

    def __init__(self, function: Callable[..., object]) -> None:
        _break_graphs_at_hooks()
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


@functools.cache
def _break_graphs_at_hooks() -> None:
    Hook.__call__ = outside_graph(Hook.__call__)  # type: ignore[method-assign]


def _is(module: nn.Module, ours: nn.Module) -> bool:
    """The module itself, or a replica of it that DataParallel made for one forward."""
    return module is ours or "_is_replica" in module.__dict__


class ContainerHooks:
    """Tells the clock where forwards of modules with children begin and end."""

    def __init__(self, capture: Capture, module: nn.Module, *, root: bool) -> None:
        self._capture = capture
        self._module = module
        self._root = root
        self._training = any(p.requires_grad for p in module.parameters())

    def install(self, undo: Undo) -> None:
        """Hook the module; called before any capturing hook, `install_end` after them."""
        undo.keep(self._module.register_forward_pre_hook(Hook(self.begin)))

    def install_end(self, undo: Undo) -> None:
        """Hook the end, also of a forward that raises."""
        undo.keep(self._module.register_forward_hook(Hook(self.end), always_call=True))

    def begin(self, module: nn.Module, *_: Any) -> None:
        """Before the module's forward."""
        clock = self._capture.clock
        if _is(module, self._module) and self._capture.active:
            learns = self._training and (module.training or clock.trained)
            clock.open(self._module, root=self._root, training=learns and torch.is_grad_enabled())

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the module's forward: the gradient of its output will come first in backward."""
        if _is(module, self._module):
            frame = self._capture.clock.close(self._module)
            if frame is not None and self._capture.active:
                self._capture.mark(output, frame)


class ModuleHooks:
    """Captures the inputs and outputs of one module, and has their gradients watched."""

    def __init__(self, capture: Capture, site: Site) -> None:
        self._capture = capture
        self._site = site
        self._first = first_parameter(site.module)
        self._thread = _OpenCalls()

    def install(self, undo: Undo) -> None:
        """Hook the module; inputs are captured before it runs, it may overwrite them."""
        module = self._site.module
        undo.keep(module.register_forward_pre_hook(Hook(self.before), with_kwargs=True))
        undo.keep(module.register_forward_hook(Hook(self.after)))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Capture what the module is given."""
        if not _is(module, self._site.module):
            return
        call = self._capture.enter(self._site)
        self._thread.push(call)
        if call is not None:
            call.capture(arguments(self._first, args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Capture what the module returned."""
        if _is(module, self._site.module) and self._thread.calls:
            call = self._thread.calls.pop()
            if call is not None:
                call.capture({"output": output})


class _OpenCalls(threading.local):
    """Calls of one module under way in this thread; more than one when it calls itself."""

    def __init__(self) -> None:
        self.calls: list[SiteCall | None] = []

    def push(self, call: SiteCall | None) -> None:
        """Add a call, `None` when it is not selected; forget what a raising forward left."""
        last = self.calls[-1] if self.calls else None
        if call is None or last is None or last.frame is not call.frame:
            self.calls.clear()
        self.calls.append(call)


def ancestors(root: nn.Module, tapped: Iterable[nn.Module]) -> list[nn.Module]:
    """The root and every module with a tapped module below it: where a forward may begin."""
    wanted = {id(module) for module in tapped}
    return [
        module
        for module in root.modules()
        if module is root or any(id(m) in wanted for m in module.modules() if m is not module)
    ]
