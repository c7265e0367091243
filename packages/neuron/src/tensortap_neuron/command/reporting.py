"""What a comparison of a port says: on the terminal, as JSON, and as pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensortap.errors import ConfigError
from tensortap_neuron.command import printing
from tensortap_neuron.command.captured import Trio
from tensortap_neuron.command.comparing import PRESETS, Result, named
from tensortap_neuron.command.naming import with_inputs
from tensortap_neuron.command.rows import HEADINGS, WITH_NOISE, Row

_WORDS = {0: "the port agrees with the reference", 1: "the port differs", 2: "nobody can say"}
_SUFFIXES = (".json", ".html", ".htm")


def code(results: Sequence[Result], alone: Sequence[str]) -> int:
    """The exit code of all prompts: 1 where any differs, else 2 where any cannot be judged."""
    codes = {result.code for result in results} | ({2} if alone else set())
    return next(one for one in (1, 2, 0) if one in codes)


def say(results: Sequence[Result], alone: Sequence[str], preset: str) -> None:
    """Every prompt, and what all of it comes to."""
    for result in results:
        _say_one(result, preset)
    for line in alone:
        printing.warn(f"not compared: {line}")
    if len(results) + len(alone) > 1:
        printing.say()
        fine = sum(result.code == 0 for result in results)
        more = f"; {len(alone)} could not be compared" if alone else ""
        ok = printing.mark(code(results, alone) == 0)
        printing.say(f"{ok} {fine} of {len(results)} prompts agree{more}")


def _say_one(result: Result, preset: str) -> None:
    trio = result.trio
    printing.say()
    if trio.prompt is not None:
        printing.say(f"prompt {trio.prompt!r}")
    beside = f"; noise {trio.noise.path}" if trio.noise else ""
    printing.say(f"reference {trio.ref.path}; port {trio.port.path}{beside}")
    printing.say(f"judged by {_limits(result, preset)}")
    noisy = trio.noise is not None
    headings = (*HEADINGS, *(WITH_NOISE if noisy else ()), "judged")
    printing.say_table(headings, [_cells(row, noisy=noisy) for row in result.rows])
    for line in _findings(result):
        printing.say(line)
    lost = [f"not compared: {line}" for line in _missing(result)]
    for text in dict.fromkeys((*lost, *_warnings(result))):
        printing.warn(text)
    fine = sum(row.fine for row in result.rows)
    more = f"; {len(lost)} could not be compared" if lost else ""
    printing.say(
        f"{printing.mark(result.code == 0)} {_outcome(result)}: {fine} of {len(result.rows)} "
        f"tensors are within the limits{more}"
    )


def _outcome(result: Result) -> str:
    """In words; a port that is equal to its reference may still be ill with it."""
    if result.nonfinite and result.run.verdict == "agree":
        return "the port has NaN or infinities, as the reference has"
    return _WORDS[result.code]


def _warnings(result: Result) -> list[str]:
    found = (_called(text, result.trio) for text in (*result.found.remarks, *result.run.warnings))
    return list(dict.fromkeys((*result.remarks, *found)))


def _missing(result: Result) -> list[str]:
    return [_called(line, result.trio) for line in result.missing]


def _called(text: str, trio: Trio) -> str:
    """A sentence of tensortap-analysis in the words of this command, and with the user's paths."""
    for one in (trio.ref, trio.port, trio.noise):
        if one is not None:
            text = text.replace(str(one.run.path), str(one.path))
    return _REF.sub("the reference", _RUN.sub("the port", text))


_REF, _RUN = re.compile(r"\bREF\b"), re.compile(r"\bRUN\b")
"""What `tensortap compare` calls its two arguments."""


def _limits(result: Result, preset: str) -> str:
    from tensortap_analysis.judging.presets import preset as known

    by = known(PRESETS[preset], result.found.thresholds)
    limits = ", ".join(f"{key} {value:g}" for key, value in by.limits.items())
    says = by.says
    if by.name == "noise":
        noisy = result.trio.noise is not None
        says = "error over the noise run's" if noisy else "error over an estimate of rounding"
    return f"{preset}: {says} ({limits})"


