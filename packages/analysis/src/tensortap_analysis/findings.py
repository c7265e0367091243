"""What a comparison found, in words for a terminal and as plain JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensortap.records import encode_float
from tensortap.tables import grouped
from tensortap_analysis.comparison import Comparison, RunComparison
from tensortap_analysis.divergence import Divergence
from tensortap_analysis.presets import preset
from tensortap_analysis.tables import Row, block, run_rows, tensor_rows, tensors

_WHO = {"ref": "only in REF", "run": "only in RUN", "both": "not comparable"}
_FEW = 8


def header(found: Comparison) -> str:
    """Who is compared with whom, and judged by what."""
    by = preset(found.preset, found.thresholds)
    limits = ", ".join(f"{key} {value:g}" for key, value in by.limits.items())
    noise = f" (noise: {found.noise.title})" if found.noise is not None else ""
    return f"REF {found.ref.title}; judged by {by.name}: {by.says}; {limits}{noise}"


def findings(run: RunComparison, limit: int, *, details: bool) -> Iterator[str]:
    """Lines on one run: divergence, layers, tensors, and what was not compared."""
    yield f"{run.run.title}: {_verdict(run)}"
    if run.estimated:
        yield "  Limits are an estimate of what rounding does; --noise RUN measures it."
    yield from (f"  {line}" for line in _parting(run))
    yield from _listed("jump between layers", map(str, run.jumps))
    yield from _listed("abnormal", run.abnormal)
    for word, title in _WHO.items():
        rows = ((one.name, one.reason, one.count) for one in run.unpaired if one.where == word)
        yield from (f"  {title}: {line}" for line in grouped(rows))
    if details:
        yield from _blocks(run, limit)
    elif run.pairs:
        yield ""
        yield tensors(run, "text", limit)
        if limit and len(run.pairs) > limit:
            more = len(run.pairs) - limit
            yield f"… the worst {limit}; {more:,} more: --limit 0, --csv --details, or --save."


def _verdict(run: RunComparison) -> str:
    if run.verdict == "incomparable":
        return "could not be compared"
    kinds = sorted({pair.by for pair in run.pairs})
    how = f", by {' and '.join(kinds)}" if kinds != ["values"] else ""
    word = "differs beyond limits" if run.divergences else "agrees"
    beyond = f"{len(run.divergences):,} of " if run.divergences else ""
    return f"{word} ({beyond}{len(run.pairs):,} tensors{how})"


def _parting(run: RunComparison) -> Iterator[str]:
    first = run.first_divergence
    if first is None:
        return
    yield f"first divergence: {first}"
    local = run.local
    names = list(dict.fromkeys(found.name for found in local))
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    if names:
        yield f"local errors (added there): {', '.join(names[:_FEW])}{more}"
    yield f"inherited errors: {len(run.divergences) - len(local):,} tensors"


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    every = list(lines)
    yield from (f"  {title}: {line}" for line in every[:_FEW])
    if len(every) > _FEW:
        yield f"  {title}: and {len(every) - _FEW:,} more"


def _blocks(run: RunComparison, limit: int) -> Iterator[str]:
    shown = {row["tensor"] for row in tensor_rows(run, limit)}
    for pair, judgement in zip(run.pairs, run.judgements, strict=True):
        if pair.name in shown:
            yield ""
            yield block(pair, judgement)


def as_json(found: Comparison, limit: int = 0) -> dict[str, Any]:
    """Everything a script may ask: the summary, and of each run what the terminal says."""
    return {
        "verdict": found.verdict,
        "ref": found.ref.to_json(),
        "noise": None if found.noise is None else found.noise.to_json(),
        "preset": found.preset,
        "thresholds": dict(preset(found.preset, found.thresholds).limits),
        "summary": [_plain(row) for row in run_rows(found)],
        "runs": [_run_json(run, limit) for run in found.runs],
    }


def _run_json(run: RunComparison, limit: int) -> dict[str, Any]:
    first = run.first_divergence
    return {
        "run": run.run.to_json(),
        "verdict": run.verdict,
        "estimated": run.estimated,
        "warnings": list(run.warnings),
        "first_divergence": None if first is None else _divergence(first),
        "divergences": [_divergence(one) for one in run.divergences],
        "jumps": [change.to_json() for change in run.jumps],
        "changes": [change.to_json() for change in run.changes],
        "abnormal": list(run.abnormal),
        "unpaired": [
            {"name": one.name, "where": one.where, "reason": one.reason, "count": one.count}
            for one in run.unpaired
        ],
        "tensors": [_plain(row) for row in tensor_rows(run, limit)],
    }


def _divergence(found: Divergence) -> dict[str, Any]:
    inputs = {pair.name: pair.error for pair in found.inputs}
    return {
        "tensor": found.name,
        "step": found.pair.at.step,
        "microbatch": found.pair.at.microbatch,
        "origin": found.origin,
        "grade": found.judgement.grade,
        "excess": encode_float(found.judgement.excess),
        "error": encode_float(found.error),
        "inherited": encode_float(found.inherited),
        "local": encode_float(found.local),
        "inputs": {name: encode_float(error) for name, error in inputs.items()},
    }


def _plain(row: Row) -> dict[str, Any]:
    return {
        key: encode_float(value) if isinstance(value, float) else value
        for key, value in row.items()
    }
