"""NxD alone: its one registry, and the dictionary that a hook takes as well as NxDI's list."""

from __future__ import annotations

import pytest
import torch
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_llama import FakeAttentionOutput
from torch import nn

import tensortap
from tensortap_neuron import traced


class Twice(nn.Module):
    """A model that calls one module two times and gives another keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False), Named()])

    def forward(self, value):
        value = self.layers[0](self.layers[0](value))
        fake_nxd.register_tensor("mine", value)
        return self.layers[1](hidden_states=value, scale=torch.tensor([2.0, 3.0]))


class Named(nn.Module):
    def forward(self, hidden_states, scale):
        return hidden_states * scale, {"kept": hidden_states}


@pytest.fixture
def nxd(monkeypatch):
    fake_nxd.install(monkeypatch)
    return fake_nxd


def written(capture, *dictionaries):
    sink = tensortap.MemorySink()
    with capture.hook(sink) as hook:
        for captured in dictionaries:
            hook(None, captured)
    return sink


def test_the_registry_is_one_and_the_last_model_enabled_has_it(nxd):
    first, second = Twice(), Twice()
    nxd.enable_tensor_capture(first, ["layers.0"])
    nxd.enable_tensor_capture(second, ["layers.1"])
    assert nxd.TensorRegistry.get_instance() is nxd.TensorRegistry.get_instance()
    first(torch.ones(1, 2))
    assert not any(key.startswith("layers.0.") for key in nxd.get_captured_tensors_dict())


def test_a_dictionary_of_nxd_becomes_records_under_the_names_of_the_core(nxd):
    model = Twice()
    manual = ["layers.0/forward/mine"]
    capture = traced.prepare(model, "layers.*/forward/*", manual=manual)
    nxd.enable_tensor_capture(model, **capture.nxd_options())
    value = torch.tensor([[1.0, 2.0]])
    plain = tensortap.MemorySink()
    with tensortap.attach(model, plain, select="layers.1/forward/*", values="full"):
        model(value)
    sink = written(capture, nxd.get_captured_tensors_dict())
    assert {name for name in sink.names() if name.startswith("layers.1/")} == set(plain.names())
    for name in plain.names():
        assert torch.equal(sink.find(name)[0][1], plain.find(name)[0][1])
    weight = model.layers[0].weight
    assert torch.equal(sink.find("layers.0/forward/mine")[0][1], value @ weight.t() @ weight.t())


class Attends(nn.Module):
    """A model whose attention returns the dataclass of NxDI's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()})])

    def forward(self, value):
        return self.layers[0]["self_attn"](hidden_states=value).hidden_states


class Attention(nn.Module):
    def forward(self, hidden_states):
        return FakeAttentionOutput(hidden_states * 2, (), torch.ones(1, 1), torch.zeros(1, 1))


def test_the_output_of_attention_is_the_field_that_holds_it(nxd):
    model = Attends()
    capture = traced.prepare(model, "layers.0.attn/forward/output")
    nxd.enable_tensor_capture(model, **capture.nxd_options())
    model(torch.eye(2))
    assert next(iter(nxd.get_captured_tensors_dict())) == "layers.0.self_attn.outputs.cos_cache"
    sink = written(capture, nxd.get_captured_tensors_dict())
    assert sink.names() == ["layers.0.attn/forward/output"]
    assert torch.equal(sink.find("layers.0.attn/forward/output")[0][1], 2 * torch.eye(2))


def test_a_selected_name_that_nothing_came_for_is_a_gap(nxd):
    select = "layers.0.attn/forward/output"
    capture = traced.prepare(Attends(), select, manual=["a/forward/x"])
    other = {"layers.0.self_attn.outputs.cos_cache": torch.ones(2, 2), "manual_x": torch.ones(2)}
    sink = written(capture, other)
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "layers.0.attn/forward/output"
    assert "NxD has output.cos_cache of the module, and no output" in gap["reason"]
    every = traced.prepare(Attends(), f"{select}*", manual=["a/forward/x"])
    sink = written(every, other)
    assert sink.names() == ["a/forward/x", "layers.0.attn/forward/output.cos_cache"]
    assert sink.coverage["complete"]


def test_of_a_module_called_twice_the_registry_has_the_last_call(nxd):
    model = Twice()
    capture = traced.prepare(model, "layers.0/forward/output")
    nxd.enable_tensor_capture(model, **capture.nxd_options())
    model(torch.eye(2))
    [(_, payload)] = written(capture, nxd.get_captured_tensors_dict()).find(
        "layers.0/forward/output"
    )
    weight = model.layers[0].weight.detach()
    torch.testing.assert_close(payload, (weight @ weight).t())


def test_after_a_second_bucket_of_a_cleared_registry_the_gap_is_named(nxd):
    """`registry.clear()` at the end of a forward forgets which modules were asked for."""
    model = Twice()
    capture = traced.prepare(model, "layers.0/forward/output")
    nxd.enable_tensor_capture(model, **capture.nxd_options())
    model(torch.ones(1, 2))
    first = dict(nxd.get_captured_tensors_dict())
    nxd.TensorRegistry.get_instance().clear()
    model(torch.ones(1, 2))
    sink = written(capture, first, dict(nxd.get_captured_tensors_dict()))
    assert len(sink.find("layers.0/forward/output")) == 1
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "layers.0/forward/output"
    assert "registry was cleared after another bucket" in gap["reason"]
    assert any(name.startswith("manual/forward/layers.0") for name in sink.names())


def test_modules_nxd_does_not_know_are_its_error_and_ours_comes_first(nxd):
    model = Twice()
    with pytest.raises(ValueError, match=r"\['layers\.7'\]"):
        nxd.enable_tensor_capture(model, ["layers.7"])
    with pytest.raises(tensortap.SelectionError, match=r"Closest: layers\.1/forward/output"):
        traced.prepare(model, "layers.7/forward/output")


def test_what_is_registered_under_one_name_twice_keeps_both(nxd):
    capture = traced.prepare(Twice(), "layers.0/forward/output", manual=["a/forward/x"])
    captured = {"layers.0.outputs": torch.rand(2, 2), "manual_mine": torch.zeros(2)}
    captured["manual_mine_1"] = torch.ones(2)
    sink = written(capture, captured)
    assert sink.find("a/forward/x")[0][1].tolist() == [0, 0]
    assert sink.find("manual/forward/mine_1")[0][1].tolist() == [1, 1]


def test_what_was_to_be_registered_and_was_not_is_a_gap(nxd):
    capture = traced.prepare(Twice(), "layers.0/forward/output", manual=["a/forward/x"])
    sink = written(capture, {"layers.0.outputs": torch.rand(2, 2)})
    assert [gap["name"] for gap in sink.coverage["gaps"]] == ["a/forward/x"]
