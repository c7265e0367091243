"""The selective scan of Mamba in float32, in the two orders that its implementations have.

    h[t] = a[t] h[t-1] + b[t],   a = exp(dt A),   b = dt u B,   y[t] = D u + sum_n C[t, n] h[t, n]

`SEQUENTIAL` takes one token after the other. `BLOCKED` takes them as the CUDA kernel does, which
composes the steps (a, b) in an associative scan: each of 32 to 128 threads reduces its 4 to 16
tokens, the threads of a warp combine their results over distances 1, 2, 4, 8 and 16, then the
warps one after the other, and at last each thread goes through its tokens again. A GPU rounds
a multiply-add once, this code always twice (what `addcmul` does depends on how torch was built).
Everything but the order of h is the same code, so that two results differ by their order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_CACHED = 1 << 19
"""Elements of a and of b that are worked on at once, so that they stay in a core's cache."""

_SERIAL = (1 << 15) - 1
"""Elements of one operation. Beyond, torch shares it among threads: with thousands of operations
each waits for the slowest, and where other programs run that is most of the time."""

_WARP = 32
_LAUNCHES = ((128, 32, 4), (256, 32, 8), (512, 32, 16), (1024, 64, 16))
"""Up to so many tokens the kernel runs with so many threads of so many tokens each."""
_LONGEST = (128, 16)
"""Threads and tokens of each for more tokens, in chunks of their product."""


_Steps = tuple[torch.Tensor, torch.Tensor]
"""(a, b) of h -> a h + b."""


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """What a scan is given, as float32 values."""

    u: torch.Tensor
    """[batch, seq, channel], and so `dt`, which is after bias and softplus."""
    dt: torch.Tensor
    A: torch.Tensor
    """[channel, state]."""
    B: torch.Tensor
    """[batch, seq, state], and so `C`."""
    C: torch.Tensor
    D: torch.Tensor
    """[channel]."""
    state: torch.Tensor | None = None
    """[batch, channel, state] before the first token; `None`: zeros."""

    def channels(self, part: slice) -> ScanInputs:
        """The same for some of the channels, which do not know of each other."""
        state = None if self.state is None else self.state[:, part]
        return ScanInputs(
            self.u[..., part], self.dt[..., part], self.A[part], self.B, self.C, self.D[part], state
        )


