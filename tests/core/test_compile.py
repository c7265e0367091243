"""torch.compile: captured when attached before the first call, else refused."""

from __future__ import annotations

import pytest
import torch
from tests.core.models import Mlp, Stack

import tensortap

X = torch.randn(2, 8)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("when", ["before compile", "after compile", "in place"])
def test_a_model_attached_before_its_first_compiled_call_is_captured(when):
    torch.manual_seed(0)
    model = Stack().eval()
    plain = tensortap.MemorySink()
    with tensortap.attach(model, plain, values="full", on_error="raise"):
        model(X).sum().backward()
    model.zero_grad()
    sink = tensortap.MemorySink()
    compiled = torch.compile(model, backend="aot_eager") if when == "after compile" else model
    with tensortap.attach(compiled, sink, values="full", on_error="raise"):
        if when == "before compile":
            compiled = torch.compile(model, backend="aot_eager")
        if when == "in place":
            model.compile(backend="aot_eager")
        compiled(X).sum().backward()
    assert sink.names() == plain.names()
    for name in plain.names():
        for (_, expected), (_, found) in zip(plain.find(name), sink.find(name), strict=True):
            assert torch.allclose(found, expected, atol=1e-6), name


def test_attaching_after_the_first_compiled_call_is_refused():
    model = Mlp()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with tensortap.attach(other := Mlp(), tensortap.MemorySink()):
        other(X)
    with pytest.raises(tensortap.NotSupported, match="Attach before the first call"):
        tensortap.attach(model, tensortap.MemorySink())
    torch.compiler.reset()
    with tensortap.attach(model, sink := tensortap.MemorySink(), on_error="raise"):
        model(X)
    assert sink.records


def test_a_graph_that_swallowed_the_model_is_an_error_not_an_empty_run():
    model = Mlp()

    @torch.compile(backend="eager")
    def step(x):
        return model(x)

    step(X)
    tap = tensortap.attach(model, tensortap.MemorySink())
    step(X)
    with pytest.raises(tensortap.CaptureError, match=r"torch\.compile had made before"):
        tap.detach()


def test_gradients_alone_do_not_make_a_swallowed_model_look_captured():
    model = Mlp()
    step = torch.compile(lambda x: model(x).sum(), backend="eager")
    step(X).backward()
    tap = tensortap.attach(model, tensortap.MemorySink())
    step(X).backward()
    with pytest.raises(tensortap.CaptureError, match=r"torch\.compile had made before"):
        tap.detach()


def test_fullgraph_is_refused_with_the_reason():
    model = Mlp()
    tap = tensortap.attach(model, tensortap.MemorySink())
    with pytest.raises(Exception, match=r"tensortap reads tensors here.*without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(X)
    model(X)
    tap.detach()


def test_torchscript_is_refused():
    with pytest.raises(tensortap.NotSupported, match="TorchScript"):
        tensortap.attach(torch.jit.script(torch.nn.Linear(2, 2)), tensortap.MemorySink())
