"""One mode against another: every captured tensor, all samples of it taken together.

Needs tensortap-analysis, which measures; `compare` imports this when it is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tensortap.errors import RunError
from tensortap.records import TensorRecord
from tensortap_analysis.captured.facts import facts_of
from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.comparison.result import Comparison, RunComparison, judged_again
from tensortap_analysis.metrics import measure
from tensortap_analysis.pairs.pair import Half, Pair
from tensortap_analysis.pairs.pairing import Unpaired
from tensortap_analysis.pairs.reasons import NotComparable, kind_of
from tensortap_hf import modes
from tensortap_hf.command.runs import ModeRun

Progress = Callable[[str], None]


def require_comparable(ref: ModeRun, other: ModeRun, *, unrotate: bool) -> None:
    """Raise `RunError` for runs of different models, bases or inputs."""
    weights = [one.run.info.metadata.get("weights") for one in (ref, other)]
    if None not in weights and weights[0] != weights[1]:
        raise RunError(
            f"{other.name} and {ref.name} were captured of models with different weights: "
            f"{other.model} and {ref.model}."
        )
    if ref.basis != other.basis and not unrotate:
        raise RunError(
            f"{other.name} is in the {other.basis} basis and {ref.name} in the {ref.basis} one: "
            "their residual streams differ by a rotation, so that every difference would be "
            "meaningless. Take a --reference of the same family, or pass --unrotate."
        )
    mine, theirs = (_token_ids(one) for one in (ref, other))
    if mine is not None and theirs is not None and mine != theirs:
        raise RunError(
            f"{other.name} and {ref.name} were captured on different inputs; capture both with "
            "the same --data, --samples and --seq-len."
        )


def _token_ids(one: ModeRun) -> Any:
    inputs = one.run.info.metadata.get("inputs")
    return inputs.get("token_ids") if isinstance(inputs, dict) else None


@dataclass(frozen=True, slots=True)
class Side:
    """A run whose tensors are read in the model's own basis, if that is asked for."""

    one: ModeRun
    unrotate: bool

    def samples(self, name: str) -> dict[tuple[int, int, int], TensorRecord]:
        """The records of a tensor that have values, by step, microbatch and call."""
        found = self.one.run.records(["re:" + re.escape(name)])
        return {(r.at.step, r.at.microbatch, r.at.call): r for r in found if r.values == "full"}

    def read(self, record: TensorRecord) -> torch.Tensor:
        """The values of a record."""
        tensor = self.one.run.piece(record)
        if not (self.unrotate and self.one.basis == "rotated"):
            return tensor
        back = modes.family(self.one.family).unrotate
        assert back is not None  # `obstacle` has looked.
        return back(tensor)

    def obstacle(self, name: str) -> str | None:
        """Why a tensor cannot be had in the model's own basis, if that is asked for."""
        if not (self.unrotate and self.one.basis == "rotated"):
            return None
        known = self.one.family in modes.families()
        family = modes.family(self.one.family) if known else None
        if family is None or family.unrotate is None or family.is_residual is None:
            return f"nothing is known of the rotation of {self.one.name}"
        if not family.is_residual(name):
            return "it is not in the residual stream, so its rotation cannot be taken back"
        return None


def compare(ref: ModeRun, other: ModeRun, progress: Progress, *, unrotate: bool) -> Comparison:
    """All tensors of `other` against those of `ref`, judged by the preset `classic`."""
    apart = unrotate and ref.basis != other.basis
    sides = Side(ref, apart), Side(other, apart)
    names, theirs = _in_order(ref), _in_order(other)
    pairs: list[Pair] = []
    unpaired: list[Unpaired] = []
    for order, name in enumerate(names):
        progress(f"{other.name} and {ref.name}: {name}")
        if name in theirs:
            found = _tried(name, order, *sides)
            pairs.append(found) if not isinstance(found, Unpaired) else unpaired.append(found)
    lost = "it was not captured"
    unpaired += [Unpaired(n, "ref", lost, kind="absent") for n in names if n not in theirs]
    unpaired += [Unpaired(n, "run", lost, kind="absent") for n in theirs if n not in names]
    facts = [facts_of(one.run, str(one.run.path)) for one in (ref, other)]
    run = RunComparison(facts[1], tuple(pairs), tuple(unpaired), ())
    return judged_again(Comparison(facts[0], (run,), None, "classic"), {})


def _in_order(one: ModeRun) -> list[str]:
    """Names in the order of execution of the first sample."""
    return list(dict.fromkeys(str(record.name) for record in one.run.records()))


def _tried(name: str, order: int, ref: Side, other: Side) -> Pair | Unpaired:
    """Both tensors, or why they cannot be compared."""
    try:
        return _pair(name, order, ref, other)
    except NotComparable as reason:
        return Unpaired(name, "both", str(reason), kind=reason.kind)
    except RunError as failure:
        return Unpaired(name, "both", str(failure).rstrip("."), kind=kind_of(failure))


def _pair(name: str, order: int, ref: Side, other: Side) -> Pair:
    """Both tensors, their samples one after the other; raises `NotComparable`."""
    both = _samples(name, ref, other)

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for a, b in both:
            yield ref.read(a), other.read(b)

    shape = pooled([a.shape for a, _ in both])
    one, two = (Half(shape, record.dtype, record.dims) for record in both[0])
    note = f"{len(both)} samples together" if len(both) > 1 else None
    return Pair(Moment(name), order, "values", one, two, measure(blocks, shape=shape), note=note)


def _samples(name: str, ref: Side, other: Side) -> list[tuple[TensorRecord, TensorRecord]]:
    """The records of both, sample by sample; raises `NotComparable`."""
    obstacle = ref.obstacle(name) or other.obstacle(name)
    if obstacle is not None:
        raise NotComparable(obstacle)
    mine, theirs = ref.samples(name), other.samples(name)
    if mine.keys() != theirs.keys() or not mine:
        raise NotComparable(
            f"{len(mine)} and {len(theirs)} samples of it were captured with their values",
            "absent" if mine.keys() != theirs.keys() else "unknown",
        )
    both = [(mine[key], theirs[key]) for key in mine]
    for a, b in both:
        if a.shape != b.shape:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise NotComparable(f"its shapes differ: {shapes}", "shape")
    return both


def pooled(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of several tensors one after the other: tokens of all samples in one axis."""
    if len(shapes) == 1:
        return shapes[0]
    last = shapes[0][-1] if shapes[0] else 1
    return sum(torch.Size(shape).numel() for shape in shapes) // max(last, 1), last
