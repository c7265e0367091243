"""What products with a weight make of the errors they are given: measured, where names suggest one.

How much a layer amplifies an error depends on the error, and a guess that is 5 % off hides a third
of it: in quadrature, 1.05² - 1 = 0.32². So where a module's input, output and weight were captured
on both sides, each side's own input is put through its own weight; what the outputs differ by
beyond the difference of these products was added here. That the module is such a product is
checked on the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tensortap.errors import NotSupported, RunError
from tensortap.store.logical import LogicalTensor
from tensortap_analysis.captured.moments import Catalogue, Moment
from tensortap_analysis.divergence.modules import Tensor
from tensortap_analysis.measuring.crews import ALONE, Crew
from tensortap_analysis.pairs.alignment import Alignment, Box, align
from tensortap_analysis.pairs.pair import Pair, Passed
from tensortap_analysis.pairs.pairing import Match

_MOST = 1000
"""Products of a run that are put to the test, in execution order."""
_WORK = 1 << 27
"""Multiplications for each side; of larger products rows and columns are drawn, evenly spread."""
_ELEMENTS = 1 << 20
"""Of each operand and side in memory, as float64."""
_SPANS = 8
_ALIKE = 0.2
"""How far the error of what was drawn may be from the error of all, relatively, to stand for it."""
_REST = 0.1
"""What is left of the output beside the product, on one side at least, if it is one; relative."""
_FLOATS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Product:
    """Places of an output, and of what it may be the product of."""

    output: int
    input: int
    weight: int
    bias: int | None


@dataclass(frozen=True, slots=True)
class _Both:
    """One tensor of both runs, read in common boxes."""

    ref: LogicalTensor
    other: LogicalTensor
    aligned: Alignment

    def read(self, box: Box) -> torch.Tensor:
        """A box of both, stacked, in float64."""
        sides = (self.aligned.ref.read(self.ref.read, box),
                 self.aligned.other.read(self.other.read, box))  # fmt: skip
        return torch.stack([side.to(torch.float64) for side in sides])


def with_products(
    pairs: Sequence[Pair],
    matches: Sequence[Match],
    ref: Catalogue,
    other: Catalogue,
    *,
    crew: Crew = ALONE,
) -> list[Pair]:
    """The pairs; those of products say what was inherited and what was added (`Pair.passed`).

    `matches` are what the pairs were compared by. Digests are not verified once more.
    """

    def measured(product: _Product) -> tuple[int, Passed | None]:
        try:
            return product.output, _passed(product, pairs, matches, ref, other)
        except (RunError, NotSupported):
            return product.output, None  # the comparison itself has said what is wrong

    some = [product for _, product in zip(range(_MOST), _products(pairs), strict=False)]
    found = dict(crew.each(measured, some))
    told = list(pairs)
    for place, passed in found.items():
        told[place] = replace(pairs[place], passed=passed)
    return told


def _products(pairs: Sequence[Pair]) -> Iterator[_Product]:
    """Outputs that differ, of modules with a matrix whose input differs as well."""
    weights: dict[str, int] = {}
    inputs: dict[Moment, int] = {}
    for place, pair in enumerate(pairs):
        tensor = Tensor.of(pair.name)
        if tensor.phase == "param":
            weights[pair.name] = place
        elif tensor.phase == "forward" and tensor.name == "input":
            inputs[pair.at] = place
        elif tensor.phase == "forward" and tensor.name == "output":
            given = inputs.get(pair.at.renamed(f"{tensor.module}/forward/input"))
            weight = weights.get(f"{tensor.module}/param/weight")
            bias = weights.get(f"{tensor.module}/param/bias")
            if given is None or weight is None:
                continue
            product = _Product(place, given, weight, bias)
            if _may_be(pairs, product):
                yield product


def _may_be(pairs: Sequence[Pair], product: _Product) -> bool:
    operands = [product.input, product.weight, *([] if product.bias is None else [product.bias])]
    all_of_them = [pairs[place] for place in (product.output, *operands)]
    values = all(pair.by == "values" for pair in all_of_them)
    floats = all(side.dtype in _FLOATS for pair in all_of_them for side in (pair.ref, pair.other))
    finite = all(pair.error < math.inf for pair in all_of_them)
    differs = any(pairs[place].error > 0 for place in operands)
    matrix = len(pairs[product.weight].ref.shape) == 2
    return values and floats and finite and matrix and differs and pairs[product.output].error > 0


def _passed(
    product: _Product, pairs: Sequence[Pair], matches: Sequence[Match], ref: Catalogue,
    other: Catalogue,
) -> Passed | None:  # fmt: skip
    def both(place: int) -> _Both | None:
        match = matches[place]
        one = ref.tensor(match.ref, match.name, verify=False)
        two = other.tensor(match.other, match.name, verify=False)
        aligned = align(one.shape, one.dims, two.shape, two.dims)
        return None if isinstance(aligned, str) else _Both(one, two, aligned)

    given, returned, weight = map(both, (product.input, product.output, product.weight))
    if given is None or returned is None or weight is None:
        return None
    added = None if product.bias is None else both(product.bias)
    # Some linears hand their bias on instead of adding it.
    for bias in [None] if added is None else [added, None]:
        drawn = _drawn(given, returned, weight, bias)
        found = drawn and _told(*drawn, error=pairs[product.output].error)
        if found:
            return found
    return None


def _drawn(
    given: _Both, returned: _Both, weight: _Both, bias: _Both | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and columns of outputs and products, of both sides; `None` where shapes do not fit."""
    *lead, out = returned.aligned.shape or (0,)
    *given_lead, width = given.aligned.shape or (0,)
    transposed = _is_transposed(weight, out, width)
    if lead != given_lead or transposed is None or not math.prod((*lead, out, width)):
        return None
    columns = _spans(out, max(1, _ELEMENTS // width))
    count = sum(stop - start for start, stop in columns)
    rows = max(1, min(_WORK // (count * width), _ELEMENTS // max(count, width)))
    boxes = list(_row_boxes(lead, rows))
    x = torch.cat([given.read((*box, (0, width))).reshape(2, -1, width) for box in boxes], dim=1)
    y = torch.cat([_columns(returned, columns, box) for box in boxes], dim=1)
    if transposed:
        product = x @ _columns(weight, columns, ((0, width),))
    else:
        matrix = torch.cat([weight.read((span, (0, width))) for span in columns], dim=1)
        product = x @ matrix.transpose(1, 2)
    if bias is not None:
        product = product + _columns(bias, columns, ())
    return y, product


def _columns(side: _Both, columns: Sequence[tuple[int, int]], box: Box) -> torch.Tensor:
    """These columns of the rows in a box, of both runs: (2, rows, columns)."""
    parts = [side.read((*box, span)) for span in columns]
    return torch.cat([part.reshape(2, -1, part.shape[-1]) for part in parts], dim=2)


def _is_transposed(weight: _Both, out: int, width: int) -> bool | None:
    """Is the weight stored as `in out`? `None` where it is no matrix of these sizes."""
    shape, dims = weight.aligned.shape, weight.ref.dims
    if shape == (width, out) and (dims == "in out" or width != out):
        return True
    return False if shape == (out, width) else None


def _spans(size: int, wanted: int) -> list[tuple[int, int]]:
    """So many positions of an axis, in evenly spread stretches."""
    if size <= wanted:
        return [(0, size)]
    length = max(1, wanted // _SPANS)
    starts = (number * (size - length) // (_SPANS - 1) for number in range(_SPANS))
    return [(start, start + length) for start in starts]


def _row_boxes(lead: Sequence[int], wanted: int) -> Iterator[Box]:
    """Boxes of the leading axes with so many rows in all, evenly spread."""
    if math.prod(lead) <= wanted:
        yield tuple((0, size) for size in lead)
        return
    *outer, last = lead
    length = min(last, max(1, wanted // _SPANS))
    for number in range(_SPANS):
        at = number * (math.prod(lead) - 1) // (_SPANS - 1)
        row, place = divmod(at, last)
        start = min(place, last - length)
        before = [int(i) for i in torch.unravel_index(torch.tensor(row), outer)] if outer else []
        yield (*((i, i + 1) for i in before), (start, start + length))


def _told(outputs: torch.Tensor, products: torch.Tensor, *, error: float) -> Passed | None:
    """From outputs and products of both sides; `None` where this is no such product after all."""
    size = outputs[0].norm()
    rest = outputs - products
    if not min(rest[0].norm(), rest[1].norm()) <= _REST * size:
        return None
    drawn = ((outputs[1] - outputs[0]).norm() / size).item()
    if not abs(drawn - error) <= _ALIKE * error:
        return None
    inherited, local = ((side[1] - side[0]).norm() / size for side in (products, rest))
    return Passed(inherited.item() * error / drawn, local.item() * error / drawn)
