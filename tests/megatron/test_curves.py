"""What formats do to a training run: its loss curve, and each layer's signal to noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.megatron import quantize_layers as built
from tests.megatron.quantize_oracle import on_grid

import tensortap
from tensortap_megatron import quantize

pytestmark = pytest.mark.xdist_group("megatron-curves")

TEXT = Path(__file__).parents[2] / "examples" / "train_llama" / "constitution.txt"
STEPS, SEQ, BATCH = 50, 64, 4
FORMATS = ("bf16", "hifp8", "mxfp8", "mxfp4")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def batches() -> Iterator[dict[str, Any]]:
    """The same stretches of the text for every format, bytes as tokens."""
    text = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(7)
    inputs = built.batch(SEQ, BATCH)
    while True:
        starts = torch.randint(0, len(text) - SEQ - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + SEQ + 1] for start in starts.tolist()])
        yield {**inputs, "input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def curve(format: str | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses of 50 steps from the same weights, in float32 or fake-quantised."""
    model = built.gpt()
    # At three times this rate training is unsteady: any rounding at all becomes another run.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with quantize(model, format) if format else nullcontext():
        for _, inputs in zip(range(STEPS), batches(), strict=False):
            losses.append(built.gradients(model, **inputs)["losses"].mean().item())
            optimizer.step()
    return np.array(losses)


def test_loss_curves_depart_from_float32_in_the_order_of_the_formats_precision() -> None:
    """Relative steps: bf16 2^-8; hifp8 and mxfp8 2^-4 at best; mxfp4 2^-2."""
    exact = curve(None)
    apart = {format: float(np.abs(curve(format) - exact).mean()) for format in FORMATS}
    assert exact[-5:].mean() < 0.75 * exact[0]
    assert 0 < apart["bf16"] < min(apart["hifp8"], apart["mxfp8"])
    assert max(apart["hifp8"], apart["mxfp8"]) < apart["mxfp4"]
    # Four more bits of mantissa are far apart; one binade of range is not.
    assert 4 * apart["bf16"] < apart["mxfp8"]


def decibels(signal: Any, quantised: Any) -> float:
    return float(10 * np.log10((signal**2).sum() / ((signal - quantised) ** 2).sum()))


def by_numpy(signal: Any, format: str) -> Any:
    if format == "bf16":
        return signal.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return on_grid(signal, format, -1)


@pytest.mark.parametrize("format", FORMATS)
def test_the_signal_to_noise_of_every_layer_at_step_0_is_that_of_numpy(
    format: str, tmp_path: Path
) -> None:
    model = built.gpt()
    with quantize(model, format), tensortap.attach(model, tmp_path / "run", values="full"):
        built.gradients(model, **next(batches()))
    run = tensortap.open_run(tmp_path / "run")
    assert run.info.format == format
    found = {}
    for name in run.names():
        if not name.endswith("/forward/input_quantized"):
            continue
        module = name.partition("/")[0]
        for used, raw in (
            ("forward/input_quantized", "forward/input"),
            ("forward/weight", "param/weight"),
        ):
            signal, quantised = (
                run.tensor(f"{module}/{tensor}", step=0).double().numpy() for tensor in (raw, used)
            )
            found[module, used] = decibels(signal, quantised)
            expected = decibels(signal, by_numpy(signal, format))
            assert found[module, used] == pytest.approx(expected, abs=1e-6), (module, used)
            [record] = run.records(f"{module}/{used}")
            assert record.format is not None
            assert record.format.name == format
    assert len(found) == 2 * 2 * 4  # input and weight, of four linears in two layers
    low, high = {"bf16": (50, 60), "hifp8": (22, 36), "mxfp8": (25, 36), "mxfp4": (12, 22)}[format]
    assert all(low < value < high for value in found.values()), found