@dataclass(frozen=True, slots=True)
class Order:
    """How the steps of one piece are put together.

    `run(a, b, h, tokens)` takes a and b [batch, at most tokens, state, channel] and h before the
    first of them [batch, state, channel]; it turns b into h after each, spoils a, and returns the
    last h.
    """

    name: str
    piece: Callable[[int, int, int], tuple[int, int]]
    """(seq, channels, states) -> how many tokens and channels are worked on at once."""
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def scan(inputs: ScanInputs, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [batch, seq, channel] before gating, last state [batch, channel, state])."""
    batch, seq, channels = inputs.u.shape
    states = inputs.A.shape[1]
    output = torch.empty(batch, seq, channels, device=inputs.u.device)
    last = torch.empty(batch, channels, states, device=inputs.u.device)
    tokens, width = order.piece(seq, channels, states)
    for part in _slices(channels, width):
        some = inputs.channels(part)
        h = torch.zeros_like(last[:, part]) if some.state is None else some.state
        h = h.mT.contiguous()
        for time in _slices(seq, tokens):
            a, b = _steps(some, time)
            h = order.run(a, b, h, tokens)
            _write(some, time, b, output[:, time, part])
        last[:, part] = h.mT
    return output, last


def _steps(inputs: ScanInputs, time: slice) -> _Steps:
    """(a, b) of some tokens, [batch, token, state, channel]."""
    dt, B, A = inputs.dt[:, time], inputs.B[:, time], inputs.A.T.contiguous()
    driven = dt * inputs.u[:, time]
    a = dt.new_empty(*dt.shape[:2], *A.shape)
    b = torch.empty_like(a)
    for some in _slices(dt.shape[1], max(1, _SERIAL // (dt.shape[0] * A.numel()))):
        torch.mul(dt[:, some, None], A, out=a[:, some]).exp_()
        torch.mul(driven[:, some, None], B[:, some, :, None], out=b[:, some])
    return a, b


def _write(inputs: ScanInputs, time: slice, h: torch.Tensor, output: torch.Tensor) -> None:
    """Outputs of some tokens from their states; added one after the other, as the kernel does."""
    C, skipped = inputs.C[:, time], inputs.D * inputs.u[:, time]
    for some in _slices(h.shape[1], max(1, _SERIAL // (h.shape[0] * h.shape[3]))):
        total = skipped[:, some]
        for n in range(h.shape[2]):
            total.add_(h[:, some, n] * C[:, some, n, None])
        output[:, some] = total


def _in_sequence(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, tokens: int) -> torch.Tensor:
    for step, h_next in zip(a.unbind(1), b.unbind(1), strict=True):
        h = h_next.add_(step.mul_(h))
    return h.clone()


def _in_blocks(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, tokens: int) -> torch.Tensor:
    """One chunk of the kernel; tokens that its threads have beyond the last are padded."""
    threads, each = _launch(tokens)
    steps_a, steps_b = (_by_thread(x, threads, each, fill) for x, fill in ((a, 1.0), (b, 0.0)))
    whole, before = _across_threads(*_reduced(steps_a, steps_b))
    prefix = torch.cat([h[:, None], before[0] * h[:, None] + before[1]], dim=1)
    for step, h_next in zip(steps_a.unbind(2), steps_b.unbind(2), strict=True):
        prefix = h_next.add_(step.mul_(prefix))
    if steps_b.shape[1] * steps_b.shape[2] > b.shape[1]:
        b.copy_(steps_b.flatten(1, 2)[:, : b.shape[1]])  # The padded ones are not a view of b.
    return whole[0] * h + whole[1]


def _by_thread(x: torch.Tensor, threads: int, each: int, fill: float) -> torch.Tensor:
    """[batch, token, …] as [batch, thread, token of it, …]."""
    missing = threads * each - x.shape[1]
    if missing:
        padding = x.new_full((x.shape[0], missing, *x.shape[2:]), fill)
        x = torch.cat([x, padding], dim=1)
    return torch.unflatten(x, 1, (threads, each))


def _then(first: _Steps, second: _Steps) -> _Steps:
    """One step after another as one step."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def _reduced(a: torch.Tensor, b: torch.Tensor) -> _Steps:
    """All tokens of each thread as one step [batch, thread, …]."""
    total = a[:, :, 0], b[:, :, 0]
    for step in zip(a.unbind(2)[1:], b.unbind(2)[1:], strict=True):
        total = _then(total, step)
    return total


def _across_threads(a: torch.Tensor, b: torch.Tensor) -> tuple[_Steps, _Steps]:
    """(all threads as one step, what lies before each thread but the first)."""
    a, b = _within_warps(a, b)
    total = a[:, 0, -1], b[:, 0, -1]
    before = [(a[:, 0, :-1], b[:, 0, :-1])]
    for warp in range(1, a.shape[1]):
        lead = total[0][:, None], total[1][:, None]
        before += [lead, _then(lead, (a[:, warp, :-1], b[:, warp, :-1]))]
        total = _then(total, (a[:, warp, -1], b[:, warp, -1]))
    return total, (torch.cat([x for x, _ in before], 1), torch.cat([x for _, x in before], 1))


def _within_warps(a: torch.Tensor, b: torch.Tensor) -> _Steps:
    """[batch, warp, thread, …]: each thread after all those of its warp before it."""
    a, b = (torch.unflatten(x, 1, (-1, _WARP)).clone() for x in (a, b))
    for distance in (1, 2, 4, 8, 16):
        early = a[:, :, :-distance], b[:, :, :-distance]
        late = a[:, :, distance:], b[:, :, distance:]
        late[0][:], late[1][:] = _then(early, late)
    return a, b


def _launch(tokens: int) -> tuple[int, int]:
    """(threads, tokens of each) that the kernel runs with."""
    fitting = ((threads, each) for most, threads, each in _LAUNCHES if tokens <= most)
    return next(fitting, _LONGEST)


def _sequential_piece(tokens: int, channels: int, states: int) -> tuple[int, int]:
    return max(1, _CACHED // (channels * states)), channels


def _blocked_piece(tokens: int, channels: int, states: int) -> tuple[int, int]:
    threads, each = _launch(tokens)
    return threads * each, max(1, min(_CACHED // each, _SERIAL) // (threads * states))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


SEQUENTIAL = Order("sequential", _sequential_piece, _in_sequence)
BLOCKED = Order("blocked", _blocked_piece, _in_blocks)
