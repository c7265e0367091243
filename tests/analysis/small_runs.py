"""Small real models whose runs are compared, with an error put in at one module."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

import tensortap


def llama():
    transformers = __import__("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=False, initializer_range=0.2, attn_implementation="eager",
        use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def capture(model, path, *, dtype=torch.float32, broken=(), steps=1, **options):
    """A run of `steps` backward passes on fixed tokens; `broken` are context managers of a model.

    The model is copied: a run never changes what the next one starts from.
    """
    model = copy.deepcopy(model).to(dtype)
    tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    options = {"values": "full", "on_error": "raise"} | options
    with ExitStack() as stack:
        for break_it in broken:
            stack.enter_context(break_it(model))
        with tensortap.attach(model, path, **options) as tap:
            for _ in range(steps):
                model(input_ids=tokens, labels=tokens).loss.backward()
                tap.step()
    return path


def noisy_output(module, size=0.05):
    """Adds noise of `size` times its own spread to what a module returns."""

    def break_it(model):
        generator = torch.Generator().manual_seed(2)

        def add(owner, args, output):
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output + size * output.detach().std() * noise

        return _hooked(model.get_submodule(module).register_forward_hook(add))

    return break_it


def noisy_gradient(module, size=0.05):
    """The same of the gradient that a module receives in the backward pass."""

    def break_it(model):
        generator = torch.Generator().manual_seed(2)

        def add(gradient):
            noise = torch.randn(gradient.shape, generator=generator)
            return gradient + size * gradient.std() * noise

        def watch(owner, args, output):
            output.register_hook(add)

        return _hooked(model.get_submodule(module).register_forward_hook(watch))

    return break_it


def nan_output(module):
    """One NaN in what a module returns."""

    def break_it(model):
        def put(owner, args, output):
            output = output.clone()
            output[..., 0, 0] = torch.nan
            return output

        return _hooked(model.get_submodule(module).register_forward_hook(put))

    return break_it


@contextmanager
def _hooked(handle):
    try:
        yield
    finally:
        handle.remove()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class PlainMlp(nn.Module):
    """A stack that no integration knows."""

    def __init__(self, depth=5, width=16):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def capture_plain(model, path, *, broken=(), **options):
    """A forward and backward pass of a plain model."""
    model = copy.deepcopy(model)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    options = {"values": "full", "on_error": "raise"} | options
    with ExitStack() as stack:
        for break_it in broken:
            stack.enter_context(break_it(model))
        with tensortap.attach(model, path, **options):
            model(x).square().sum().backward()
    return path
