"""A prompt's layers of the port against the reference: measured, judged, and put in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensortap.errors import ConfigError
from tensortap.records import encode_float
from tensortap_neuron.command.captured import Captured, Trio
from tensortap_neuron.command.describing import MEAN
from tensortap_neuron.command.naming import Place, place, places
from tensortap_neuron.command.printing import cell

if TYPE_CHECKING:
    from tensortap_analysis import Comparison, Divergence, Judgement, Pair, RunComparison, Unpaired

PRESETS = {"port": "port", "classic": "port", "noise": "noise"}
"""What `--preset` says -> the preset of tensortap-analysis: the older guide's fixed thresholds,
under either name, and the three-way rule."""
_MEASURES = (
    "max_abs",
    "mae",
    "median",
    "relative_max",
    "relative_mean",
    "relative_median",
    "cosine",
)
HEADINGS = (
    "", "layer", "max |d|", "mean |d|", "median |d|", "max rel", "mean rel", "median rel", "cosine",
)  # fmt: skip
WITH_NOISE = ("Bhattacharyya",)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of both runs: what they differ by, and how that is judged."""

    place: Place
    step: int
    pair: Pair
    judgement: Judgement

    @property
    def fine(self) -> bool:
        """Is it within its limits?"""
        return self.judgement.within and self.judgement.decided

    @property
    def measures(self) -> dict[str, float | None]:
        """Absolute and relative differences, largest, mean and median; cosine."""
        m = self.pair.metrics
        found = {key: getattr(m, key) for key in _MEASURES if key != "median"}
        return {key: m.percentiles.get(50) if key == "median" else found[key] for key in _MEASURES}

    @property
    def ratio(self) -> float | None:
        """The RMS error over the noise run's; `None` without noise, or where that has none."""
        noise = self.pair.noise
        if noise is None or self.pair.nonfinite or noise.nonfinite or not noise.rmse:
            return None
        return self.pair.rmse / noise.rmse

    @property
    def likeness(self) -> float | None:
        """Bhattacharyya coefficient of the two error distributions."""
        from tensortap_analysis.metrics import bhattacharyya

        noise = self.pair.noise
        return None if noise is None else bhattacharyya(self.pair.metrics, noise.metrics)

    @property
    def cells(self) -> tuple[object, ...]:
        """Under `HEADINGS`, without the mark."""
        found = self.measures
        cosine = found.pop("cosine")
        return self.place.title, *found.values(), None if cosine is None else f"{cosine:.8f}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        measures = {key: _plain(value) for key, value in self.measures.items()}
        return {
            "layer": self.place.title,
            "name": self.place.name,
            "step": self.step,
            "fine": self.fine,
            "grade": self.judgement.grade,
            "excess": encode_float(self.judgement.excess),
            **measures,
            "noise_ratio": _plain(self.ratio),
            "bhattacharyya": _plain(self.likeness),
        }


