"""What was captured of each run, and what is missing, with reasons."""

from __future__ import annotations

from collections.abc import Sequence

from tensortap.tables import grouped
from tensortap_analysis.report.markup import Html, join, listing, tag
from tensortap_analysis.report.views import View

_LINES = 15


def section(views: Sequence[View]) -> Html:
    """A block for each run."""
    return join(map(_run, views))


def _run(view: View) -> Html:
    report = view.coverage
    parts: list[str] = [tag("h3", view.label, _state(view))]
    if report:
        parts.append(tag(
            "p", f"{report['records']:,} records of {len(report['captured']):,} tensors in "
            f"{report['steps']:,} step(s), {len(view.ranks)} rank(s).",
        ))  # fmt: skip
    else:
        parts.append(tag("p", "It has no coverage report: what is missing is not known."))
    if view.problems:
        parts.append(tag("h4", f"Problems ({len(view.problems):,})"))
        parts.append(listing(view.problems, _LINES))
    for title in ("gaps", "notes"):
        rows = report.get(title, ())
        lines = list(grouped((row["name"], row["reason"], row["count"]) for row in rows))
        if lines:
            shown = listing(lines, _LINES)
            summary = tag("summary", f"{title.capitalize()} ({len(rows):,})")
            opened = {"open": ""} if title == "gaps" else {}
            parts.append(tag("details", summary, shown, **opened))
    return tag("div", *parts, class_="words")


def _state(view: View) -> Html:
    colour = {"complete": " good", "incomplete": " bad"}.get(view.state, "")
    return tag("span", view.state, class_=f"badge{colour}")
