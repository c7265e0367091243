"""A table that the page sorts, searches and shows; its rows are data, one such table a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensortap.records import encode_float
from tensortap_analysis.report.markup import Html, data_block, join, tag

Column = tuple[str, str, str]
"""Key, heading, and what the heading means."""


def searched(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], excess: str) -> Html:
    """Rows in this order. Where there is a column `excess`, those from 1 on are marked."""
    beyond = next((n for n, column in enumerate(columns) if column[0] == excess), None)
    table = {
        "columns": [{"key": key, "title": title, "says": says} for key, title, says in columns],
        "rows": [[_cell(row.get(key)) for key, _, _ in columns] for row in rows],
        "beyond": beyond,
    }
    return join((_controls(beyond is not None), _table(), data_block("tensors-data", table)))


def _cell(value: Any) -> Any:
    """Numbers with five digits, NaN and infinities as words: the file stays small."""
    if isinstance(value, float):
        value = float(f"{value:.5g}")
        return None if value != value else encode_float(value)
    return value


def _controls(judged: bool) -> Html:
    search = tag(
        "input", id="search", type="search", placeholder="Search: layers.3 attn forward -grad",
        aria_label="Search tensors", autocomplete="off", spellcheck="false",
    )  # fmt: skip
    parts: list[str] = [Html(search.removesuffix("</input>"))]
    if judged:
        box = Html('<input type="checkbox" id="beyond">')
        parts.append(tag("label", box, " beyond limits only"))
    parts.append(tag("output", id="shown", for_="search"))
    return tag("div", *parts, class_="controls")


def _table() -> Html:
    table = tag("table", tag("thead"), tag("tbody"), id="tensors-table")
    more = tag("button", "Show more", id="more", type="button", hidden="")
    return join((tag("div", table, class_="scroll", tabindex="0"), more))
