"""The forwards of one request, put together from the passes of vLLM-Neuron that it had a share in.

A long prompt is processed in chunks: they are one forward, as elsewhere, in the order of their
positions. What was processed twice (a request that was put off) is a second call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensortap_neuron.layouts.requests import Pass, Share, natural, pass_key


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of a request: microbatch 0 is the prompt, then one for each later position."""

    microbatch: int
    call: int
    parts: tuple[tuple[Pass, Share | None], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Of all its tokens."""
        return tuple(at for _, share in self.parts if share for at in share.positions)


@dataclass(frozen=True, slots=True)
class Request:
    """A request of one replica, or a pass that nobody could divide, under the pass's name."""

    name: str
    replica: int
    forwards: tuple[Forward, ...]


def requests_of(passes: Iterable[Pass]) -> list[Request]:
    """Every request, sorted by id, numbers by their value."""
    shared: dict[tuple[str, int], list[tuple[Pass, Share]]] = {}
    found = []
    for one in passes:
        if one.whole is not None:
            found.append(Request(one.path.name, one.replica, (Forward(0, 0, ((one, None),)),)))
        for share in one.shares:
            shared.setdefault((share.request, one.replica), []).append((one, share))
    for (name, replica), parts in shared.items():
        found.append(Request(name, replica, _forwards(parts)))
    return sorted(found, key=lambda one: (natural(one.name), one.replica))


def _forwards(parts: Sequence[tuple[Pass, Share]]) -> tuple[Forward, ...]:
    ordered = sorted(parts, key=lambda part: (part[1].positions[0], pass_key(part[0].path.name)))
    chains = _chains([part for part in ordered if part[0].is_prefill])
    generated = [part for part in ordered if not part[0].is_prefill]
    found = [Forward(0, call, chain) for call, chain in enumerate(chains)]
    before = _before(found, generated)
    calls: Counter[int] = Counter()
    for part in generated:
        microbatch = max(1, part[1].positions[0] - before)
        found.append(Forward(microbatch, calls[microbatch], (part,)))
        calls[microbatch] += 1
    return tuple(found)


def _before(prompts: Sequence[Forward], generated: Sequence[tuple[Pass, Share]]) -> int:
    """The last position before the first generated token's forward."""
    if prompts:
        return prompts[0].positions[-1]
    return generated[0][1].positions[0] - 1


def _chains(parts: Sequence[tuple[Pass, Share]]) -> list[tuple[tuple[Pass, Share], ...]]:
    """Chunks that follow each other; a chunk that begins before the end of a chain opens one."""
    chains: list[list[tuple[Pass, Share]]] = []
    for part in parts:
        start = part[1].positions[0]
        fitting = [chain for chain in chains if chain[-1][1].positions[-1] < start]
        if fitting:
            fitting[0].append(part)
        else:
            chains.append([part])
    return [tuple(chain) for chain in chains]