@dataclass(frozen=True, slots=True)
class Jump:
    """A sudden change from one layer to the next, in a run: largest |change|, and mean ones."""

    who: str
    before: Place
    at: Place
    largest: float
    into: float | None
    out: float | None

    def __str__(self) -> str:
        return (
            f"{self.who}: {self.before.title} -> {self.at.title}: max |change| "
            f"{cell(self.largest)}; mean |change| {cell(self.into)} into it, "
            f"{cell(self.out)} out of it"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "run": self.who,
            "from": self.before.name,
            "to": self.at.name,
            "max_change": _plain(self.largest),
            "mean_change_into": _plain(self.into),
            "mean_change_out_of": _plain(self.out),
        }


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt, compared."""

    trio: Trio
    found: Comparison
    missing: tuple[str, ...]

    @property
    def run(self) -> RunComparison:
        """The port against the reference."""
        return self.found.runs[0]

    @property
    def rows(self) -> list[Row]:
        """The layers that both have, in execution order."""
        both = zip(self.run.pairs, self.run.judgements, strict=True)
        named = ((place(pair.name), pair, judgement) for pair, judgement in both)
        return [Row(at, pair.at.step, pair, j) for at, pair, j in named if at is not None]

    @property
    def broken(self) -> list[str]:
        """Layers of the port with NaN or infinities, and those of an abnormal mean."""
        return [f"{row.place.title}: {said}" for row in self.rows if (said := _broken(row.pair))]

    @property
    def nonfinite(self) -> bool:
        """Has the port a NaN or infinity anywhere?"""
        metrics = [row.pair.metrics for row in self.rows]
        return any(m.nan_other or m.inf_other for m in metrics)

    @property
    def local(self) -> Divergence | None:
        """The first layer whose input certainly does not explain its error."""
        return next(iter(self.run.local), None)

    @property
    def code(self) -> int:
        """0 the port agrees, 1 it differs or has NaN or infinities, 2 nobody can say."""
        worst = {"agree": 0, "differ": 1, "incomparable": 2}[self.run.verdict]
        return 1 if self.nonfinite else worst

    @property
    def jumps(self) -> list[Jump]:
        """In either run, with the mean |change| into the layer and out of it."""
        out = {(c.before, c.at.renamed("")): c for c in self.run.changes}
        return [
            jump
            for change in self.run.jumps
            for jump in _jumps(change, out.get((change.at.name, change.at.renamed(""))))
        ]


def _jumps(change: Any, after: Any) -> Iterator[Jump]:
    from tensortap_analysis.measuring.layers import JUMP

    before, at = place(change.before), place(change.at.name)
    assert before is not None  # changes are between outputs of layers
    assert at is not None
    for side, who in (("ref", "reference"), ("other", "port")):
        largest = getattr(change, f"{side}_max")
        if largest is not None and not largest <= JUMP:
            into, out = (getattr(c, f"{side}_mean", None) for c in (change, after))
            yield Jump(who, before, at, largest, into, out)


def _broken(pair: Pair) -> str:
    m = pair.metrics
    both = (("port", m.nan_other, m.inf_other, m.other), ("reference", m.nan_ref, m.inf_ref, m.ref))
    said = []
    for who, nan, inf, side in both:
        words = [f"{n:,} {word}" for n, word in ((nan, "NaN"), (inf, "Inf")) if n]
        if side.mean is not None and abs(side.mean) > MEAN:
            words.append(f"mean {side.mean:.4g}")
        said += [f"{who} {', '.join(words)}"] if words else []
    return "; ".join(said)


def _plain(value: float | None) -> float | str | None:
    return None if value is None else encode_float(value)


def names_of(trio: Trio, pattern: str) -> list[str]:
    """Tensors of the reference or the port that a pattern of files or names matches."""
    found = places(name for side in (trio.ref, trio.port) for name in side.run.names())
    return list(dict.fromkeys(one.name for one in found if one.matches(pattern)))


def compared(trio: Trio, pattern: str, preset: str) -> Result:
    """Compare one prompt; raises `ConfigError` where the pattern matches no layer."""
    from tensortap_analysis import compare

    names = names_of(trio, pattern)
    if not names:
        raise ConfigError(
            f"--layer-pattern {pattern!r} matches no layer of {trio.ref.path} or "
            f'{trio.port.path}; write "layer_*", "layer_3", "embedding_output" or '
            '"final_norm_output".'
        )
    found = compare(
        named(trio.ref), named(trio.port),
        noise=None if trio.noise is None else named(trio.noise),
        preset=PRESETS[preset], select=",".join(names),
    )  # fmt: skip
    return Result(trio, found, tuple(map(_missing, found.runs[0].unpaired)))


def _missing(one: Unpaired) -> str:
    at = place(one.name)
    only = {"ref": "only the reference has it", "run": "only the port has it"}
    why = only.get(one.where, one.reason) if one.kind == "absent" else one.reason
    return f"{one.name if at is None else at.title}: {why}"


def named(one: Captured) -> Any:
    """As tensortap-analysis takes it: called by its own path, wherever it was imported to."""
    from tensortap_analysis.captured.sources import Named

    return Named(one.run, str(one.path))


def all_compared(
    trios: list[Trio], pattern: str, preset: str, progress: Callable[[str], None]
) -> list[Result]:
    """Every prompt."""
    results = []
    for trio in trios:
        progress(f"comparing {trio.port.name}")
        results.append(compared(trio, pattern, preset))
    return results
