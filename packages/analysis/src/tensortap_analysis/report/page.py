"""The page about runs: which sections there are, in what order, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensortap
from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.report import (
    coverage,
    divergence,
    environment,
    magnitudes,
    summary,
    tensors,
)
from tensortap_analysis.report.shell import Sections, document
from tensortap_analysis.report.views import View


@dataclass(frozen=True, slots=True)
class Page:
    """The file's text; how many tensors there are, and how many of them its table lists."""

    html: str
    tensors: int
    listed: int


def page(views: Sequence[View], found: Comparison | None, rows: int) -> Page:
    """All sections; the first view is the reference where there is a comparison."""
    listing = tensors.section(views, found, rows)
    sections = {"summary": ("Summary", summary.section(views, found))}
    if found is not None:
        labels = [one.label for one in views[1:]]
        sections["divergence"] = ("Divergence", divergence.section(found, labels))
    sections |= {
        "magnitudes": ("Magnitudes", magnitudes.section(views)),
        "tensors": ("Tensors", listing.html),
        "coverage": ("Coverage", coverage.section(views)),
        "environment": ("Environment", environment.section(views)),
    }
    shown = {key: value for key, value in sections.items() if value[1]}
    return Page(_document(views, shown), listing.tensors, listing.listed)


def _document(views: Sequence[View], sections: Sections) -> str:
    title = " against ".join([", ".join(v.label for v in views[1:]), views[0].label]) \
        if len(views) > 1 else views[0].label  # fmt: skip
    info = views[0].info
    about = (
        f"{info.model_class or 'model'}, captured {info.created}; tensortap {tensortap.__version__}"
    )
    return document(title, about, sections)
