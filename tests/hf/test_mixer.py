"""What is seen inside Mamba and Mamba2, against sequential computations of our own."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.mamba import modeling_mamba

import tensortap

MIXER = "layers.1.mixer"
SCAN = f"{MIXER}.scan/forward"
CONV = f"{MIXER}.conv/forward"


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def parameter(model: Any, name: str) -> np.ndarray:
    return array(model.get_parameter(f"backbone.layers.1.mixer.{name}"))


def mamba_scan(
    model: Any, u: np.ndarray, dt: np.ndarray, b: np.ndarray, c: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sequential selective scan in float64, before gating; `batch channel seq`, A per channel."""
    a, skip = -np.exp(parameter(model, "A_log")), parameter(model, "D")
    step = softplus(dt + parameter(model, "dt_proj.bias")[:, None])
    out = np.empty_like(u)
    for t in range(u.shape[-1]):
        decay = np.exp(step[:, :, t, None] * a)
        state = decay * state + (step[:, :, t] * u[:, :, t])[..., None] * b[:, None, :, t]
        out[:, :, t] = (state * c[:, None, :, t]).sum(-1) + skip * u[:, :, t]
    return out, state


def mamba2_scan(
    model: Any, u: np.ndarray, dt: np.ndarray, b: np.ndarray, c: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sequential scan of Mamba2 in float64; `batch seq head dim`, one A per head."""
    a, skip = -np.exp(parameter(model, "A_log")), parameter(model, "D")
    step = softplus(dt + parameter(model, "dt_bias"))
    repeats = u.shape[2] // b.shape[2]
    b, c = b.repeat(repeats, axis=2), c.repeat(repeats, axis=2)
    out = np.empty_like(u)
    for t in range(u.shape[1]):
        decay = np.exp(step[:, t] * a)[..., None, None]
        taken = (step[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None, :]
        state = decay * state + taken
        out[:, t] = (state * c[:, t, :, None, :]).sum(-1) + skip[:, None] * u[:, t]
    return out, state


def scanned(mixer: str, model: Any, found: Any, state: Any = 0.0, index: int = 0) -> Any:
    """Output, before gating, and final state from the captured u, dt, B and C."""
    u, dt, b, c = (array(found(f"{SCAN}/{t}", index)) for t in ("u", "dt", "B", "C"))
    if mixer == "mamba":
        if u.ndim == 2:  # A decoding step has no axis of time.
            u, dt, b, c = (x[..., None] for x in (u, dt, b, c))
        return mamba_scan(model, u, dt, b, c, np.broadcast_to(state, (*u.shape[:2], b.shape[1])))
    if u.ndim == 3:
        u, dt, b, c = u[:, None], dt[:, None, :, 0], b[:, None], c[:, None]
    shape = (u.shape[0], *u.shape[2:], b.shape[-1])
    return mamba2_scan(model, u, dt, b, c, np.broadcast_to(state, shape))


def gate(mixer: str, found: Any, index: int = 0) -> np.ndarray:
    """What Mamba multiplies its scan with; Mamba2 does that later, in its norm."""
    if mixer == "mamba2":
        return np.ones(())
    projected = array(found(f"{MIXER}.in_proj/forward/output", index))
    return silu(projected[..., projected.shape[-1] // 2 :]).swapaxes(1, 2)


def test_the_scan_equals_a_sequential_one(mixer: str, build: Any, capture: Any) -> None:
    model = build(mixer)
    found = capture(model)
    output, state = scanned(mixer, model, found)
    seen = array(found(f"{SCAN}/output"))
    np.testing.assert_allclose(seen, output * gate(mixer, found), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(array(found(f"{SCAN}/state")), state, rtol=1e-4, atol=1e-6)


def test_the_convolution_equals_one_by_hand(mixer: str, build: Any, capture: Any) -> None:
    model = build(mixer)
    found = capture(model)
    taken = array(found(f"{CONV}/input"))
    weight, bias = parameter(model, "conv1d.weight")[:, 0], parameter(model, "conv1d.bias")
    width = weight.shape[1]
    padded = np.pad(taken, ((0, 0), (0, 0), (width - 1, 0)))
    shifted = [padded[:, :, t : t + taken.shape[2]] * weight[:, t, None] for t in range(width)]
    expected = silu(sum(shifted) + bias[:, None])
    np.testing.assert_allclose(array(found(f"{CONV}/output")), expected, rtol=1e-4, atol=1e-6)


def test_the_convolution_reads_the_projection(mixer: str, build: Any, capture: Any) -> None:
    model = build(mixer)
    found = capture(model)
    channels = model.backbone.layers[1].mixer.conv1d.in_channels
    start = 0 if mixer == "mamba" else model.backbone.layers[1].mixer.intermediate_size
    projected = found(f"{MIXER}.in_proj/forward/output")[..., start : start + channels]
    assert torch.equal(found(f"{CONV}/input"), projected.mT)


def test_gradients_of_the_scan_equal_autograd(mixer: str, build: Any, capture: Any) -> None:
    """The gradient of B, summed over what reads it, through a scan of our own in float64."""
    model = build(mixer)
    found = capture(model)
    u, dt, b, c = (found(f"{SCAN}/{t}").double() for t in ("u", "dt", "B", "C"))
    leaves = [t.requires_grad_() for t in (u, dt, b, c)]
    output = torch_scan(mixer, model, found, *leaves)
    upstream = found(f"{MIXER}.scan/backward/grad_output").double()
    expected = torch.autograd.grad(output, leaves, upstream)
    for tensor, gradient in zip(("u", "dt", "B", "C"), expected, strict=True):
        seen = found(f"{MIXER}.scan/backward/grad_{tensor}").double()
        torch.testing.assert_close(seen, gradient, rtol=1e-3, atol=1e-8)


def torch_scan(mixer: str, model: Any, found: Any, *leaves: torch.Tensor) -> torch.Tensor:
    u, dt, b, c = leaves
    module = model.backbone.layers[1].mixer
    a, skip = -module.A_log.double().exp(), module.D.double()
    if mixer == "mamba":
        u, dt, b, c = u.mT, dt.mT, b.mT, c.mT  # Time second, as in Mamba2.
        step = nn.functional.softplus(dt + module.dt_proj.bias.double())[..., None]
        b, c, skip = b[:, :, None], c[:, :, None], skip
    else:
        step = nn.functional.softplus(dt + module.dt_bias.double())[..., None, None]
        repeats = u.shape[2] // b.shape[2]
        b, c = (t.repeat_interleave(repeats, dim=2)[:, :, :, None] for t in (b, c))
        a, skip = a[:, None, None], skip[:, None]
    state, outputs = torch.zeros(()), []
    for t in range(u.shape[1]):
        state = (step[:, t] * a).exp() * state + step[:, t] * u[:, t, ..., None] * b[:, t]
        outputs.append((state * c[:, t]).sum(-1) + skip * u[:, t])
    stacked = torch.stack(outputs, dim=1)
    if mixer == "mamba2":
        return stacked
    projected = found(f"{MIXER}.in_proj/forward/output").double()
    z = projected[..., projected.shape[-1] // 2 :]
    return (stacked * nn.functional.silu(z)).mT


def test_decoding_steps_go_on_from_the_captured_state(
    mixer: str, build: Any, captured: Any
) -> None:
    model = build(mixer).eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3)
    found = captured(sink)
    state = array(found(f"{SCAN}/state"))
    for index in (1, 2):
        output, state = scanned(mixer, model, found, state, index)
        seen = array(found(f"{SCAN}/output", index))
        expected = (output * gate(mixer, found, index)).reshape(seen.shape)
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            array(found(f"{SCAN}/state", index)), state, rtol=1e-4, atol=1e-6
        )


def test_decoding_records_the_axes_it_has(mixer: str, build: Any, captured: Any) -> None:
    model = build(mixer).eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, min_new_tokens=2)
    prefill, decode = (record.dims for record, _ in sink.find(f"{SCAN}/u"))
    long, short = ("batch channel seq", "batch channel")
    if mixer == "mamba2":
        long, short = ("batch seq head dim", "batch head dim")
    assert (prefill, decode) == (long, short)
    for record in sink.records:
        if record.name.module.startswith(MIXER + ".") and record.dims:
            axes = record.dims.replace("(head dim)", "heads").split()
            assert len(axes) == len(record.shape), record.name


def test_tapping_a_mixer_changes_no_bit(mixer: str, build: Any, inputs: Any) -> None:
    model = build(mixer).train()

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(**inputs())
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [output.logits, output.loss, *gradients, torch.get_rng_state()]

    before = step()
    with tensortap.attach(model, tensortap.MemorySink(), values="full", on_error="raise"):
        during = step()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_the_graph_of_a_tapped_mixer_has_no_node_more(mixer: str, build: Any, inputs: Any) -> None:
    def nodes(loss: torch.Tensor) -> int:
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [below for below, _ in node.next_functions]
        return len(seen)

    model = build(mixer).train()
    plain = nodes(model(**inputs()).loss)
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        assert nodes(model(**inputs()).loss) == plain


def test_what_a_mixer_returns_has_the_type_it_had(build: Any) -> None:
    """Asking for the final state must not show in what the caller of the scan gets."""
    model = build("mamba")
    seen = []
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        mixer = model.backbone.layers[1].mixer
        handle = mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(input_ids=torch.tensor([[3, 4, 5]]))
        handle.remove()
    assert [type(value) for value in seen] == [torch.Tensor]


def test_modules_whose_weights_are_handed_on_are_superseded(
    mixer: str, build: Any, capture: Any
) -> None:
    found = capture(build(mixer), backward=False)
    notes = found.notes()
    assert notes[f"{MIXER}.conv1d"] == f"superseded by {MIXER}.conv"
    assert notes[f"{MIXER}.act"] == f"superseded by {MIXER}.conv"
    if mixer == "mamba":
        assert notes[f"{MIXER}.dt_proj"] == f"superseded by {MIXER}.scan"
    assert found.has(f"{MIXER}.conv1d/param/weight")
    assert found.has(f"{MIXER}.norm/forward/output") == (mixer == "mamba2")


def test_a_scan_outside_of_a_tapped_mixer_is_not_seen(build: Any, inputs: Any) -> None:
    tapped, other = build("mamba"), build("mamba")
    sink = tensortap.MemorySink()
    with tensortap.attach(tapped, sink, on_error="raise"):
        tapped(**inputs())
        other(**inputs())
    assert len(sink.find(f"{SCAN}/u")) == 1


def test_two_mamba_models_are_detached_in_any_order(build: Any, inputs: Any) -> None:
    models = [build("mamba"), build("mamba")]
    functions = dict(vars(modeling_mamba))
    sinks = [tensortap.MemorySink(), tensortap.MemorySink()]
    taps = [
        tensortap.attach(model, sink, on_error="raise")
        for model, sink in zip(models, sinks, strict=True)
    ]
    models[0](**inputs())
    taps[0].detach()
    models[1](**inputs())
    taps[1].detach()
    assert [len(sink.find(f"{SCAN}/u")) for sink in sinks] == [1, 1]
    after = dict(vars(modeling_mamba))
    assert after.keys() == functions.keys()
    assert all(after[name] is functions[name] for name in functions)


def test_a_fused_kernel_is_noted_and_its_result_is_used(
    build: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mamba_ssm needs a GPU to build; this stands in for its kernel for a whole mixer."""

    def fake_mamba_inner_fn(xz: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return xz.mT[..., :32]

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", fake_mamba_inner_fn)
    model = build("mamba").train()
    plain = model(**inputs()).loss
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        assert torch.equal(model(**inputs()).loss, plain)
    assert sink.coverage is not None
    notes = {row["name"]: row["reason"] for row in sink.coverage["notes"]}
    assert notes[f"{MIXER}.scan"] == "computed inside the fused kernel fake_mamba_inner_fn"
    assert not sink.find(f"{SCAN}/u")


def test_an_error_inside_a_mixer_leaves_the_next_forward_in_order(build: Any, inputs: Any) -> None:
    model = build("mamba")
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        with pytest.raises(RuntimeError):
            model.backbone.layers[1].mixer(torch.randn(1, 3, 31))
        model(**inputs())
        scan = sys.modules[type(model).__module__].mamba_selective_scan
        u, dt, a = torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.randn(2, 4)
        scan(u, dt, a, torch.randn(1, 4, 3), torch.randn(1, 4, 3))  # Not inside any mixer.
    assert len(sink.find(f"{SCAN}/output")) == 1


def test_a_detach_inside_a_mixer_takes_effect_at_once(build: Any, inputs: Any) -> None:
    model, other = build("mamba"), build("mamba")
    sink = tensortap.MemorySink()
    tap = tensortap.attach(model, sink, on_error="raise")
    inside = model.backbone.layers[1].mixer.in_proj
    handle = inside.register_forward_pre_hook(lambda *_: tap.detach())
    model(**inputs())
    handle.remove()
    model(**inputs())
    other(**inputs())
    assert sink.find("layers.0.mixer.scan/forward/u")
    assert not sink.find(f"{SCAN}/u")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_scan_is_marked(reentrant: bool, mixer: str, build: Any, capture: Any) -> None:
    plain = capture(build(mixer).train())
    model = build(mixer).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = capture(model)
    first, second = (record.at for record, _ in found.sink.find(f"{SCAN}/u"))
    assert (first.recompute, second.recompute) == (False, True)
    for name in (f"{SCAN}/output", f"{MIXER}.scan/backward/grad_B"):
        assert torch.equal(found(name), plain(name))


def test_another_family_with_the_same_functions_is_tapped(build: Any, capture: Any) -> None:
    found = capture(build("falcon_mamba"))
    assert found.has(f"{SCAN}/state")
    assert found.has(f"{MIXER}.conv/backward/grad_input")
