"""Modules as the names of a run tell them: what each was given and returned, and who is inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from tensortap.names import ROOT
from tensortap_analysis.captured.words import layer_of

_RETURNED = ("output", "context", "probs", "state")
_RECEIVED_BACKWARD = ("grad_output", "grad_context")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A canonical name, in its three parts.

    `returned`: the module computed it, rather than received it. `is_weight`: it is a parameter,
    or an operand made of one, rather than a gradient.
    """

    module: str
    phase: str
    name: str
    returned: bool
    is_weight: bool

    @classmethod
    def of(cls, name: str) -> Tensor:
        """Parse a canonical name."""
        return _parsed(name)

    @property
    def is_received_gradient(self) -> bool:
        """Is it what the backward pass hands to the module?"""
        return self.phase == "backward" and not self.returned

    @property
    def is_from_outside(self) -> bool:
        """Was the whole model given it, or the embedding, whose indices are data?"""
        whole = self.module == ROOT or (self.module, self.name) == ("embed", "input")
        return whole and self.phase == "forward" and not self.returned


@lru_cache(maxsize=1 << 16)  # the names of a step come again at the next one
def _parsed(text: str) -> Tensor:
    module, phase, name = text.split("/")
    word = name.split(".")[0]
    forward = phase == "forward"
    returned = word in _RETURNED if forward else word not in _RECEIVED_BACKWARD
    weight = phase == "param" or (word in ("weight", "bias") and phase != "grad")
    return Tensor(module, phase, name, returned, weight)


@dataclass(slots=True)
class _Node:
    """One module: its latest tensors, and the modules inside it; `numbered`: it is one of many."""

    path: str
    numbered: bool
    latest: dict[Tensor, int] = field(default_factory=dict)
    children: dict[str, _Node] = field(default_factory=dict)
    recent: dict[str, list[str]] = field(default_factory=dict)
    """Numbered children that were seen in a phase, the last one last."""

    def own(self, phase: str, *, returned: bool) -> list[int]:
        """Tensors that this module returned, or that it was given."""
        return [
            place
            for tensor, place in self.latest.items()
            if tensor.phase == phase and tensor.returned is returned and not tensor.is_weight
        ]


class Tree:
    """The modules of one microbatch as they were seen so far; tensors are known by their places."""

    def __init__(self) -> None:
        self._top = _Node("", False)
        self._nodes: dict[str, _Node] = {"": self._top}

    def add(self, tensor: Tensor, place: int) -> None:
        """Remember a tensor."""
        node = self._node(tensor.module)
        node.latest[tensor] = place
        self._touch(node, tensor.phase)

    def find(self, tensor: Tensor) -> int | None:
        """The place of the tensor of this name."""
        node = self._nodes.get(tensor.module)
        return None if node is None else node.latest.get(tensor)

    def has(self, module: str, phase: str, *, returned: bool) -> bool:
        """Was anything seen that this module returned, or was given, in this phase?"""
        node = self._nodes.get(module)
        return node is not None and bool(node.own(phase, returned=returned))

    def knows(self, module: str) -> bool:
        """Was anything seen of this module, or of one inside it?"""
        return module in self._nodes

    def inputs(self, tensor: Tensor) -> Iterator[int]:
        """What its module was given, in the direction of this tensor."""
        phase = "forward" if tensor.phase == "forward" else "backward"
        yield from self._node(tensor.module).own(phase, returned=False)

    def inside(self, tensor: Tensor) -> Iterator[int]:
        """What its module, and the modules inside, returned before it."""
        node = self._node(tensor.module)
        phase = "forward" if tensor.phase == "forward" else "backward"
        yield from node.own(phase, returned=True)
        yield from self._inside(self._top if node.path == ROOT else node, phase)

    def given(self, tensor: Tensor) -> Iterator[int]:
        """Where that which its module is given comes from.

        In a layer that is what the nearest module around it has; outside of all layers names may
        have been moved (`transformer.drop` beside `layers.0`), and all that is around counts.
        """
        node, phase = self._node(tensor.module), tensor.phase
        phase = "backward" if phase == "grad" else phase
        nearest = layer_of(tensor.module) is not None
        parent = self._parent(node)
        while parent is not None:
            before = [*self._inside(parent, phase, but=node)]
            above = parent if parent.path else self._nodes.get(ROOT, parent)
            before += above.own(phase, returned=False)
            yield from before
            if before and nearest:
                return
            node, parent = parent, self._parent(parent)

    def beside(self, tensor: Tensor) -> Iterator[int]:
        """What the forward pass had, of which a gradient is made: the other factors of products."""
        node = self._node(tensor.module)
        if tensor.returned:
            for returned in (False, True):
                yield from node.own("forward", returned=returned)
            yield from self._inside(self._top if node.path == ROOT else node, "forward")
        elif (parent := self._parent(node)) is not None:
            for sibling in parent.children.values():
                if sibling is node or not sibling.numbered:
                    yield from sibling.own("forward", returned=True)

    def _inside(self, parent: _Node, phase: str, but: _Node | None = None) -> Iterator[int]:
        """What the modules inside returned; of numbered ones (layers) only the latest.

        Of one that is still at work, what its insides returned so far, or what they were given.
        """
        recent = [path for path in parent.recent.get(phase, ()) if but is None or path != but.path]
        for child in parent.children.values():
            if child is but or (child.numbered and child.path not in recent[-1:]):
                continue
            own = child.own(phase, returned=True) or list(self._inside(child, phase))
            yield from own or child.own(phase, returned=False)

    def _node(self, path: str) -> _Node:
        if path not in self._nodes:
            node = self._nodes[path] = _Node(path, path.rpartition(".")[2].isdecimal())
            if path != ROOT:
                self._node(path.rpartition(".")[0]).children[path] = node
        return self._nodes[path]

    def _parent(self, node: _Node) -> _Node | None:
        return self._nodes[node.path.rpartition(".")[0]] if node.path not in ("", ROOT) else None

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
