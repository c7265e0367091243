"""selfcheck compares the tap on with the tap off and leaves the model as it was."""

from __future__ import annotations

import torch
from tests.core.models import Stack
from torch import nn

import tensortap


def test_a_plain_model_is_bitwise_equal_under_the_tap(capsys):
    model, x = Stack(), torch.randn(3, 8)
    model.layers[0].up.weight.grad = torch.full_like(model.layers[0].up.weight, 3.0)
    state = torch.get_rng_state()
    result = tensortap.selfcheck(model, x)
    assert result.identical
    assert result.ulp == {}
    assert result.records > 40
    assert result.overhead > 0
    assert "bitwise equal" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layers[0].up.weight.grad.eq(3).all()
    assert model.layers[1].up.weight.grad is None


def test_a_model_that_reacts_to_being_watched_is_reported_in_ulp():
    class Shy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            watched = bool(self.inner._forward_hooks)
            return self.inner(torch.nextafter(x, x + 1) if watched else x)

    result = tensortap.selfcheck(Shy(), (torch.ones(4),))
    assert not result.identical
    assert result.ulp == {"output": 1.0}


def test_buffers_changed_by_a_forward_are_restored():
    model = nn.Sequential(nn.BatchNorm1d(4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert tensortap.selfcheck(model, {"input": torch.randn(8, 4)}).identical
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
