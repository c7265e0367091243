"""Modules as the names of a run tell them: what each was given and returned, and who is inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_RETURNED = ("output", "context", "probs", "state")
_RECEIVED_BACKWARD = ("grad_output", "grad_context")
ROOT = "root"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A canonical name, in its three parts."""

    module: str
    phase: str
    name: str

    @classmethod
    def of(cls, name: str) -> Tensor:
        """Parse a canonical name."""
        return cls(*name.split("/"))

    @property
    def returned(self) -> bool:
        """Did the module compute it (rather than receive it)?"""
        word = self.name.split(".")[0]
        if self.phase == "forward":
            return word in _RETURNED
        return word not in _RECEIVED_BACKWARD

    @property
    def is_received_gradient(self) -> bool:
        """Is it what the backward pass hands to the module?"""
        return self.phase == "backward" and not self.returned

    @property
    def is_weight(self) -> bool:
        """Is it a parameter, or an operand made of one (rather than a gradient)?"""
        named = self.name.split(".")[0] in ("weight", "bias")
        return self.phase == "param" or (named and self.phase != "grad")

    @property
    def is_from_outside(self) -> bool:
        """Was the whole model given it?"""
        return self.module == ROOT and self.phase == "forward" and not self.returned


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

    def own(self, phase: str, *, returned: bool) -> Iterator[int]:
        """Tensors that this module returned, or that it was given."""
        for (seen, name), place in self.latest.items():
            tensor = Tensor(self.path, seen, name)
            if seen == phase and tensor.returned == returned and not tensor.is_weight:
                yield place


class Tree:
    """The modules of one microbatch as they were seen so far; tensors are known by their places."""

    def __init__(self) -> None:
        self._top = _Node("")
        self._nodes: dict[str, _Node] = {"": self._top}

    def add(self, tensor: Tensor, place: int) -> None:
        """Remember a tensor."""
        node = self._node(tensor.module)
        node.latest[tensor.phase, tensor.name] = place
        self._touch(node, tensor.phase)

    def find(self, tensor: Tensor) -> int | None:
        """The place of the tensor of this name."""
        node = self._nodes.get(tensor.module)
        return None if node is None else node.latest.get((tensor.phase, tensor.name))

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
        """Where that which its module is given comes from."""
        node, phase = self._node(tensor.module), tensor.phase
        phase = "backward" if phase == "grad" else phase
        parent = self._parent(node)
        while parent is not None:
            before = [*self._inside(parent, phase, but=node)]
            above = parent if parent.path else self._nodes.get(ROOT, parent)
            before += above.own(phase, returned=False)
            yield from before
            if before:
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
            own = list(child.own(phase, returned=True)) or list(self._inside(child, phase))
            yield from own or child.own(phase, returned=False)

    def _node(self, path: str) -> _Node:
        if path not in self._nodes:
            node = self._nodes[path] = _Node(path)
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
