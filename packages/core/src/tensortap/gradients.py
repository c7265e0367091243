"""Gradients of tensors seen in a forward: one hook a tensor, however many sites see it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tensortap.integration import Site
from tensortap.records import Coordinates, FormatInfo, Values
from tensortap.steps import Frame

_FRAMES_A_LEAF_REMEMBERS = 64
"""A leaf that never gets a gradient must not collect microbatches for ever."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A tensor seen at a site: what becomes a record once its values are on the way."""

    site: Site
    phase: str
    tensor: str
    at: Coordinates
    values: Values
    dims: str | None = None
    format: FormatInfo | None = None


Arrived = Callable[[torch.Tensor, Frame, Sequence[Sighting]], None]


class Gradients:
    """Tensor hooks of one tap. Each brings the total gradient: one value, whatever the sites.

    A tensor's version tells an in-place result from the value before it: same object, other
    gradient. A leaf keeps its hooks for ever, so it gets a single one, removed on `release`.
    """

    def __init__(self, arrived: Arrived, current: Callable[[], Frame]) -> None:
        """`current` says which forward the backward pass under way belongs to."""
        self._arrived = arrived
        self._current = current
        self._watched: dict[int, _Watched] = {}

    def watch(self, tensor: torch.Tensor, frame: Frame, seen: Sighting | None) -> None:
        """Have `arrived` called with the gradient of a tensor seen in `frame`."""
        key = id(tensor)
        watched = self._watched.get(key)
        if watched is None or not watched.is_for(tensor):
            reference = weakref.ref(tensor, lambda gone: self._forget(key, gone))
            watched = self._watched[key] = _Watched(reference, tensor, self)
            watched.handle = tensor.register_hook(watched.fire)  # type: ignore[no-untyped-call]
        watched.add(frame, seen)

    def arrived(
        self, gradient: torch.Tensor, seen: dict[Frame, list[Sighting]], *, leaf: bool
    ) -> None:
        """A tensor's gradient is there; what several forwards saw is a leaf, or goes between them.

        Into a leaf each backward pass brings the gradient of its own forward. Any other tensor
        has one gradient, and backward goes on into the earliest forward that saw it.
        """
        frames = [self._current()] if leaf else list(reversed(seen))
        for frame in frames:
            if frame in seen:
                self._arrived(gradient, frame, seen[frame])

    def _forget(self, key: int, gone: weakref.ref[torch.Tensor]) -> None:
        """The tensor behind `key` is gone; its address may be another tensor's next."""
        watched = self._watched.get(key)
        if watched is not None and watched.tensor is gone:
            del self._watched[key]

    def release(self) -> None:
        """Remove the hooks of leaves; those of other tensors go with their graph."""
        for watched in self._watched.values():
            watched.release()
        self._watched.clear()


class _Watched:
    """Waits for the gradient of one tensor; holds the tensor weakly, or it would never be freed."""

    __slots__ = ("_gradients", "_leaf", "_seen", "_version", "handle", "tensor")

    def __init__(
        self, reference: weakref.ref[torch.Tensor], tensor: torch.Tensor, gradients: Gradients
    ) -> None:
        self.tensor = reference
        self._leaf = tensor.is_leaf
        self._version = tensor._version
        self._gradients = gradients
        self._seen: dict[Frame, list[Sighting]] = {}
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def is_for(self, tensor: torch.Tensor) -> bool:
        return self.tensor() is tensor and (self._leaf or self._version == tensor._version)

    def add(self, frame: Frame, seen: Sighting | None) -> None:
        """A site saw the tensor; a recomputed forward sees it again without adding to it."""
        sightings = self._seen.setdefault(frame, [])
        if seen is not None and seen not in sightings:
            sightings.append(seen)
        if len(self._seen) > _FRAMES_A_LEAF_REMEMBERS:
            del self._seen[next(iter(self._seen))]

    def fire(self, gradient: torch.Tensor | None) -> None:
        """Called by autograd in each backward pass that reaches the tensor."""
        if gradient is not None:
            self._gradients.arrived(gradient, self._seen, leaf=self._leaf)

    def release(self) -> None:
        """Leave no trace on a leaf, which outlives its graphs."""
        tensor = self.tensor()
        if self._leaf and self.handle is not None:
            self.handle.remove()
            if tensor is not None and not tensor._backward_hooks:
                tensor._backward_hooks = None
