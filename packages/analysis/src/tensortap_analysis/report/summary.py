"""The answer first: do the runs agree, where do they part, what deserves a warning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tensortap_analysis.comparison.result import Comparison, RunComparison
from tensortap_analysis.comparison.tables import run_rows
from tensortap_analysis.judging.presets import preset
from tensortap_analysis.rendering import cell
from tensortap_analysis.report.markup import Html, join, listing, table, tag
from tensortap_analysis.report.views import View

_VERDICTS = {
    "agree": ("good", "agrees"),
    "differ": ("bad", "differs beyond limits"),
    "incomparable": ("bad", "could not be compared"),
}
_COLUMNS = {
    "run": "run", "mode": "mode", "verdict": "verdict", "compared": "tensors",
    "beyond": "beyond limits", "local": "local", "first_mse": "first layer MSE",
    "first_mae": "MAE", "last_mse": "last layer MSE", "last_mae": "MAE",
    "mean_correlation": "mean correlation", "worst": "worst tensor",
}  # fmt: skip
_WORDS = frozenset({"run", "mode", "verdict", "worst"})


def section(views: Sequence[View], found: Comparison | None) -> Html:
    """Verdicts where runs are compared; else what the run holds."""
    if found is None:
        return _one(views[0])
    judged = [_verdict(run, one.label) for run, one in zip(found.runs, views[1:], strict=True)]
    warnings = [*found.remarks, *(text for run in found.runs for text in run.warnings)]
    parts: list[str] = [tag("div", *judged, class_="cards")]
    if warnings:
        listed = listing(dict.fromkeys(warnings), 12)
        parts.append(tag("div", tag("h3", "Warnings"), listed, class_="notice"))
    by = preset(found.preset, found.thresholds)
    noise = f"; the noise run is {found.noise.title}" if found.noise is not None else ""
    limits = ", ".join(f"{key} {value:g}" for key, value in by.limits.items())
    parts += [
        _table(views, found),
        tag("p", f"Judged by {by.name}: {by.says}; {limits}{noise}.", class_="says"),
    ]
    if any(run.estimated for run in found.runs):
        parts.append(tag("p", "Some limits are an estimate of what rounding does; "
                         "--noise RUN measures it.", class_="says"))  # fmt: skip
    return join(parts)


def _verdict(run: RunComparison, label: str) -> Html:
    colour, words = _VERDICTS[run.verdict]
    first = run.first_divergence
    said = f"First divergence: {first}" if first is not None else "No tensor is beyond its limit."
    if run.verdict == "incomparable":
        said = "It has no tensor in common with the reference that could be compared."
    count = f"{len(run.divergences):,} of {len(run.pairs):,} tensors beyond their limits"
    return tag(
        "div", tag("p", label, class_="who"), tag("p", words, class_="verdict"),
        tag("p", count, class_="quiet"), tag("p", said), class_=f"card {colour}",
    )  # fmt: skip


def _table(views: Sequence[View], found: Comparison) -> Html:
    rows = (
        {key: cell(row[key]) for key in _COLUMNS} | {"run": one.label}
        for row, one in zip(run_rows(found), views[1:], strict=True)
    )
    return table(_COLUMNS, rows, _WORDS)


def _one(view: View) -> Html:
    found = view.survey
    if found is None or not len(found.name):
        return tag("p", "No statistics of what was selected.")
    bad = int((found.nonfinite > 0).sum())
    facts = (
        ("tensors", f"{len(found.names):,}"),
        ("steps", f"{len(found.steps):,}"),
        ("ranks", f"{len(view.ranks):,}"),
        ("values", f"{int(found.count.sum()):,}"),
        ("largest magnitude", cell(_largest(found.floating.absmax))),
        ("tensors with NaN or Inf", f"{bad:,}"),
        ("state", view.state),
    )
    cards = []
    for title, value in facts:
        alarming = (title == "state" and view.problems) or (
            title.startswith("tensors with") and bad
        )
        kind = "card small bad" if alarming else "card small"
        shown = tag("p", value, class_="verdict"), tag("p", title, class_="quiet")
        cards.append(tag("div", *shown, class_=kind))
    parts = [tag("div", *cards, class_="cards")]
    if view.began is not None:
        parts.append(tag("p", f"First NaN or Inf: {view.began}.", class_="notice"))
    return join(parts)


def _largest(values: npt.NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else None
