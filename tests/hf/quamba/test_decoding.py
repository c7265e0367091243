"""Padding and decoding: a cache holds codes, and steps go on from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensortap
from tensortap_hf import modes


def cached(model: Any, ids: torch.Tensor, *cuts: int) -> tuple[torch.Tensor, Any]:
    """Logits of a sequence given piece by piece, and the cache after it."""
    cache, pieces, start = None, [], 0
    for end in (*cuts, ids.shape[1]):
        output = model(ids[:, start:end], cache_params=cache, use_cache=True)
        cache = output.cache_params
        pieces.append(output.logits)
        start = end
    return torch.cat(pieces, dim=1), cache


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(20,), (2,), (20, 21, 22), (1, 2, 3, 30)])
def test_the_float_mode_in_pieces_is_the_whole(cuts: tuple[int, ...], calibrated: Any) -> None:
    model, _, ids = calibrated
    with modes.apply(model, "fp32", family="quamba"):
        whole = model(ids, use_cache=False).logits
        assert relative(cached(model, ids, *cuts)[0], whole) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(20,), (20, 21, 22)])
def test_an_int8_mode_in_pieces_differs_by_its_stored_state(
    cuts: tuple[int, ...], calibrated: Any
) -> None:
    """Within a forward the state is float32; only what is stored between two is int8."""
    model, scales, ids = calibrated
    with modes.apply(model, "2-1", family="quamba", calibration=scales):
        whole = model(ids, use_cache=False).logits
        pieces, cache = cached(model, ids, *cuts)
        assert torch.equal(pieces[:, : cuts[0]], whole[:, : cuts[0]])
        assert 0 < relative(pieces, whole) < 0.1
        assert cache.layers[0].recurrent_states[0].dtype == torch.int8
        assert cache.layers[0].conv_states[0].dtype == torch.int8


@torch.no_grad()
def test_a_step_goes_on_from_the_recorded_state(calibrated: Any) -> None:
    model, scales, ids = calibrated
    sink = tensortap.MemorySink()
    with modes.apply(model, "0", family="quamba", calibration=scales):
        with tensortap.attach(model, sink, values="full", on_error="raise"):
            _, cache = cached(model, ids, 20)
    states = [payload for _, payload in sink.find("layers.1.mixer.scan/forward/state")]
    assert len(states) == 2
    assert torch.equal(cache.layers[1].recurrent_states[0], states[1])


@torch.no_grad()
def test_every_mode_generates(mode: str, calibrated: Any) -> None:
    model, scales, ids = calibrated
    with modes.apply(model, mode, family="quamba", calibration=scales):
        found = model.generate(ids[:, :8], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        cache, token, expected = None, ids[:, :8], ids[:, :8]
        for _ in range(5):
            output = model(token, cache_params=cache, use_cache=True)
            cache, token = output.cache_params, output.logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, token], dim=1)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_left_padding_changes_nothing(mode: str, calibrated: Any, samples: Any) -> None:
    """A shorter sequence beside a longer one is what it is alone, up to the order of its scan."""
    model, scales, _ = calibrated
    [short] = samples(30, seed=5)
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), short], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :10] = 0
    with modes.apply(model, mode, family="quamba", calibration=scales):
        alone = model(short, use_cache=False).logits
        beside = model(padded, attention_mask=mask, use_cache=False).logits[:, 10:]
    # The absmax of mode 3 is that of the same values: the padding is zeros.
    assert relative(beside, alone) < (1e-5 if mode == "fp32" else 5e-3)


@torch.no_grad()
def test_a_sequence_of_a_batch_is_the_sequence_alone(
    mode: str, calibrated: Any, samples: Any
) -> None:
    """But in mode 3, whose dynamic scale is that of the batch."""
    model, scales, _ = calibrated
    batch = torch.cat(samples(16, 16, seed=6))
    with modes.apply(model, mode, family="quamba", calibration=scales):
        together = model(batch, use_cache=False).logits
        apart = torch.cat([model(one[None], use_cache=False).logits for one in batch])
    if mode == "3":
        assert relative(together, apart) < 0.1
    else:
        assert relative(together, apart) < 1e-6
