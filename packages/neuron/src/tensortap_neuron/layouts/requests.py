"""Which rows of a forward pass of vLLM-Neuron belong to which request, and which are padding.

A pass over prompts packs tokens of one or several requests into a bucket, a pass over generated
tokens has a row for each request. Positions count each request's tokens from 0. Padding repeats
the last position, or is negative, or follows the rows of all requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensortap.errors import RunError

_PASS = re.compile(r"(?P<phase>prefill_s|decode_b)(?P<size>\d{1,9})_(?P<count>\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of one request in one pass, and the positions of their tokens."""

    request: str
    start: int
    positions: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Behind the last row."""
        return self.start + len(self.positions)


@dataclass(frozen=True, slots=True)
class Pass:
    """One folder `prefill_s128_0` or `decode_b2_3`; `whole`: why nobody knows whose rows are."""

    path: Path
    replica: int
    shares: tuple[Share, ...]
    rows: int
    whole: str | None = None

    @property
    def is_prefill(self) -> bool:
        """Does it process prompts?"""
        return self.path.name.startswith("prefill_s")

    @property
    def last(self) -> int:
        """The last position of all tokens; -1 where requests are not known."""
        return max((share.positions[-1] for share in self.shares), default=-1)


def is_pass(name: str) -> bool:
    """Is this how a folder of a forward pass is called?"""
    return _PASS.fullmatch(name) is not None


def pass_key(name: str) -> tuple[str, int, int]:
    """Sorts folders by phase (prompts last), bucket and count."""
    found = _PASS.fullmatch(name)
    return (found["phase"], int(found["size"]), int(found["count"])) if found else (name, 0, 0)


def parse_pass(path: Path, replica: int, document: Mapping[str, Any]) -> Pass:
    """A pass with its metadata; raises `RunError` where these are not what vLLM-Neuron writes."""
    ids, positions = document.get("req_ids"), document.get("positions")
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise RunError("'req_ids' must list the ids of requests")
    if not isinstance(positions, list):
        raise RunError("'positions' must be a list")
    if any(type(number) is not int for number in positions):
        return Pass(path, replica, (), len(positions), "its positions have several axes")
    if not ids:
        return Pass(path, replica, (), len(positions), "it names no request")
    prefill = path.name.startswith("prefill_s")
    found = _prompts(ids, positions) if prefill else _tokens(ids, positions)
    if found is None:
        why = f"its positions do not tell its {len(ids)} requests apart"
        return Pass(path, replica, (), len(positions), why)
    return Pass(path, replica, found, len(positions))


def _prompts(ids: Sequence[str], positions: Sequence[int]) -> tuple[Share, ...] | None:
    """A stretch of growing positions for each request; what follows them is padding."""
    stretches = list(_growing(positions))[: len(ids)]
    if len(stretches) < len(ids):
        return None
    return tuple(
        Share(request, start, tuple(positions[start:stop]))
        for request, (start, stop) in zip(ids, stretches, strict=True)
    )


def _growing(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for row in range(1, len(positions) + 1):
        last = positions[row - 1]
        if row < len(positions) and positions[row] > last:
            continue
        if last >= 0 and not (row - start == 1 and start and positions[start - 1] == last):
            yield start, row
        start = row


def _tokens(ids: Sequence[str], positions: Sequence[int]) -> tuple[Share, ...] | None:
    """A row for each request; of a single one all that it has, if these are several tokens.

    A reference without a cache runs the whole text again: there the last token is the new one.
    """
    if len(ids) == 1 and list(_growing(positions)) == [(0, len(positions))]:
        start = len(positions) - 1 if positions[0] == 0 else 0
        return (Share(ids[0], start, tuple(positions[start:])),)
    if len(positions) < len(ids) or any(at < 0 for at in positions[: len(ids)]):
        return None
    return tuple(Share(request, row, (positions[row],)) for row, request in enumerate(ids))


def runs_of(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, length) of each stretch without a gap."""
    found: list[tuple[int, int]] = []
    for at in positions:
        if found and at == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((at, 1))
    return tuple(found)


def natural(text: str) -> tuple[object, ...]:
    """Sorts `prompt_10` behind `prompt_9`."""
    words = re.split(r"(\d+)", text)
    return tuple((int(w[:18]), w) if n % 2 else (-1, w) for n, w in enumerate(words))
