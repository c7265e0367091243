"""Which compared tensors a tensor was computed from, as far as names and order tell.

There is no graph in a run. What a module returns comes from what it was given and from what the
modules inside it returned; what it is given comes from its siblings that ran before, or from what
its parent was given; a gradient comes from gradients by the same rules and from what its own
module did in the forward pass. A tensor that is passed on under another name differs by exactly
the same numbers, and is found by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tensortap_analysis.pairs import Pair

_RETURNED = ("output", "context", "probs", "state")
_RECEIVED_BACKWARD = ("grad_output", "grad_context")


def upstream(pairs: Iterable[Pair]) -> Iterator[tuple[int, ...]]:
    """For each pair the places of those it was computed from; pairs in execution order."""
    histories: dict[object, _History] = {}
    weights = _Weights()
    for place, pair in enumerate(pairs):
        at, tensor = pair.at, _Tensor.of(pair)
        found = weights.past(tensor, at.step)
        if tensor.phase != "param":
            key = (at.step, at.microbatch, at.dp_rank, at.eval, at.recompute)
            history = histories.setdefault(key, _History())
            found |= history.sources(tensor, pair)
            history.add(tensor, pair, place)
        yield tuple(sorted(found))
        weights.add(tensor, place)


@dataclass(frozen=True, slots=True)
class _Tensor:
    module: str
    phase: str
    name: str

    @classmethod
    def of(cls, pair: Pair) -> _Tensor:
        return cls(*pair.name.split("/"))

    @property
    def returned(self) -> bool:
        """Did the module compute it (rather than receive it)?"""
        word = self.name.split(".")[0]
        if self.phase == "forward":
            return word in _RETURNED
        return word not in _RECEIVED_BACKWARD

    @property
    def is_weight(self) -> bool:
        return self.name.split(".")[0] in ("weight", "bias") and self.phase != "grad"


@dataclass(slots=True)
class _Weights:
    """How steps hang together: through the weights, which gradients of earlier steps changed."""

    latest: dict[str, dict[str, int]] = field(default_factory=dict)
    first_step: int | None = None
    step: int | None = None
    last: set[int] = field(default_factory=set)
    """The last tensor of the step before."""
    newest: int | None = None
    known: bool = False
    """Were parameters captured?"""

    def past(self, tensor: _Tensor, step: int) -> set[int]:
        """What a tensor of a later step takes from earlier ones."""
        self._enter(step)
        if step == self.first_step:
            return set()
        if not self.known:
            return set(self.last)  # nobody can say which weights changed
        own = self.latest.get(tensor.module, {})
        summed = tensor.phase in ("param", "grad")
        return {place for name, place in own.items() if summed or name.startswith("param/")}

    def _enter(self, step: int) -> None:
        self.first_step = step if self.first_step is None else self.first_step
        if step != self.step:
            self.last = {self.newest} if self.newest is not None else set()
            self.step = step

    def add(self, tensor: _Tensor, place: int) -> None:
        self.newest = place
        self.known |= tensor.phase == "param"
        if tensor.phase in ("param", "grad"):
            self.latest.setdefault(tensor.module, {})[f"{tensor.phase}/{tensor.name}"] = place


@dataclass(slots=True)
class _Node:
    """One module: its latest tensors, by phase and name, and the modules inside it."""

    path: str
    latest: dict[tuple[str, str], int] = field(default_factory=dict)
    children: dict[str, _Node] = field(default_factory=dict)
    recent: dict[str, list[str]] = field(default_factory=dict)
    """Numbered children that were seen in a phase, the last one last."""

    @property
    def numbered(self) -> bool:
        return self.path.rpartition(".")[2].isdecimal()


class _History:
    """What was seen so far in one microbatch."""

    def __init__(self) -> None:
        self._root = _Node("")
        self._nodes: dict[str, _Node] = {"": self._root}
        self._alike: dict[tuple[object, ...], int] = {}
        self._last: int | None = None

    def add(self, tensor: _Tensor, pair: Pair, place: int) -> None:
        """Remember a tensor for those that come later."""
        node = self._node(tensor.module)
        node.latest[tensor.phase, tensor.name] = place
        self._touch(node, tensor.phase)
        if pair.error > 0:
            self._alike[_numbers(pair)] = place
        self._last = place

    def sources(self, tensor: _Tensor, pair: Pair) -> set[int]:
        """Places of the tensors it comes from; the one before, where names tell nothing."""
        if tensor.is_weight:
            return set()
        node = self._node(tensor.module)
        how = self._returned_from if tensor.returned else self._given
        found = set(how(node, tensor))
        twin = self._alike.get(_numbers(pair))
        found |= {twin} if twin is not None else set()
        return found or ({self._last} if self._last is not None else set())

    def _returned_from(self, node: _Node, tensor: _Tensor) -> Iterator[int]:
        phases = ("forward",) if tensor.phase == "forward" else ("forward", "backward")
        for (phase, name), place in node.latest.items():
            if phase in phases and not _Tensor(node.path, phase, name).is_weight:
                yield place
        children = self._root if node.path == "root" else node
        for phase in phases:
            yield from self._inside(children, phase)

    def _given(self, node: _Node, tensor: _Tensor) -> Iterator[int]:
        parent = self._parent(node)
        if tensor.phase != "forward" and parent is not None:
            # A product's gradient is made of what the other factor was.
            for sibling in parent.children.values():
                if sibling is node or not sibling.numbered:
                    yield from _own(sibling, "forward", returned=True)
        while parent is not None:
            before = [*self._inside(parent, tensor.phase, but=node)]
            before += _own(parent if parent.path else self._nodes.get("root", parent), tensor.phase)
            yield from before
            if before:
                return
            node, parent = parent, self._parent(parent)

    def _inside(self, parent: _Node, phase: str, but: _Node | None = None) -> Iterator[int]:
        """What the modules inside returned; of numbered ones (layers) only the latest.

        Of one that is still at work, what its insides returned so far, or what they were given.
        """
        recent = [path for path in parent.recent.get(phase, ()) if but is None or path != but.path]
        for child in parent.children.values():
            if child is but or (child.numbered and child.path not in recent[-1:]):
                continue
            own = list(_own(child, phase, returned=True)) or list(self._inside(child, phase))
            yield from own or _own(child, phase)

    def _node(self, path: str) -> _Node:
        if path not in self._nodes:
            node = self._nodes[path] = _Node(path)
            if path != "root":
                self._node(path.rpartition(".")[0]).children[path] = node
        return self._nodes[path]

    def _parent(self, node: _Node) -> _Node | None:
        return self._nodes[node.path.rpartition(".")[0]] if node.path not in ("", "root") else None

    def _touch(self, node: _Node, phase: str) -> None:
        parent = self._parent(node)
        while parent is not None:
            if node.numbered:
                recent = parent.recent.setdefault(phase, [])
                if node.path in recent:
                    recent.remove(node.path)
                recent.append(node.path)
                del recent[:-2]  # the latest, and the one before where the latest itself asks
            node, parent = parent, self._parent(parent)


def _own(node: _Node, phase: str, *, returned: bool = False) -> Iterator[int]:
    """Tensors of this module that it returned, or that it was given."""
    for (seen, name), place in node.latest.items():
        tensor = _Tensor(node.path, seen, name)
        if seen == phase and tensor.returned == returned and not tensor.is_weight:
            yield place


def _numbers(pair: Pair) -> tuple[object, ...]:
    metrics = pair.metrics
    return (metrics.count, metrics.ref.rms, metrics.other.rms, metrics.mse, metrics.max_abs)
