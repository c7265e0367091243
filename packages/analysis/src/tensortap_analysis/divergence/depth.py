"""How the error grows with depth: what goes into each layer, comes out, and is added inside."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.divergence.inheritance import CLEAR, Inheritance, beyond, inheritance
from tensortap_analysis.divergence.modules import Tensor
from tensortap_analysis.divergence.upstream import Sources
from tensortap_analysis.pairs.pair import Pair

_LAYER = re.compile(r"((?:.*?\.)?layers\.\d+)(?=[./])")
_RESULTS = ("output", "context")


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer at one moment; all errors are relative (L2), `None` for what was not compared.

    `added` is what its modules added, taken together (root of the sum of squares), or what lies
    between its input and output where the modules do not tell; `None` where statistics do not tell
    it either, or the input was not compared. `by` is the module that added most, and `most` how
    much. `measured`: none of that is an estimate. `least`: of statistics, it is at least that.
    """

    at: Moment
    input: float | None
    output: float | None
    added: float | None
    by: str | None
    most: float
    measured: bool
    least: bool = False

    @property
    def layer(self) -> str:
        """`layers.3`."""
        return self.at.name


@dataclass(frozen=True, slots=True)
class _Share:
    """What a module added: the error of its result beyond what was inherited."""

    module: str
    found: Inheritance
    error: float
    known: bool
    """Was everything compared that it was computed from?"""

    @property
    def is_exact(self) -> bool:
        """Was it measured, or is there nothing that could be inherited?"""
        return self.found.basis == "measured" or self.found.most == 0

    @property
    def is_unknown(self) -> bool:
        """May it have inherited more than can be told, or is it infinite?"""
        lacking = not self.known and self.found.local > 0
        return lacking or self.found.basis == "statistics" or math.isinf(self.error)

    @property
    def is_clear(self) -> bool:
        """Is it more than passes for amplification?"""
        return self.error > CLEAR * self.found.inherited


@dataclass(slots=True)
class _Layer:
    """What is gathered of one layer at one moment."""

    at: Moment
    input: float | None = None
    output: float | None = None
    changed: dict[str, float] = field(default_factory=dict)
    """Errors of the weights of its modules."""
    shares: list[_Share] = field(default_factory=list)
    listed: bool = False
    by_statistics: bool = False

    def add(
        self, tensor: Tensor, pair: Pair, found: Inheritance, weight: float, *, known: bool
    ) -> None:
        """Take in a tensor of the forward pass of a module in it."""
        self.changed[tensor.module] = weight
        self.by_statistics |= pair.by == "statistics"
        if tensor.module == self.at.name and tensor.name == "input":
            self.input = pair.error
        elif tensor.module == self.at.name and tensor.name == "output":
            self.output = pair.error
        if tensor.name in _RESULTS:
            self.shares.append(_Share(tensor.module, found, pair.error, known))

    def row(self, before: float | None) -> LayerError:
        """`before` is the error of what the layer before returned."""
        given = before if self.input is None else self.input
        found = LayerError(
            self.at, given, self.output, None, None, 0.0, True, least=self.by_statistics
        )
        broke = self._broke(given)
        if broke is not None:
            return replace(found, by=broke, most=math.inf)
        if any(share.is_unknown for share in self.shares):
            return replace(found, added=self._between(given), measured=False)
        counted = [share for share in self.shares if self._counts(share)]
        return self._with_shares(found, counted)

    def _with_shares(self, found: LayerError, counted: Sequence[_Share]) -> LayerError:
        added = {module: error for module, error in self.changed.items() if error}
        for share in counted:
            added[share.module] = math.hypot(added.get(share.module, 0.0), share.found.local)
        by = max(added, key=lambda module: added[module], default=None)
        most = 0.0 if by is None else added[by]
        measured = all(share.is_exact or share.found.local == 0 for share in counted)
        whole = math.hypot(*added.values())
        return replace(found, added=whole, by=by if most else None, most=most, measured=measured)

    def _broke(self, given: float | None) -> str | None:
        """The first module that returned NaN or infinity, in a layer that was given none."""
        if given is not None and math.isinf(given):
            return None
        return next((one.module for one in self.shares if math.isinf(one.error)), None)

    def _between(self, given: float | None) -> float | None:
        """What was added between the layer's input and output, whose modules do not tell."""
        if given is None or self.output is None or math.isinf(self.output) or self.by_statistics:
            return None
        return beyond(self.output, given)

    def _counts(self, share: _Share) -> bool:
        """Beside measured shares estimated ones count where they are clear.

        What contains other modules adds nothing by itself, unless that is clear.
        """
        contains = any(module.startswith(f"{share.module}.") for module in self.changed)
        measured = any(other.found.basis == "measured" for other in self.shares)
        return share.is_exact or share.is_clear or not (contains or measured)


def by_depth(
    pairs: Sequence[Pair], sources: Sequence[Sources], listed: Sequence[bool]
) -> Iterator[LayerError]:
    """A row for each layer at each moment, in execution order; of the forward pass.

    Only of layers of which a tensor is `listed`.
    """
    before = {p.at.renamed(""): ("", p.error) for p in pairs if p.name == "embed/forward/output"}
    for layer in _layers(pairs, sources, listed).values():
        when = layer.at.renamed("")
        name, error = before.get(when, ("", 0.0))
        known = when in before and _follows(layer.at.name, name)
        row = layer.row(error if known else None)
        if layer.listed:
            yield row
        if row.output is not None:
            before[when] = layer.at.name, row.output


def _follows(layer: str, before: str) -> bool:
    """Is it the next layer, or the first one behind the embedding?"""
    path, _, number = layer.rpartition(".")
    return before == f"{path}.{int(number) - 1}" if int(number) else not before


def _layers(
    pairs: Sequence[Pair], sources: Sequence[Sources], listed: Sequence[bool]
) -> Mapping[Moment, _Layer]:
    layers: dict[Moment, _Layer] = {}
    weights: dict[str, float] = {}
    for place, pair in enumerate(pairs):
        tensor, layer = Tensor.of(pair.name), _LAYER.match(pair.name)
        if tensor.phase == "param" and tensor.name == "weight" and pair.error < math.inf:
            weights[tensor.module] = pair.error
        elif tensor.phase == "forward" and layer is not None and not tensor.is_weight:
            at = pair.at.renamed(layer[1])
            found = inheritance(pair, sources[place], pairs)
            known = layers.setdefault(at, _Layer(at))
            known.listed |= listed[place]
            whole = not sources[place].missing
            known.add(tensor, pair, found, weights.get(tensor.module, 0.0), known=whole)
    return layers
