"""The page: sections in order, with style and script inside, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from plotly.offline import get_plotlyjs

import tensortap
from tensortap_analysis.comparison import Comparison
from tensortap_analysis.report import (
    coverage,
    divergence,
    environment,
    magnitudes,
    summary,
    tensors,
)
from tensortap_analysis.report.markup import Html, join, tag, text
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


def _document(views: Sequence[View], sections: dict[str, tuple[str, Html]]) -> str:
    title = " against ".join([", ".join(v.label for v in views[1:]), views[0].label]) \
        if len(views) > 1 else views[0].label  # fmt: skip
    scripts = [get_plotlyjs(), _own("page.js")]
    links = [tag("a", word, href=f"#{key}") for key, (word, _) in sections.items()]
    body = [tag("section", tag("h2", word), html, id=key) for key, (word, html) in sections.items()]
    info = views[0].info
    about = (
        f"{info.model_class or 'model'}, captured {info.created}; tensortap {tensortap.__version__}"
    )
    main = tag("main", tag("h1", title), tag("p", about, class_="quiet"), *body)
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)} · tensortap</title><style>{_own('page.css')}</style>"
    )
    ending = join(Html(f"<script>{script}</script>") for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>'
        f"<body>{tag('nav', *links)}{main}{ending}</body></html>\n"
    )


def _own(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched, and only these scripts run: text of a run never becomes code."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