def _cells(row: Row, *, noisy: bool) -> tuple[object, ...]:
    more: tuple[object, ...] = ()
    if noisy:
        more = (None if row.likeness is None else f"{row.likeness:.4f}",)
    return printing.mark(row.fine), *row.cells, *more, row.judgement.grade


def _findings(result: Result) -> Iterator[str]:
    """Where they part, jumps, and layers that look ill."""
    first, local = result.run.first_divergence, result.local
    if first is not None:
        yield f"first divergence: {first}"
    if local is not None and local is not first:
        yield f"first local divergence: {local}"
    yield from (f"jump between layers: {jump}" for jump in result.jumps)
    yield from (f"NaN, Inf or |mean| > 10: {line}" for line in result.broken)


def document(
    results: Sequence[Result], alone: Sequence[str], preset: str, pages: Sequence[Path] = ()
) -> dict[str, Any]:
    """Everything as plain JSON."""
    from tensortap_analysis.judging.presets import preset as known

    return {
        "preset": preset,
        "thresholds": dict(known(PRESETS[preset]).limits),
        "exit_code": code(results, alone),
        "agrees": code(results, alone) == 0,
        "prompts": [_one(result) for result in results],
        "alone": list(alone),
        "pages": [str(page) for page in pages],
    }


def _one(result: Result) -> dict[str, Any]:
    trio, first, local = result.trio, result.run.first_divergence, result.local
    return {
        "prompt": trio.prompt,
        "reference": str(trio.ref.path),
        "port": str(trio.port.path),
        "noise": None if trio.noise is None else str(trio.noise.path),
        "verdict": result.run.verdict,
        "exit_code": result.code,
        "first_divergence": None if first is None else first.name,
        "first_divergence_says": None if first is None else str(first),
        "first_local_divergence": None if local is None else local.name,
        "layers": [row.to_json() for row in result.rows],
        "jumps": [jump.to_json() for jump in result.jumps],
        "abnormal": result.broken,
        "missing": _missing(result),
        "warnings": _warnings(result),
    }


def stem_of(path: Path) -> Path:
    """`--report-path` without the suffix of a report; `report` in a folder.

    Raises `ConfigError` where a file cannot be made, before anything is compared.
    """
    stem = path.with_suffix("") if path.suffix.lower() in _SUFFIXES else path
    if path.is_dir():
        stem = path / "report"
    if not stem.absolute().parent.is_dir():
        raise ConfigError(f"--report-path {path}: there is no folder {stem.parent}.")
    probe = stem.with_name(f".{stem.name}.partial")
    try:
        probe.touch()
    except OSError as failure:
        raise ConfigError(f"--report-path {path}: {failure.strerror}.") from failure
    probe.unlink()
    return stem


def write(stem: Path, results: Sequence[Result], alone: Sequence[str], preset: str) -> list[Path]:
    """`STEM.json`, and a page for each prompt: `STEM.html`, or `STEM-prompt-1.html` of several."""
    from tensortap_analysis.report import write_report

    pages = []
    for result in results:
        trio = result.trio
        name = stem.name if len(results) == 1 else f"{stem.name}-{trio.port.name}"
        page = stem.with_name(f"{name}.html")
        names = with_inputs(row.place for row in result.rows)
        write_report(
            page, named(trio.ref), named(trio.port),
            noise=None if trio.noise is None else named(trio.noise),
            preset=PRESETS[preset], select=",".join(names) or "*",
        )  # fmt: skip
        pages.append(page)
    told = stem.with_name(f"{stem.name}.json")
    text = json.dumps(document(results, alone, preset, pages), indent=2)
    told.write_text(text + "\n", encoding="utf-8")
    return [told, *pages]
