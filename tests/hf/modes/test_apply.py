"""A model goes into a mode and comes out of it as it was, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.hf.modes.conftest import shifting
from torch import nn

import tensortap
from tensortap.errors import AlreadyAttached, ConfigError, NotSupported
from tensortap_hf import modes
from tensortap_hf.modes import Changes, Mode

MODES = ("fp32", "fp16", "bf16", "int8", "hifp8", "mxfp8", "mxfp4", "nvfp4")


def everything(model: nn.Module) -> dict[str, Any]:
    """Values and addresses of all tensors, and the attributes of all modules."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path} attributes"] = {k for k in vars(module) if not k.startswith("_")}
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    found[f"{path}.{key}"] = (tensor.clone(), tensor.data_ptr(), tensor.dtype)
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, tuple):
            assert torch.equal(value[0], after[key][0])
            assert value[1:] == after[key][1:]
        else:
            assert value == after[key]


@pytest.mark.parametrize("mode", MODES)
def test_undone_bitwise(family: str, mode: str, build: Any) -> None:
    model = build(family).eval()
    dtype, before = model.config.dtype, everything(model)
    with modes.apply(model, mode, family="generic"):
        pass
    assert_same(before, everything(model))
    assert model.config.dtype == dtype
    assert modes.state_of(model) is None


@pytest.mark.parametrize("mode", MODES)
def test_the_model_computes_differently_inside_and_as_ever_afterwards(
    mode: str, build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("llama")
    before = logits(model)
    with modes.apply(model, mode):
        assert torch.equal(logits(model), before) == (mode == "fp32")
    assert torch.equal(logits(model), before)


def test_the_handle_works_without_a_block_and_twice(build: Any) -> None:
    model = build("gpt2")
    before = everything(model)
    applied = modes.apply(model, "mxfp4")
    assert applied.mode.title == "generic/mxfp4"
    assert "8 modules changed" in repr(applied)
    applied.remove()
    applied.remove()
    assert_same(before, everything(model))


def test_a_model_is_in_one_mode_at_a_time(build: Any) -> None:
    model = build("llama")
    with modes.apply(model, "int8"):
        for part in (model, model.model, model.model.layers[0]):
            with pytest.raises(AlreadyAttached, match="in mode generic/int8 already"):
                modes.apply(part, shifting("odd", "generic", 1))
    with modes.apply(model.model, "int8"), pytest.raises(AlreadyAttached):
        modes.apply(model, "bf16")
    modes.apply(model, "bf16").remove()


def test_a_mode_that_fails_half_way_leaves_nothing(build: Any) -> None:
    model = build("llama")
    before = everything(model)

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        undo.replace(model.model.norm, "forward", lambda x: x)
        modes.get("bf16", "generic").apply(model, undo, options)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        modes.apply(model, Mode("bad", "generic", "fails", apply))
    assert_same(before, everything(model))
    assert modes.state_of(model) is None


def test_a_mode_that_needs_calibration_says_so(build: Any) -> None:
    needy = shifting("needy", "generic", 1, needs_calibration=True)
    with pytest.raises(ConfigError, match=r"generic/needy needs calibration="):
        modes.apply(build("llama"), needy)


def test_calibration_reaches_the_mode_as_it_is_given(build: Any) -> None:
    seen = []

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        seen.append(options.calibration)
        return Changes()

    samples = [torch.ones(1, 3), torch.ones(1, 5)]
    mode = Mode("needy", "generic", "looks", apply, needs_calibration=True)
    with modes.apply(build("llama"), mode, calibration=samples):
        assert seen == [samples]


def test_excluded_modules_keep_their_precision(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("llama")
    with modes.apply(model, "mxfp4", exclude="layers.0.*,layers.1.attn.*") as applied:
        assert set(applied.changes.changed) == {f"layers.1.mlp.{w}" for w in ("gate", "up", "down")}
        assert applied.changes.kept["layers.0.attn.q"] == "excluded"
    with pytest.raises(ConfigError, match="takes no exclude"):
        modes.apply(model, "bf16", exclude="layers.0.*")
    with pytest.raises(NotSupported, match="no linear layer to quantise"):
        modes.apply(model, "mxfp4", exclude="*")


def test_an_exclusion_that_matches_nothing_is_an_error(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers\.9.*matches no linear layer.*layers\.1"):
        modes.apply(build("llama"), "mxfp4", exclude="layers.0.*,layers.9.*")


def test_a_run_says_which_mode_it_shows_and_what_was_changed(build: Any, inputs: Any) -> None:
    model, sink = build("gpt2").eval(), tensortap.MemorySink()
    with (
        modes.apply(model, "mxfp4"),
        tensortap.attach(model, sink, select="layers.*", metadata={"prompt": "hello"}),
        torch.no_grad(),
    ):
        model(**inputs())
    assert sink.run is not None
    assert (sink.run.mode, sink.run.format) == ("mxfp4", "mxfp4")
    said = sink.run.metadata["mode"]
    assert (said["name"], said["family"], said["basis"]) == ("mxfp4", "generic", "native")
    assert "layers.0.attn.qkv" in said["changed"]
    assert said["kept"]["lm_head"] == "the output layer stays in the precision of the model"
    assert sink.run.metadata["prompt"] == "hello"


def test_a_run_without_a_mode_says_nothing_of_modes(build: Any, inputs: Any) -> None:
    model, sink = build("gpt2"), tensortap.MemorySink()
    with tensortap.attach(model, sink, select="layers.*"):
        model(**inputs())
    assert sink.run is not None
    assert sink.run.mode is None
    assert "mode" not in sink.run.metadata


def test_a_wrapped_model_is_the_model_inside(build: Any) -> None:
    model = build("llama")
    with modes.apply(torch.nn.DataParallel(model, device_ids=[]), "int8") as applied:
        assert modes.state_of(model) is not None
        assert applied.changes.changed[0] == "layers.0.attn.q"


def test_a_copy_of_a_quantised_model_is_not_quantised(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("gpt2")
    before = logits(model)
    with modes.apply(model, "mxfp4"):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(copied), before)
            assert modes.state_of(copied) is None


def test_modes_do_not_keep_models_alive(build: Any) -> None:
    import gc
    import weakref

    model = build("gpt2")
    modes.apply(model, "mxfp4").remove()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_gradients_from_before_wait_until_the_cast_is_undone(build: Any, inputs: Any) -> None:
    model = build("llama")
    model(**inputs()).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.grad
    with modes.apply(model, "bf16"):
        assert weight.grad is None
        model(**inputs()).loss.backward()
        assert weight.grad.dtype is torch.bfloat16
    assert weight.grad is before
