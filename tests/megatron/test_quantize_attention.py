"""Quantised attention: two products forward, four backward, the rest as Megatron computes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.megatron import quantize_layers as built
from tests.megatron.quantize_layers import whole
from tests.megatron.quantize_oracle import Array, product

from tensortap import NotSupported
from tensortap_megatron.quantization import quantize

SEQ, BATCH, HEADS, GROUPS, DIM = 40, 2, 4, 2, 16
FORMATS = ("mxfp4", "mxfp8", "hifp8", "int8")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


@pytest.fixture
def core() -> Any:
    return built.gpt().decoder.layers[0].self_attention.core_attention


def given(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    sizes = (("q", HEADS), ("k", GROUPS), ("v", GROUPS))
    tensors = [whole(name, SEQ, BATCH, heads, DIM) / 30 for name, heads in sizes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def by_head(x: torch.Tensor) -> Array:
    """[seq, batch, heads, dim] -> [batch, HEADS, seq, dim], groups repeated for their heads."""
    array: Array = x.detach().double().permute(1, 2, 0, 3).numpy()
    return np.repeat(array, HEADS // array.shape[1], axis=1)


def expected(q: Array, k: Array, v: Array, dc: Array, format: str) -> list[Array]:
    """Context and gradients of causal attention; [batch, head, seq, dim]."""

    def swap(x: Array) -> Array:
        return np.swapaxes(x, -1, -2)

    def per_call(a: Array, b: Array) -> Array:
        # The kernels see [batch * head, …]: a scale of the tensor covers all heads.
        flat = product(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]), format)
        return flat.reshape(*a.shape[:2], *flat.shape[1:])

    scale = DIM**-0.5
    scores = np.where(np.tri(SEQ, dtype=bool), scale * per_call(q, swap(k)), -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    dprobs = per_call(dc, swap(v))
    dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
    return [
        per_call(probs, v),
        scale * per_call(dscores, k),
        scale * per_call(swap(dscores), q),
        per_call(swap(probs), dc),
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_both_products_and_their_gradients_equal_numpy(core: Any, format: str) -> None:
    q, k, v = given()
    dc = whole("dc", SEQ, BATCH, HEADS, DIM)
    with quantize(torch.nn.ModuleDict({"core": core}), format):
        context = core(q, k, v, None)
        context.backward(dc.reshape(SEQ, BATCH, -1))
    wanted = expected(*map(by_head, (q, k, v, dc)), format)
    gradients = [x.grad for x in (q, k, v)]
    found = [context.detach().reshape(SEQ, BATCH, HEADS, DIM), *gradients]
    for number, (tensor, array) in enumerate(zip(found, wanted, strict=True)):
        assert tensor is not None
        if number > 1:  # Heads that share a key share its gradient.
            array = array.reshape(BATCH, GROUPS, -1, SEQ, DIM).sum(2)
        shown = tensor.permute(1, 2, 0, 3).numpy()
        np.testing.assert_allclose(shown, array, rtol=0, atol=1e-11 * np.abs(array).max())


def test_bfloat16_attention_in_bf16_is_bit_for_bit_the_attention_itself(core: Any) -> None:
    def run() -> list[torch.Tensor | None]:
        q, k, v = given(torch.bfloat16)
        context = core(q, k, v, None)
        context.backward(whole("dc", SEQ, BATCH, HEADS * DIM).bfloat16())
        return [context.detach(), q.grad, k.grad, v.grad]

    plain = run()
    with quantize(torch.nn.ModuleDict({"core": core}), "bf16"):
        quantised = run()
    for before, after in zip(plain, quantised, strict=True):
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)


def test_dropout_draws_the_same_numbers(core: Any) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    core.attention_dropout.p = 0.5
    core.train()

    def run() -> torch.Tensor:
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        context: torch.Tensor = core(*given(torch.bfloat16), None)
        return context

    plain = run()
    with quantize(torch.nn.ModuleDict({"core": core}), "bf16"):
        assert torch.equal(run(), plain)


def test_attention_that_computes_other_products_is_refused_not_left_alone(core: Any) -> None:
    def forward(query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.einsum("sbhd,tbhd->sbh", query, query)

    core.forward = forward
    with quantize(torch.nn.ModuleDict({"core": core}), "mxfp4"):
        with pytest.raises(NotSupported, match="computed neither"):
            core(*given(), None)
    assert core.forward is forward


def test_products_outside_of_attention_are_not_touched(core: Any) -> None:
    a, b = torch.randn(2, 5, 5), torch.randn(2, 5, 5)
    plain = torch.bmm(a, b)
    found: list[torch.Tensor] = []
    with quantize(torch.nn.ModuleDict({"core": core}), "mxfp4"):
        core.attention_dropout.register_forward_hook(
            lambda *_: run_in_thread(lambda: found.append(torch.bmm(a, b)))
        )
        core(*given(), None)
        found.append(torch.bmm(a, b))
    assert [torch.equal(one, plain) for one in found] == [True, True]


def run_in_thread(act: Any) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
