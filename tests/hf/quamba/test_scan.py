"""Both orders of the scan against float64, and the block order against one thread at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensortap_hf.quamba import scan as module
from tensortap_hf.quamba.scan import BLOCKED, SEQUENTIAL, Order, ScanInputs, scan

LENGTHS = (1, 3, 128, 129, 256, 300, 512, 700, 1100, 2100)


def inputs(seq: int, channels: int = 6, states: int = 4, batch: int = 2) -> ScanInputs:
    generator = torch.Generator().manual_seed(seq)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return ScanInputs(
        u=random(batch, seq, channels),
        dt=torch.rand(batch, seq, channels, generator=generator) * 0.3,
        A=-torch.exp(random(channels, states)),
        B=random(batch, seq, states),
        C=random(batch, seq, states),
        D=random(channels),
        state=random(batch, channels, states),
    )


def reference(given: ScanInputs) -> tuple[np.ndarray, np.ndarray]:
    """One token after the other in float64."""
    u, dt, a, b, c, d, h = (
        tensor.double().numpy()
        for tensor in (given.u, given.dt, given.A, given.B, given.C, given.D, given.state)
        if tensor is not None
    )
    outputs = []
    for t in range(u.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt * u)[:, t, :, None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1) + d * u[:, t])
    return np.stack(outputs, axis=1), h


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("order", [SEQUENTIAL, BLOCKED], ids=lambda order: order.name)
def test_a_scan_equals_one_in_float64(order: Order, seq: int) -> None:
    given = inputs(seq)
    output, state = scan(given, order)
    expected, last = reference(given)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(output.numpy() / scale, expected / scale, atol=2e-6)
    np.testing.assert_allclose(state.numpy(), last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [SEQUENTIAL, BLOCKED], ids=lambda order: order.name)
def test_the_size_of_the_pieces_changes_no_bit(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(300, channels=48)
    whole = scan(given, order)
    monkeypatch.setattr(module, "_CACHED", 16 * 4 * 9)
    pieces = scan(given, order)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("order", [SEQUENTIAL, BLOCKED], ids=lambda order: order.name)
def test_no_state_means_zeros(order: Order) -> None:
    given = inputs(20)
    fields = (given.u, given.dt, given.A, given.B, given.C, given.D)
    without, _ = scan(ScanInputs(*fields), order)
    zeros, _ = scan(ScanInputs(*fields, torch.zeros(2, 6, 4)), order)
    assert torch.equal(without, zeros)


Pair = tuple[np.float32, np.float32]


def then(first: Pair, second: Pair) -> Pair:
    """The operator of the kernel's scan, rounding after each operation."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def one_chunk(steps: list[Pair], running: Pair, threads: int, each: int) -> tuple[list, Pair]:
    """A block-wide inclusive scan with a running prefix, thread by thread and lane by lane."""
    one = (np.float32(1), np.float32(0))
    steps = steps + [one] * (threads * each - len(steps))
    own = [steps[i * each : (i + 1) * each] for i in range(threads)]
    totals = []
    for items in own:
        total = items[0]
        for item in items[1:]:
            total = then(total, item)
        totals.append(total)
    warps = [totals[i : i + 32] for i in range(0, threads, 32)]
    for distance in (1, 2, 4, 8, 16):
        warps = [
            [
                then(warp[lane - distance], warp[lane]) if lane >= distance else warp[lane]
                for lane in range(32)
            ]
            for warp in warps
        ]
    before: list[Pair | None] = []
    aggregate: Pair | None = None
    for warp in warps:
        for lane in range(32):
            within = warp[lane - 1] if lane else None
            if aggregate is None:
                before.append(within)
            else:
                before.append(aggregate if within is None else then(aggregate, within))
        aggregate = warp[31] if aggregate is None else then(aggregate, warp[31])
    assert aggregate is not None
    found = []
    for items, prefix in zip(own, before, strict=True):
        state = running if prefix is None else then(running, prefix)
        for item in items:
            state = then(state, item)
            found.append(state[1])
    return found, then(running, aggregate)


@pytest.mark.parametrize(
    ("seq", "threads", "each"),
    [(1, 32, 4), (100, 32, 4), (128, 32, 4), (200, 32, 8), (500, 32, 16), (600, 64, 16),
     (1500, 128, 16), (2060, 128, 16)],
)  # fmt: skip
def test_the_block_order_is_the_kernels_thread_by_thread(seq: int, threads: int, each: int) -> None:
    """Bit for bit; C picks out one state, so that the output is that state at every token."""
    given = inputs(seq, channels=2, states=1, batch=1)
    ones = torch.ones_like(given.C)
    given = ScanInputs(given.u, given.dt, given.A, given.B, ones, torch.zeros(2), given.state)
    output, last = scan(given, BLOCKED)
    a = torch.exp(given.dt * given.A[:, 0])[0].numpy()
    b = (given.dt * given.u * given.B)[0].numpy()
    assert given.state is not None
    for channel in range(2):
        running = (np.float32(1), given.state[0, channel, 0].numpy())
        expected: list = []
        for start in range(0, seq, threads * each):
            steps = list(zip(a[start:, channel], b[start:, channel], strict=True))
            found, running = one_chunk(steps[: threads * each], running, threads, each)
            expected += found
        np.testing.assert_array_equal(output[0, :, channel].numpy(), np.float32(expected[:seq]))
        assert last[0, channel, 0] == float(running[1])


def test_the_two_orders_differ_by_rounding_alone() -> None:
    given = inputs(512, channels=48, states=16)
    one, other = scan(given, SEQUENTIAL)[0], scan(given, BLOCKED)[0]
    assert not torch.equal(one, other)
    assert float((one - other).norm() / one.norm()) < 1e-6
