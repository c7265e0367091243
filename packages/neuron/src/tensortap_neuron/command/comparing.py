"""A prompt's layers of the port against the reference: measured, judged, and put in rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tensortap.errors import ConfigError
from tensortap_neuron.command.captured import Captured, Trio
from tensortap_neuron.command.naming import place, places, with_inputs
from tensortap_neuron.command.rows import Jump, Row, broken_in, jumps_at

if TYPE_CHECKING:
    from tensortap_analysis import Comparison, Divergence, RunComparison, Unpaired

PRESETS = {"port": "port", "classic": "port", "noise": "noise"}
"""What `--preset` says -> the preset of tensortap-analysis: the older guide's fixed thresholds,
under either name, and the three-way rule."""


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt, compared; `remarks` are on its runs, `missing` on layers, as sentences."""

    trio: Trio
    found: Comparison
    missing: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def run(self) -> RunComparison:
        """The port against the reference."""
        return self.found.runs[0]

    @property
    def rows(self) -> list[Row]:
        """The layers that both have, in execution order."""
        both = zip(self.run.pairs, self.run.judgements, strict=True)
        named = [(at, *row) for row in both if (at := place(row[0].name)) is not None]
        several = len({pair.at.renamed("") for _, pair, _ in named}) > 1
        return [
            Row(at, pair, judgement, f"{at.title} ({pair.at.when})" if several else at.title)
            for at, pair, judgement in named
        ]

    @property
    def broken(self) -> list[str]:
        """Layers of the port with NaN or infinities, and those of an abnormal mean."""
        return [f"{row.title}: {said}" for row in self.rows if (said := broken_in(row.pair))]

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
        """0 the port agrees, 1 it differs or has NaN or infinities, 2 nobody can say.

        Nobody can say it of a layer that could not be compared in any forward.
        """
        worst = {"agree": 0, "differ": 1, "incomparable": 2}[self.run.verdict]
        compared = {row.place.name for row in self.rows}
        lost = any(place(one.name) and one.name not in compared for one in self.run.unpaired)
        return 1 if self.nonfinite else worst or (2 if lost else 0)

    @property
    def jumps(self) -> list[Jump]:
        """In either run, with the mean |change| into the layer and out of it."""
        out = {(c.before, c.at.renamed("")): c for c in self.run.changes}
        return [
            jump
            for change in self.run.jumps
            for jump in jumps_at(change, out.get((change.at.name, change.at.renamed(""))))
        ]


def names_of(trio: Trio, pattern: str) -> list[str]:
    """Tensors of both runs that a pattern of files or names matches, and what goes into them.

    Layers that one of them lacks are among them; empty where there is no layer at all.
    """
    have = [set(side.run.names()) for side in (trio.ref, trio.port)]
    found = [one for one in places(sorted(have[0] | have[1])) if one.matches(pattern)]
    wanted = {one.name for one in found} | have[0] & have[1]
    return [name for name in with_inputs(found) if name in wanted]


Progress = Callable[[str, int, int], None]
"""Called with what is compared, and how many of how many tensors are done."""


def compared(trio: Trio, pattern: str, preset: str, progress: Progress) -> Result:
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
        progress=partial(progress, f"comparing {trio.port.name}"),
    )  # fmt: skip
    lost = [one for one in found.runs[0].unpaired if place(one.name) is not None]
    return Result(trio, found, tuple(map(_missing, lost)), tuple(trio.remarks))


def _missing(one: Unpaired) -> str:
    at = place(one.name)
    why = _ONLY.get(one.reason, one.reason)
    return f"{one.name if at is None else at.title}: {why}"


_ONLY = {
    "RUN has no such tensor": "only the reference has it",
    "REF has no such tensor": "only the port has it",
}


def named(one: Captured) -> Any:
    """As tensortap-analysis takes it: called by its own path, wherever it was imported to."""
    from tensortap_analysis.captured.sources import Named

    return Named(one.run, str(one.path))


def all_compared(trios: list[Trio], pattern: str, preset: str, progress: Progress) -> list[Result]:
    """Every prompt."""
    return [compared(trio, pattern, preset, progress) for trio in trios]
