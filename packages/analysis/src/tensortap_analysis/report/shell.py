"""The file around the sections: style and scripts inside, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from plotly.offline import get_plotlyjs

from tensortap_analysis.report.markup import Html, join, tag, text

Sections = Mapping[str, tuple[str, Html]]
"""Identifier to heading and content, in order."""


def document(title: str, about: str, sections: Sections) -> str:
    """An HTML file that opens offline; `about` is one line below the title."""
    scripts = [get_plotlyjs(), _own("page.js")]
    links = [tag("a", word, href=f"#{key}") for key, (word, _) in sections.items()]
    body = [tag("section", tag("h2", word), html, id=key) for key, (word, html) in sections.items()]
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
