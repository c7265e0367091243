"""Calibration: what is observed, how samples are kept apart, and that the model stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensortap.errors import AlreadyAttached, ConfigError, NotSupported
from tensortap_hf import modes, quamba
from tensortap_hf.quamba import hadamard

MIXER = "layers.1.mixer"


def absmax(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def test_scales_are_what_the_unrotated_model_shows(mamba: Any, samples: Any, seen: Any) -> None:
    """Channels are in no basis: the model as it was loaded has the same maxima."""
    model, ids = mamba(), samples(40, 13, 27)
    scales = quamba.calibrate(model, ids, percentile_alpha=0.99).layers[1]
    shown = [seen(model, sample) for sample in ids]

    def maximum(name: str) -> float:
        return max(absmax(one(f"{MIXER}.{name}")) for one in shown)

    for found, expected in {
        scales.in_proj_output: maximum("in_proj/forward/output"),
        scales.x_proj_output: maximum("x_proj/forward/output"),
        scales.dt_proj_output: maximum("scan/forward/dt"),
    }.items():
        assert found == pytest.approx(expected / 127, rel=1e-5)
    h = hadamard.matrix(48).numpy()
    outputs = [one(f"{MIXER}.out_proj/forward/input").double().numpy() for one in shown]
    expected = max(np.abs(y @ h).max() for y in outputs)
    assert scales.out_proj_input == pytest.approx(expected / 127, rel=1e-5)


def test_the_input_of_in_proj_is_the_turned_norm_without_its_weight(
    mamba: Any, samples: Any, seen: Any
) -> None:
    model, ids = mamba(), samples(20, 31)
    scales = quamba.calibrate(model, ids).layers[1]
    largest = 0.0
    for sample in ids:
        x = seen(model, sample)("layers.1/forward/input").double().numpy()
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.layer_norm_epsilon)
        largest = max(largest, np.abs(normed @ hadamard.matrix(24).numpy()).max())
    assert scales.in_proj_input == pytest.approx(largest / 127, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.9, 0.9995])
def test_u_and_the_state_are_clipped_at_a_quantile(
    alpha: float, mamba: Any, samples: Any, seen: Any
) -> None:
    model, ids = mamba(), samples(40, 13, 27)
    scales = quamba.calibrate(model, ids, percentile_alpha=alpha).layers[1]
    for found, name in (
        (scales.x_proj_input, "x_proj/forward/input"),
        (scales.ssm_state, "scan/forward/state"),
    ):
        first, *later = (
            np.quantile(np.abs(seen(model, sample)(f"{MIXER}.{name}").double().numpy()), alpha)
            for sample in ids
        )
        for current in later:
            first += 0.01 * (current - first)
        assert found == pytest.approx(first / 127, rel=1e-4)


def test_unequal_samples_are_never_padded_together(mamba: Any, samples: Any) -> None:
    """The scales of maxima are those of the sample that has the larger one, each by itself."""
    model, (short, long) = mamba(), samples(5, 60)
    both, one, other = (quamba.calibrate(model, ids) for ids in ([short, long], [short], [long]))
    assert both.sample_lengths == (5, 60)
    for layer in range(2):
        for name in ("in_proj_input", "in_proj_output", "x_proj_output", "out_proj_input"):
            alone = max(getattr(x.layers[layer], name) for x in (one, other))
            assert getattr(both.layers[layer], name) == alone


def test_a_sample_may_be_a_list_a_row_or_a_batch_of_one(mamba: Any) -> None:
    model, ids = mamba(), [5, 6, 7, 8]
    found = {
        quamba.calibrate(model, [sample])
        for sample in (ids, torch.tensor(ids), torch.tensor([ids]))
    }
    assert len(found) == 1


def test_the_model_is_left_as_it_was(mamba: Any, samples: Any) -> None:
    model = mamba()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    quamba.calibrate(model, samples(9))
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, copy) for name, (p, copy) in before.items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_the_model_is_left_as_it_was_when_a_sample_fails(mamba: Any, samples: Any) -> None:
    model = mamba()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def interrupted(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quamba.calibrate(model, samples(9, 9), progress=interrupted)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_progress_counts_samples(mamba: Any, samples: Any) -> None:
    seen: list[int] = []
    quamba.calibrate(mamba(), samples(4, 5, 6), progress=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "at least one sample"),
        ([[]], "sample 0"),
        ([[1, 2], [[1, 2], [3, 4]]], "sample 1 .* never put together"),
        ([[1.5, 2.0]], "token ids"),
        ([[1, 64]], "vocabulary ends at 63"),
        ([[-1]], "from -1"),
        (["text"], "sample 0 is no tensor of token ids"),
        ([[[1, 2], [3]]], "sample 0 is no tensor of token ids"),
        ([[True]], "token ids"),
    ],
)
def test_samples_that_are_none_are_named(given: Any, reason: str, mamba: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        quamba.calibrate(mamba(), given)


@pytest.mark.parametrize("alpha", [0.0, 1.5, -1])
def test_a_quantile_outside_of_the_range_is_refused(alpha: float, mamba: Any) -> None:
    with pytest.raises(ConfigError, match="percentile alpha"):
        quamba.calibrate(mamba(), [[1, 2]], percentile_alpha=alpha)


def test_a_model_in_a_mode_is_not_calibrated(mamba: Any) -> None:
    model = mamba()
    with modes.apply(model, "fp32", family="quamba"), pytest.raises(AlreadyAttached):
        quamba.calibrate(model, [[1, 2]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_have_no_scale_are_named(value: float, mamba: Any) -> None:
    """A maximum over samples would swallow a NaN."""
    model = mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight[0, 0] = value
    with pytest.raises(ConfigError, match=r"layers\.1\.mixer has NaN or infinite .*x_proj output"):
        quamba.calibrate(model, [[1, 2, 3]])
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_whose_forwards_are_replaced_is_refused(mamba: Any) -> None:
    model = mamba()
    mixer = model.backbone.layers[0].mixer
    mixer.forward = lambda *args: mixer(*args)
    with pytest.raises(NotSupported, match="device_map"):
        quamba.calibrate(model, [[1, 2, 3]])
