"""Which compared tensors a tensor was computed from, as far as names and order tell.

There is no graph in a run. What a module returns comes from what it was given, from its weights,
and from what the modules inside it returned; what it is given comes from its siblings that ran
before, or from what its parent was given; a gradient comes from gradients by the same rules and
from what its own module did in the forward pass. A tensor that is passed on under another name
differs by exactly the same numbers, and is found by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.divergence.missing import Compared
from tensortap_analysis.divergence.modules import Tensor, Tree
from tensortap_analysis.divergence.scope import Covers, Scope


class Seen(Protocol):
    """A pair, or one that was not measured and is only known by its name and moment."""

    @property
    def at(self) -> Moment: ...
    @property
    def name(self) -> str: ...
    @property
    def equal(self) -> bool: ...
    @property
    def error(self) -> float: ...
    @property
    def traced(self) -> bool: ...
    @property
    def numbers(self) -> tuple[object, ...]: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """Places of what a tensor was computed from, by how their errors come together in it.

    Those of `factors` (a module's inputs and weights) add up. Of `beside` (what the forward pass
    had, in a gradient) and `through` (what the modules inside returned, or the same tensor under
    another name) the worst counts. `missing` names what it was computed from as well, and what was
    not compared: that may have differed, too.
    """

    factors: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()
    through: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(sorted({*self.factors, *self.beside, *self.through}))


def upstream(pairs: Iterable[Seen], scope: Scope) -> Iterator[Sources]:
    """For each pair what it was computed from; pairs in execution order, compared in this scope.

    Nothing is looked for of what is equal. A weight as it was used may be recorded after the
    output that it made, and the gradient that a module is given after the one that it returns:
    their places are then later ones.
    """
    pairs = list(pairs)
    belated = _Belated(pairs)
    histories: dict[object, _History] = {}
    weights = _Weights()
    for place, pair in enumerate(pairs):
        tensor = Tensor.of(pair.name)
        found = weights.past(tensor, pair.at.step)
        if tensor.is_weight:
            lost = weights.missing(tensor, pair.at.step)
            found = replace(found, factors=weights.parameter(tensor), missing=lost)
        else:
            moment = _moment(pair)
            plain = histories.get((*moment, False)) if pair.at.recompute else None
            history = histories.setdefault((*moment, pair.at.recompute), _History(plain))
            given = belated.gradients(tensor, moment, place)
            if not pair.equal:
                used = weights.used(tensor) | belated.operands(tensor, moment)
                covers = scope.of_pair(traced=pair.traced)
                own = history.sources(tensor, pair, given, covers)
                found = _joined(found, own, used.values())
            history.add(tensor, pair, place, alike=not given)
        yield found
        weights.add(tensor, place)


def _moment(pair: Seen) -> tuple[object, ...]:
    at = pair.at
    return at.step, at.microbatch, at.dp_rank, at.eval


class _Belated:
    """What may be recorded after that which is made of it."""

    def __init__(self, pairs: Sequence[Seen]) -> None:
        self._operands: dict[tuple[object, str, str], dict[str, int]] = {}
        self._gradients: dict[tuple[object, str], list[int]] = {}
        for place, pair in enumerate(pairs):
            tensor, moment = Tensor.of(pair.name), _moment(pair)
            if tensor.is_weight and tensor.phase != "param":
                key = (moment, tensor.module, tensor.phase)
                self._operands.setdefault(key, {})[tensor.name] = place
            elif tensor.is_received_gradient:
                self._gradients.setdefault((moment, tensor.module), []).append(place)

    def operands(self, tensor: Tensor, moment: object) -> dict[str, int]:
        """Weights as they were used by the module that makes this tensor with them, by name."""
        if not tensor.returned or tensor.phase == "grad":
            return {}
        phases = ("forward",) if tensor.phase == "forward" else ("forward", "backward")
        used: dict[str, int] = {}
        for phase in phases:
            used |= self._operands.get((moment, tensor.module, phase), {})
        return used

    def gradients(self, tensor: Tensor, moment: object, place: int) -> tuple[int, ...]:
        """What the module of a gradient was given, where all of that was recorded later."""
        if tensor.phase == "forward" or not tensor.returned:
            return ()
        known = self._gradients.get((moment, tensor.module), [])
        return tuple(known) if known and known[0] > place else ()


def _joined(past: Sources, found: Sources, weights: Iterable[int]) -> Sources:
    return Sources(
        (*found.factors, *weights),
        found.beside,
        (*found.through, *past.through),
        found.missing,
    )


@dataclass(slots=True)
class _Weights:
    """How steps hang together: through the weights, which gradients of earlier steps changed."""

    latest: dict[str, dict[str, int]] = field(default_factory=dict)
    first_step: int | None = None
    step: int | None = None
    last: tuple[int, ...] = ()
    """The last tensor of the step before."""
    newest: int | None = None
    known: bool = False
    """Were parameters captured?"""

    def past(self, tensor: Tensor, step: int) -> Sources:
        """What a tensor of a later step takes from earlier ones."""
        self._enter(step)
        if step == self.first_step:
            return Sources()
        if not self.known:
            return Sources(through=self.last)  # nobody can say which weights changed
        own = self.latest.get(tensor.module, {}) if tensor.phase in ("param", "grad") else {}
        return Sources(through=tuple(own.values()))

    def _enter(self, step: int) -> None:
        self.first_step = step if self.first_step is None else self.first_step
        if step != self.step:
            self.last = (self.newest,) if self.newest is not None else ()
            self.step = step

    def parameter(self, tensor: Tensor) -> tuple[int, ...]:
        """The parameter that an operand is made of."""
        if tensor.phase == "param":
            return ()
        place = self.latest.get(tensor.module, {}).get(f"param/{tensor.name}")
        return () if place is None else (place,)

    def missing(self, tensor: Tensor, step: int) -> tuple[str, ...]:
        """What changed a parameter before the first step that it was compared at."""
        known = tensor.phase != "param" or step == 0 or self.latest.get(tensor.module)
        return () if known else (f"{tensor.module}/param/{tensor.name} before step {step}",)

    def used(self, tensor: Tensor) -> dict[str, int]:
        """The parameters of the module that makes this tensor with them, by name."""
        if not tensor.returned or tensor.phase == "grad":
            return {}
        own = self.latest.get(tensor.module, {})
        return {
            name.removeprefix("param/"): place
            for name, place in own.items()
            if name.startswith("param/")
        }

    def add(self, tensor: Tensor, place: int) -> None:
        self.newest = place
        self.known |= tensor.phase == "param"
        if tensor.phase in ("param", "grad"):
            self.latest.setdefault(tensor.module, {})[f"{tensor.phase}/{tensor.name}"] = place


class _History:
    """What was seen so far in one microbatch; `plain` is the forward that is recomputed."""

    def __init__(self, plain: _History | None) -> None:
        self._plain = plain
        self._tree = Tree()
        self._alike: dict[tuple[object, ...], int] = {}
        self._last: int | None = None

    def add(self, tensor: Tensor, pair: Seen, place: int, *, alike: bool) -> None:
        """Remember a tensor for those that come later; where `alike`, also by its numbers."""
        self._tree.add(tensor, place)
        if pair.error > 0 and alike:
            self._alike[pair.numbers] = place
        self._last = place

    def sources(
        self, tensor: Tensor, pair: Seen, belated: tuple[int, ...], covers: Covers
    ) -> Sources:
        """What it comes from; the tensor before it, where names tell nothing."""
        found = self._by_names(tensor)
        if belated:
            found = replace(found, factors=belated)
        twin = self._alike.get(pair.numbers)
        if twin is not None:
            return replace(found, through=(*found.through, twin))
        found = replace(found, missing=self._missing(tensor, covers, bool(belated)))
        if found.places or tensor.is_from_outside:
            return found
        known = self._plain.find(tensor) if self._plain is not None else None
        if known is not None:
            return Sources(through=(known,))
        return replace(found, through=() if self._last is None else (self._last,))

    def _missing(self, tensor: Tensor, covers: Covers, belated: bool) -> tuple[str, ...]:
        found = Compared(self._tree, covers).missing(tensor, belated=belated)
        if found and self._plain is not None:
            return self._plain._missing(tensor, covers, belated)
        return found

    def find(self, tensor: Tensor) -> int | None:
        """The place of this very tensor."""
        return self._tree.find(tensor)

    def _by_names(self, tensor: Tensor) -> Sources:
        forward = tensor.phase == "forward"
        beside = () if forward else tuple(self._tree.beside(tensor))
        if not tensor.returned:
            return Sources(tuple(self._tree.given(tensor)), beside)
        own = tuple(self._tree.inputs(tensor)) or tuple(self._tree.given(tensor))
        return Sources(own, beside, tuple(self._tree.inside(tensor)))
