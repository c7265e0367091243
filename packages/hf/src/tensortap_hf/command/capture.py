"""`tensortap modes capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensortap_hf.command import equality, printing
from tensortap_hf.command.capturing import Outcome, Plan, capture_all
from tensortap_hf.command.equality import Equality
from tensortap_hf.command.options import (
    Alpha,
    AsJson,
    CalibData,
    CalibSamples,
    CalibSeqLen,
    Data,
    Device,
    Exclude,
    Inputs,
    Model,
    Modes,
    RandomInit,
    SeqLen,
)
from tensortap_hf.command.paths import require_folder
from tensortap_hf.command.preparing import Wanted, prepared
from tensortap_hf.command.runs import opened


def capture(
    out: Annotated[Path, typer.Option(help="Each mode becomes a run in here.")],
    model: Model = None,
    random_init: RandomInit = None,
    wanted: Modes = "all",
    layers: Annotated[str, typer.Option(help="first,last or 0,23 or all.")] = "first,last",
    data: Data = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to run.")] = 10,
    seq_len: SeqLen = 512,
    calib_data: CalibData = None,
    calib_samples: CalibSamples = 10,
    calib_seq_len: CalibSeqLen = 512,
    percentile_alpha: Alpha = None,
    exclude: Exclude = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace runs of the same modes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Capture a model in several modes: one run a mode, on the same inputs.

    Recorded are input and output of each layer, and the output of its mixer if it has one. Every
    sample is a step. Exit code: 0 all modes were captured, 1 a mode failed or modes that must be
    bitwise equal are not, 2 nothing could be done.
    """
    require_folder(out, "--out")
    plan, chosen = prepared(
        Wanted(model, random_init, device, wanted, layers, exclude or ()),
        Inputs(data, samples, seq_len, calib_data, calib_samples, calib_seq_len, percentile_alpha),
    )
    work = len(chosen) * len(plan.samples.ids) + plan.calibration.work(chosen)
    with printing.progress_of(work, "capturing") as progress:
        outcomes = capture_all(plan, chosen, out, progress, overwrite=overwrite)
    equal = _equalities(out, outcomes)
    if as_json:
        printing.say_json(_json(plan, out, outcomes, equal))
    else:
        _print(plan, outcomes)
        printing.say_if(equality.declared(equal))
    _report(outcomes, equal)
    failed = any(one.error for one in outcomes) or any(e.kind == "violated" for e in equal)
    raise typer.Exit(1 if failed else 0)


def _equalities(out: Path, outcomes: list[Outcome]) -> list[Equality]:
    names = {Path(one.run).name for one in outcomes if one.error is None}
    if not names:
        return []
    with opened(out, names) as runs:
        return equality.equalities(runs)


def _print(plan: Plan, outcomes: list[Outcome]) -> None:
    lengths = sorted(set(plan.samples.lengths))
    tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    printing.say(
        f"{plan.loaded.source}: layers {', '.join(map(str, plan.layers.numbers))}; "
        f"{printing.count(len(plan.samples.ids), 'sample')} of {tokens} tokens from "
        f"{plan.samples.source}"
    )
    rows = [_cells(one) for one in outcomes]
    printing.say_table(("mode", "family", "run", "records", "seconds"), rows)


def _cells(one: Outcome) -> tuple[object, ...]:
    run = "failed" if one.error else one.run
    return one.mode, one.family, run, one.records or None, one.seconds or None


def _report(outcomes: list[Outcome], equal: list[Equality]) -> None:
    for one in outcomes:
        if one.error is not None:
            printing.complain(f"mode {one.family}/{one.mode} failed: {one.error}")
    report_equalities(equal)


def report_equalities(equal: list[Equality]) -> None:
    """Violations as errors, equalities that nobody declared as warnings."""
    for one in equal:
        if one.kind == "violated":
            printing.complain(str(one))
    for sentence in equality.undeclared(equal):
        printing.warn(sentence)


def _json(plan: Plan, out: Path, outcomes: list[Outcome], equal: list[Equality]) -> dict[str, Any]:
    inputs = plan.samples.to_json()
    return {
        "out": str(out),
        "model": plan.loaded.source,
        "layers": list(plan.layers.numbers),
        "inputs": {key: inputs[key] for key in ("source", "tokens", "lengths")},
        "modes": [one.to_json() for one in outcomes],
        "equalities": [one.to_json() for one in equal],
    }
