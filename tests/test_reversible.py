"""Attach, run, detach: every object involved, in every library, is what it was before."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import tensortap
from tensortap.testing import snapshot_of

transformers = pytest.importorskip("transformers")

LIBRARIES = ("torch.optim", "torch.nn", "torch.amp", "torch.utils.checkpoint", "transformers.")


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4, expand=2, conv_kernel=4
    )
    return transformers.MambaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def everything():
    """What every loaded module and class of the libraries holds, by identity."""
    found = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and f"{name}.".startswith(LIBRARIES):
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(name, key, k): id(v) for k, v in vars(value).items()}
    return found


def registries():
    """Process-wide tables that a tap may add to."""
    attention = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    return (
        dict(attention._local_mapping),
        dict(attention._global_mapping),
        dict(torch_optimizer._global_optimizer_post_hooks),
        dict(torch_optimizer._global_optimizer_pre_hooks),
    )


@pytest.mark.parametrize("build", [llama, mamba, bert])
def test_detach_leaves_every_object_as_it_was(build):
    model = build()
    ids = torch.randint(0, 64, (2, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(ids)  # Whatever is imported or cached by a first step is there by now.
    with tensortap.attach(build(), tensortap.MemorySink(), select="embed/*") as tap:
        tap.record("a/forward/b", ids)
    before = [snapshot_of(module) for module in model.modules()]
    hooks = [parameter._post_accumulate_grad_hooks for parameter in model.parameters()]
    libraries, tables = everything(), registries()

    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        assert registries() != tables
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert [snapshot_of(module) for module in model.modules()] == before
    assert [parameter._post_accumulate_grad_hooks for parameter in model.parameters()] == hooks
    assert registries() == tables
    after = everything()
    assert {key for key in libraries if after.get(key) != libraries[key]} == set()
