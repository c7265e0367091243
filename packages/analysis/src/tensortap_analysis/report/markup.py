"""HTML from trusted tags and untrusted text: a plain string is always escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

_SCRIPT = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Html(str):
    """Markup that was made here; any other string is text."""

    __slots__ = ()


def text(value: object, *, quote: bool = True) -> Html:
    """Text for element content and attributes; control and direction characters are shown.

    Without `quote` it is for content alone.
    """
    shown = _UNPRINTABLE.sub(lambda found: f"\\x{ord(found.group()):02x}", str(value))
    return Html(html.escape(shown, quote=quote))


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element; `class_` and `for_` are class and for, `data_x` is data-x."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Children one after the other, text escaped."""
    return Html("".join(x if isinstance(x, Html) else text(x) for x in children))


def listing(lines: Iterable[str], most: int, more: str = "more") -> Html:
    """A bulleted list of at most `most` lines; says how many there are besides."""
    every = list(lines)
    items = [tag("li", line) for line in every[:most]]
    if len(every) > most:
        items.append(tag("li", f"… and {len(every) - most:,} {more}", class_="quiet"))
    return tag("ul", *items) if items else Html("")


def table(
    columns: Mapping[str, str], rows: Iterable[Mapping[str, str]], words: Container[str]
) -> Html:
    """A table with a title for each column; all but the columns of `words` hold numbers."""
    head = tag("tr", *(tag("th", title, scope="col") for title in columns.values()))
    body = [
        tag("tr", *(
            tag("td", row[key], class_="word" if key in words else "number") for key in columns
        ))
        for row in rows
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def data_block(identifier: str, content: Any) -> Html:
    """JSON that a script reads; no text inside can end the block."""
    plain = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
    block = plain.translate(_SCRIPT)
    return Html(f'<script type="application/json" id="{text(identifier)}">{block}</script>')
