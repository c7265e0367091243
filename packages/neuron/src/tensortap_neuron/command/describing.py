"""What is said of a captured layer: its statistics, and whether it looks healthy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensortap.records import Statistics, encode_float
from tensortap.store import Run
from tensortap_neuron.command.naming import Place, place
from tensortap_neuron.command.printing import cell, mark

MEAN = 10.0
"""The largest |mean| that the older guide called normal."""
HEADINGS = ("", "shape", "dtype", "mean", "std", "min", "max", "NaN", "Inf")


@dataclass(frozen=True, slots=True)
class Layer:
    """One captured tensor; `std` is the population's, min to std those of the finite values."""

    place: Place
    shape: tuple[int, ...]
    dtype: str
    stats: Statistics

    @property
    def inf(self) -> int:
        """Infinities of either sign."""
        return self.stats.posinf + self.stats.neginf

    @property
    def wrong(self) -> str:
        """What is wrong with it: NaN, infinities or an abnormal mean; empty if nothing."""
        mean = self.stats.mean
        said = [f"{n:,} {word}" for n, word in ((self.stats.nan, "NaN"), (self.inf, "Inf")) if n]
        if mean is not None and abs(mean) > MEAN:
            said.append(f"|mean| > {MEAN:g}")
        return ", ".join(said)

    @property
    def line(self) -> str:
        """`✓ layer 3     mean 0.01, std 1.2`."""
        wrong = f": {self.wrong}" if self.wrong else ""
        return (
            f"{mark(not self.wrong)} {self.place.title:<11} mean {cell(self.stats.mean):>10}, "
            f"std {cell(self.stats.std):>9}{wrong}"
        )

    @property
    def row(self) -> tuple[object, ...]:
        """Cells under `HEADINGS`."""
        s = self.stats
        return (
            self.place.title,
            list(self.shape),
            self.dtype,
            s.mean,
            s.std,
            s.min,
            s.max,
            s.nan,
            self.inf,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        keys = ("mean", "std", "min", "max")
        return {
            "name": self.place.name,
            "file": f"{self.place.file}.pt",
            "shape": list(self.shape),
            "dtype": self.dtype,
            **{key: encode_float(getattr(self.stats, key)) for key in keys},
            "nan": self.stats.nan,
            "inf": self.inf,
            "wrong": self.wrong or None,
        }


@dataclass(frozen=True, slots=True)
class Described:
    """A prompt's run: its layers in order, and what it lacks, as sentences."""

    folder: Path
    layers: tuple[Layer, ...]
    lacks: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Is every layer there, and healthy?"""
        return not self.lacks and not any(layer.wrong for layer in self.layers)

    @property
    def key_layers(self) -> list[Layer]:
        """The embedding, the first, middle and last layer, and the final norm."""
        numbers = [one.place.number for one in self.layers if one.place.number is not None]
        wanted = {None, *(numbers[at] for at in (0, len(numbers) // 2, -1) if numbers)}
        return [one for one in self.layers if one.place.number in wanted]


def described(folder: Path, run: Run, expected: Sequence[Place], lost: Sequence[str]) -> Described:
    """Read from a run; `lost` is what could not be exported."""
    found: dict[str, Layer] = {}
    for record in run.records():
        one = place(str(record.name))
        if one is not None and record.stats is not None:
            found.setdefault(one.name, Layer(one, record.shape, record.dtype, record.stats))
    layers = [found[one.name] for one in expected if one.name in found]
    return Described(folder, tuple(layers), tuple(_lacks(run, expected, found, lost)))


def _lacks(
    run: Run, expected: Sequence[Place], found: dict[str, Layer], lost: Sequence[str]
) -> Iterator[str]:
    yield from run.problems
    report = run.coverage()
    told = [*report.get("notes", ()), *report.get("gaps", ())]
    reasons = {str(row["name"]): str(row["reason"]) for row in told}
    for one in expected:
        if one.name not in found:
            module = one.name.partition("/")[0]
            why = reasons.get(one.name) or reasons.get(module) or "it was not captured"
            yield f"{one.title}: {why}"
    yield from (f"not exported: {line}" for line in lost)
