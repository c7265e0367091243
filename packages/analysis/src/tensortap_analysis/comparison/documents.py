"""What a comparison found, as plain JSON for scripts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tensortap.records import encode_float
from tensortap_analysis.comparison.outcome import RunComparison
from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.comparison.tables import layer_rows, run_rows, tensor_rows
from tensortap_analysis.divergence.parting import Divergence
from tensortap_analysis.judging.presets import preset
from tensortap_analysis.rendering import Row


def as_json(found: Comparison, limit: int = 0) -> dict[str, Any]:
    """Everything a script may ask: the summary, and of each run what the terminal says."""
    return {
        "verdict": found.verdict,
        "ref": found.ref.to_json(),
        "noise": None if found.noise is None else found.noise.to_json(),
        "preset": found.preset,
        "thresholds": dict(preset(found.preset, found.thresholds).limits),
        "warnings": list(found.remarks),
        "summary": [_plain(row) for row in run_rows(found)],
        "runs": [_run_json(run, limit) for run in found.runs],
    }


def _run_json(run: RunComparison, limit: int) -> dict[str, Any]:
    first = run.first_divergence
    return {
        "run": run.run.to_json(),
        "verdict": run.verdict,
        "compared": len(run.pairs),
        "not_compared": run.not_compared,
        "undecided": len(run.undecided),
        "estimated": run.estimated,
        "warnings": list(run.warnings),
        "notes": list(run.notes),
        "first_divergence": None if first is None else _divergence(first),
        "divergences": [_divergence(one) for one in run.divergences],
        "suspects": [_divergence(one) for one in run.suspects],
        "layers": [_plain(row) for row in layer_rows(run)],
        "jumps": [change.to_json() for change in run.jumps],
        "changes": [change.to_json() for change in run.changes],
        "abnormal": list(run.abnormal),
        "unpaired": [asdict(one) for one in run.unpaired],
        "tensors": [_plain(row) for row in tensor_rows(run, limit)],
    }


def _divergence(found: Divergence) -> dict[str, Any]:
    inputs = {pair.name: pair.error for pair in found.inputs}
    return {
        "tensor": found.name,
        "step": found.pair.at.step,
        "microbatch": found.pair.at.microbatch,
        "origin": found.origin,
        "basis": found.basis,
        "grade": found.judgement.grade,
        "excess": encode_float(found.judgement.excess),
        "error": encode_float(found.error),
        "inherited": encode_float(found.inherited),
        "local": encode_float(found.local),
        "inputs": {name: encode_float(error) for name, error in inputs.items()},
        "inputs_known": not found.missing,
        "inputs_missing": list(found.missing),
    }


def _plain(row: Row) -> dict[str, Any]:
    return {
        key: encode_float(value) if isinstance(value, float) else value
        for key, value in row.items()
    }
