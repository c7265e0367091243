"""`tensortap modes compare`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensortap.errors import ConfigError, NotSupported, RunError
from tensortap_hf import modes
from tensortap_hf.command import equality, printing, summary
from tensortap_hf.command.capture import report_equalities
from tensortap_hf.command.options import AsJson
from tensortap_hf.command.runs import ModeRun, find, opened

if TYPE_CHECKING:
    from tensortap_analysis import Comparison

_FIRST_INPUT = re.compile(r"(?:.*\.)?layers\.(\d+)/forward/input")


@dataclass(frozen=True, slots=True)
class Compared:
    """A mode, its reference, and what was found."""

    mode: ModeRun
    ref: ModeRun
    found: Comparison

    @property
    def file(self) -> str:
        """Under `comparisons/`."""
        return f"{self.mode.name}-vs-{self.ref.name}.json"


def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `capture --out` made.")],
    reference: Annotated[
        str | None, typer.Option(help="The mode all others are compared with; fp32 if not given.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Compare only this mode; may be repeated.")
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Compare each mode with the one it refines.")
    ] = False,
    unrotate: Annotated[
        bool, typer.Option("--unrotate", help="Take rotations back to compare different bases.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare captured modes with a reference: details of each layer, and a summary.

    Everything measured is kept as JSON below DIR/comparisons. Exit code: 0 compared, 1 modes that
    must be bitwise equal are not, or some tensors could not be compared, 2 nothing could be done.
    """
    _require_analysis()
    if ladder and (mode or reference):
        given = "--mode" if mode else "--reference"
        raise ConfigError(f"--ladder says by itself what is compared; leave {given} out.")
    with opened(folder) as runs:
        wanted = (
            _rungs(runs, folder) if ladder else _against(runs, folder, reference or "fp32", mode)
        )
        results = _compared(wanted, unrotate=unrotate)
        inputs = _first_inputs(runs)
        equal = equality.equalities(runs)
    report = _report(folder / "comparisons", results, inputs, equal)
    _keep(folder / "comparisons" / ("ladder.json" if ladder else "summary.json"), report)
    if as_json:
        printing.say_json(report)
    else:
        _print(results, inputs)
        printing.say_if(equality.declared(equal))
        printing.say(f"Everything measured: {folder / 'comparisons'}")
    report_equalities(equal)
    missing = [one for result in results for one in result.found.runs[0].unpaired]
    for lost in missing:
        printing.complain(f"{lost.name} could not be compared: {lost.reason}.")
    violated = any(one.kind == "violated" for one in equal)
    raise typer.Exit(1 if violated or missing else 0)


def _require_analysis() -> None:
    """Raise `NotSupported` unless tensortap-analysis, which measures, is installed."""
    try:
        import tensortap_analysis  # noqa: F401
    except ImportError as failure:
        raise NotSupported(
            'comparing needs tensortap-analysis: pip install "tensortap[analysis]".'
        ) from failure


Wanted = Sequence[tuple[ModeRun, ModeRun]]
"""(mode, its reference)."""


def _against(
    runs: Sequence[ModeRun], folder: Path, reference: str, names: Iterable[str] | None
) -> Wanted:
    ref = find(reference, runs, folder)
    chosen = [find(name, runs, folder) for name in names] if names else runs
    wanted = [(one, ref) for one in chosen if one is not ref]
    if not wanted:
        raise RunError(f"{folder} has no other run to compare with {ref.name}.")
    return wanted


def _rungs(runs: Sequence[ModeRun], folder: Path) -> Wanted:
    families = list(dict.fromkeys(one.family for one in runs if one.family in modes.families()))
    ladders = {name: modes.family(name).ladder for name in families}
    wanted = [
        (find(f"{name}/{one}", runs, folder), find(f"{name}/{ref}", runs, folder))
        for name, ladder in ladders.items()
        for one, ref in ladder
    ]
    if not wanted:
        known = ", ".join(families) or "none that is known"
        raise RunError(f"{folder} holds modes of the family {known}, which has no ladder.")
    return wanted


def _compared(wanted: Wanted, *, unrotate: bool) -> list[Compared]:
    """Raises `RunError`, before anything is measured, where two modes cannot be compared."""
    # It needs tensortap-analysis, and this file is loaded for every command of `modes`.
    from tensortap_hf.command import comparing

    for one, ref in wanted:
        comparing.require_comparable(ref, one, unrotate=unrotate)
    total = sum(len(ref.run.names()) for _, ref in wanted)
    with printing.progress_of(total, "comparing") as progress:
        return [
            Compared(one, ref, comparing.compare(ref, one, progress, unrotate=unrotate))
            for one, ref in wanted
        ]


def _first_inputs(runs: Sequence[ModeRun]) -> tuple[str, list[list[str]]] | None:
    """The input of the first layer, and which modes have the same one, bit for bit."""
    names = {name for one in runs for name in one.run.names() if _FIRST_INPUT.fullmatch(name)}
    if not names:
        return None
    first = min(names, key=lambda name: int(_FIRST_INPUT.fullmatch(name)[1]))  # type: ignore[index]
    return first, equality.groups(runs, first)


def _report(
    place: Path,
    results: Sequence[Compared],
    inputs: tuple[str, list[list[str]]] | None,
    equal: Sequence[equality.Equality],
) -> dict[str, Any]:
    """Write each comparison into the folder `place`; returns the summary of all."""
    place.mkdir(exist_ok=True)
    for result in results:
        result.found.save(place / result.file)
    return {
        "comparisons": [
            {
                "mode": result.mode.name,
                "reference": result.ref.name,
                "basis": [result.mode.basis, result.ref.basis],
                "file": str(place / result.file),
                **summary.rows_json(result.found),
            }
            for result in results
        ],
        "first_inputs": None if inputs is None else {"tensor": inputs[0], "equal": inputs[1]},
        "equalities": [one.to_json() for one in equal],
    }


def _keep(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print(results: Sequence[Compared], inputs: tuple[str, list[list[str]]] | None) -> None:
    for result in results:
        printing.say(f"{result.mode.name} against {result.ref.name}")
        for line in summary.details(result.found):
            printing.say(line)
        printing.say()
    for title, headings, rows in summary.tables(
        [(r.mode.name, r.ref.name, r.found) for r in results]
    ):
        printing.say_table(headings, rows, title)
    if inputs is not None:
        printing.say(_spoken(*inputs))


def _spoken(name: str, groups: list[list[str]]) -> str:
    if len(groups) == 1:
        return f"{name} is bitwise equal in all {len(groups[0])} modes."
    sets = "; ".join(", ".join(names) for names in groups)
    return f"{name} is not the same in all modes; bitwise equal within: {sets}."
