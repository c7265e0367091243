"""What each run ran with, side by side; rows in which the runs differ are marked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensortap.records import RunInfo
from tensortap_analysis.report.markup import Html, join, tag
from tensortap_analysis.report.views import View

_LONG = 300
_MANY = 150
_OWN = ("path", "created", "launch")
"""What no two runs share."""


def section(views: Sequence[View]) -> Html:
    """A table for each kind of fact; a column for each run."""
    infos = [one.info for one in views]
    parts = []
    for title, facts in (
        ("Run", [_run(one) for one in views]),
        ("Versions", [dict(info.versions) for info in infos]),
        ("Parallel sizes", [{"world size": info.world_size, **info.parallel} for info in infos]),
        ("Capture settings", [dict(info.settings) for info in infos]),
        ("Model configuration", [dict(_flat(info.model_config)) for info in infos]),
        ("Metadata", [dict(_flat(info.metadata)) for info in infos]),
    ):
        if any(facts):
            parts.append(_table(title, views, facts))
    return join(parts)


def _run(view: View) -> dict[str, Any]:
    info: RunInfo = view.info
    return {
        "path": view.path, "model": info.model_class, "mode": info.mode, "format": info.format,
        "created": info.created, "launch": info.launch_id, "ranks captured": _spans(view.ranks),
        "steps captured": _spans(view.steps),
    }  # fmt: skip


def _spans(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    return f"{len(numbers):,}, from {numbers[0]} to {numbers[-1]}"


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in facts.items():
        if isinstance(value, Mapping) and value and before.count(".") < 4:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _table(title: str, views: Sequence[View], facts: Sequence[Mapping[str, Any]]) -> Html:
    keys = list(dict.fromkeys(key for one in facts for key in one))
    head = tag("tr", tag("th", ""), *(tag("th", one.label, scope="col") for one in views))
    body = [_row(key, [one.get(key) for one in facts]) for key in keys[:_MANY]]
    if len(keys) > _MANY:
        words = f"… and {len(keys) - _MANY:,} more, in run.json"
        body.append(tag("tr", tag("td", words, class_="quiet", colspan=str(len(views) + 1))))
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="facts")
    few = len(keys) <= 12
    return tag("details", tag("summary", title), tag("div", table, class_="scroll"),
               **({"open": ""} if few else {}))  # fmt: skip


def _row(key: str, values: Sequence[Any]) -> Html:
    words = [_words(value) for value in values]
    differs = len(set(words)) > 1 and key not in _OWN
    marked = {"class_": "differs"} if differs else {}
    return tag("tr", tag("th", key, scope="row"), *(tag("td", word) for word in words), **marked)


def _words(value: Any) -> str:
    if value is None or value == "":
        return "-"
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    cut = f" … ({len(shown):,} characters)" if len(shown) > _LONG else ""
    return shown[:_LONG] + cut
