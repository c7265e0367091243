"""Parts that reports about weights have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensortap_analysis.report.markup import Html, join, tag
from tensortap_analysis.weights.health import Issue
from tensortap_analysis.weights.sources import Skipped

_ISSUES = 200


def cards(facts: Iterable[tuple[str, str, str]]) -> Html:
    """A row of numbers: each with what it counts, and `good`, `bad` or nothing for its colour."""
    return tag("div", *(_card(*fact) for fact in facts), class_="cards")


def _card(value: str, word: str, kind: str) -> Html:
    shown = tag("p", value, class_="verdict"), tag("p", word, class_="quiet")
    return tag("div", *shown, class_=f"card small {kind}".strip())


def issue_table(issues: Sequence[Issue]) -> Html:
    """What is wrong and what to do about it, the worst first."""
    headings = ("severity", "layer", "what", "what to do")
    head = tag("tr", *(tag("th", word, scope="col") for word in headings))
    rows = [_issue(one) for one in issues[:_ISSUES]]
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    cut = f"The worst {_ISSUES} of {len(issues):,}." if len(issues) > _ISSUES else ""
    return join((tag("p", cut, class_="says"), tag("div", table, class_="scroll")))


def _issue(one: Issue) -> Html:
    words = (one.severity, one.layer, one.cause, one.remedy)
    return tag("tr", *(tag("td", word, class_="word") for word in words))


def sentence(one: Skipped) -> str:
    """`model.norm (spectral): a vector has no spectrum`."""
    method = f" ({one.method})" if one.method else ""
    return f"{one.name}{method}: {one.reason}"
