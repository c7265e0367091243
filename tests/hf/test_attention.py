"""What is seen inside attention, against computations of our own."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tensortap

CORE = "layers.1.attn.core"


def attention_module(model: nn.Module) -> Any:
    """The module of layer 1 that calls the attention function."""
    found = [m for m in model.modules() if getattr(m, "layer_idx", None) == 1]
    return next(m for m in found if hasattr(m, "scaling"))


def heads(flat: torch.Tensor, dim: int) -> torch.Tensor:
    """`batch seq (head dim)` as `batch head seq dim`."""
    return flat.unflatten(-1, (-1, dim)).transpose(1, 2)


def projections(family: str, model: Any, found: Any) -> tuple[torch.Tensor, ...]:
    """Query, key and value as the projections give them, split into heads."""
    dim = 8
    if family == "gpt_neox":
        fused = heads(found("layers.1.attn.qkv/forward/output"), 3 * dim)
        return fused.chunk(3, dim=-1)
    if family in ("gpt2", "phi3"):
        kv = 32 if family == "gpt2" else 16
        fused = found("layers.1.attn.qkv/forward/output").split([32, kv, kv], dim=-1)
        return tuple(heads(part, dim) for part in fused)
    q, k, v = (heads(found(f"layers.1.attn.{word}/forward/output"), dim) for word in "qkv")
    if family in ("qwen3", "gemma3"):
        module = attention_module(model)
        q, k = module.q_norm(q), module.k_norm(k)
    return (q * module_scaling(model) if family == "opt" else q), k, v


def module_scaling(model: nn.Module) -> float:
    return float(attention_module(model).scaling)


def rotated(model: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE by the model's own function, or nothing for families with learned positions."""
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return q, k
    module = attention_module(model)
    positions = torch.arange(q.shape[2])[None]
    kind = [module.layer_type] if type(model).__name__.startswith("Gemma3") else []
    cos, sin = rotary(q, positions, *kind)
    partial = getattr(module, "rotary_ndims", q.shape[-1])
    if type(model).__name__.startswith("GPTNeoX"):
        partial = q.shape[-1]  # Its function splits off the part that is rotated by itself.
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    turned = apply(q[..., :partial], k[..., :partial], cos, sin)
    rest = (q[..., partial:], k[..., partial:])
    return tuple(torch.cat(pair, dim=-1) for pair in zip(turned, rest, strict=True))  # type: ignore[return-value]


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def attention(model: nn.Module, found: Any, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and context in float64 from the captured query, key and value."""
    q, k, v = (found(f"{CORE}/forward/{t}").double().numpy() for t in ("query", "key", "value"))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat(groups, axis=1), v.repeat(groups, axis=1)
    scaling = 1.0 if type(model).__name__.startswith("OPT") else module_scaling(model)
    scores = q @ k.swapaxes(-1, -2) * scaling
    if causal:
        scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    probs = softmax(scores)
    return probs, (probs @ v).swapaxes(1, 2)


def test_query_key_and_value_are_the_projections_after_rotation(
    attention_family: str, implementation: str, build: Any, capture: Any
) -> None:
    model = build(attention_family, implementation).eval()
    found = capture(model, backward=False)
    with torch.no_grad():
        q, k, v = projections(attention_family, model, found)
        q, k = rotated(model, q, k)
    torch.testing.assert_close(found(f"{CORE}/forward/query"), q)
    torch.testing.assert_close(found(f"{CORE}/forward/key"), k)
    torch.testing.assert_close(found(f"{CORE}/forward/value"), v)


def test_context_is_the_input_of_the_output_projection(
    attention_family: str, implementation: str, build: Any, capture: Any
) -> None:
    found = capture(build(attention_family, implementation).eval(), backward=False)
    context = found(f"{CORE}/forward/context")
    assert torch.equal(context.flatten(2), found("layers.1.attn.out/forward/input"))


def test_context_and_probs_follow_from_query_key_and_value(
    attention_family: str, implementation: str, build: Any, capture: Any
) -> None:
    model = build(attention_family, implementation).eval()
    found = capture(model, backward=False)
    probs, context = attention(model, found, causal=attention_family != "bert")
    seen = found(f"{CORE}/forward/context").double().numpy()
    np.testing.assert_allclose(seen, context, rtol=1e-4, atol=1e-5)
    if implementation == "sdpa":
        assert not found.has(f"{CORE}/forward/probs")
        assert "eager" in found.notes()[f"{CORE}/forward/probs"]
        return
    seen = found(f"{CORE}/forward/probs").double().numpy()
    np.testing.assert_allclose(seen.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(seen, probs, rtol=1e-4, atol=1e-6)


def test_gradients_equal_those_of_an_attention_of_our_own(
    attention_family: str, implementation: str, build: Any, capture: Any
) -> None:
    model = build(attention_family, implementation).eval()
    found = capture(model)
    leaves = [
        found(f"{CORE}/forward/{t}").double().requires_grad_() for t in ("query", "key", "value")
    ]
    q, k, v = leaves
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scaling = 1.0 if attention_family == "opt" else module_scaling(model)
    scores = q @ k.mT * scaling
    if attention_family != "bert":
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(1, 2)
    upstream = found(f"{CORE}/backward/grad_context").double()
    expected = torch.autograd.grad(context, leaves, upstream)
    for tensor, gradient in zip(("query", "key", "value"), expected, strict=True):
        seen = found(f"{CORE}/backward/grad_{tensor}").double()
        torch.testing.assert_close(seen, gradient, rtol=1e-3, atol=1e-7)


def test_axes_are_named_in_their_order(attention_family: str, build: Any, capture: Any) -> None:
    found = capture(build(attention_family, "eager"))
    axes = {r.name.tensor: r.dims for r in found.sink.records if r.name.module == CORE}
    assert axes["query"] == axes["key"] == axes["grad_value"] == "batch head seq dim"
    assert axes["context"] == axes["grad_context"] == "batch seq head dim"
    assert axes["probs"] == "batch head seq key"


def result_of_training(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    """Logits, loss, all gradients and the state of the random numbers after one step."""
    torch.manual_seed(5)
    output = model(**batch)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [output.logits, output.loss, *gradients, torch.get_rng_state()]


def test_tapping_changes_no_bit_of_a_training_step(
    attention_family: str, implementation: str, build: Any, inputs: Any
) -> None:
    model = build(attention_family, implementation).train()
    before = result_of_training(model, inputs())
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        during = result_of_training(model, inputs())
    after = result_of_training(model, inputs())
    for plain, tapped, again in zip(before, during, after, strict=True):
        assert torch.equal(plain, tapped)
        assert torch.equal(plain, again)


def test_the_graph_of_a_tapped_model_has_no_node_more(
    attention_family: str, implementation: str, build: Any, inputs: Any
) -> None:
    model = build(attention_family, implementation).train()
    plain = nodes(model(**inputs()).loss.grad_fn)
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        tapped = nodes(model(**inputs()).loss.grad_fn)
    assert plain == tapped


def nodes(root: Any) -> list[str]:
    """Names of all autograd nodes below `root`."""
    seen, waiting = {}, [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            waiting += [below for below, _ in node.next_functions]
    return sorted(seen.values())


def library_state(model: nn.Module) -> list[dict[str, Any]]:
    """Everything a tap may touch outside of the model."""
    files = {type(m).__module__ for m in model.modules()}
    return [
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        *(dict(vars(sys.modules[name])) for name in sorted(files)),
    ]


def assert_same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] for key in old)


def test_detach_leaves_the_library_as_it_was(any_family: str, build: Any, inputs: Any) -> None:
    model = build(any_family)
    before = library_state(model)
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    tap = tensortap.attach(model, tensortap.MemorySink(), on_error="raise")
    model(**inputs())
    tap.detach()
    assert_same(before, library_state(model))
    for name, module in model.named_modules():
        assert vars(module) == attributes[name], name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_are_tapped_apart_and_detached_in_any_order(
    order: tuple[int, int], build: Any, inputs: Any
) -> None:
    models = [build("llama", "eager"), build("llama", "eager")]
    before = library_state(models[0])
    sinks = [tensortap.MemorySink(), tensortap.MemorySink()]
    taps = [
        tensortap.attach(model, sink, select="layers.*.attn.core/*", on_error="raise")
        for model, sink in zip(models, sinks, strict=True)
    ]
    models[0](**inputs())
    models[1](**inputs())
    models[1](**inputs())
    taps[order[0]].detach()
    models[order[1]](**inputs())
    taps[order[1]].detach()
    counts = [len(sink.find(f"{CORE}/forward/query")) for sink in sinks]
    assert counts == ([1, 3] if order == (0, 1) else [2, 2])
    assert_same(before, library_state(models[0]))


def test_a_model_that_is_not_tapped_is_not_seen(build: Any, inputs: Any) -> None:
    tapped, other = build("llama"), build("llama")
    sink = tensortap.MemorySink()
    with tensortap.attach(tapped, sink, on_error="raise"):
        tapped(**inputs())
        other(**inputs())
    assert len(sink.find(f"{CORE}/forward/query")) == 1


def test_a_copy_of_a_tapped_model_is_not_seen(build: Any, inputs: Any) -> None:
    model = build("llama")
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(**inputs())
        copy.deepcopy(model)(**inputs())
    assert len(sink.find(f"{CORE}/forward/query")) == 1


def test_nothing_is_patched_for_a_selection_without_attention(build: Any, inputs: Any) -> None:
    model = build("llama")
    before = library_state(model)
    select = "lm_head/*"
    with tensortap.attach(model, tensortap.MemorySink(), select=select, on_error="raise"):
        assert_same(before, library_state(model))
        model(**inputs())


def test_no_implementation_name_is_added(build: Any) -> None:
    model = build("llama")
    names = sorted(ALL_ATTENTION_FUNCTIONS)
    tap = tensortap.attach(model, tensortap.MemorySink(), on_error="raise")
    assert sorted(ALL_ATTENTION_FUNCTIONS) == names
    model(input_ids=torch.tensor([[3, 4]]))
    tap.detach()


def test_an_implementation_chosen_while_tapped_is_seen(
    build: Any, inputs: Any, captured: Any
) -> None:
    model = build("llama", "eager").eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        model(**inputs())
        model.set_attn_implementation("sdpa")
        model(**inputs())
    found = captured(sink)
    eager, sdpa = (found(f"{CORE}/forward/context", index) for index in (0, 1))
    torch.testing.assert_close(eager, sdpa)
    assert len(sink.find(f"{CORE}/forward/probs")) == 1


def test_an_implementation_that_calls_another_is_captured_once(build: Any, inputs: Any) -> None:
    def scaled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["scaled"] = scaled
    try:
        model = build("llama", "scaled")
        sink = tensortap.MemorySink()
        with tensortap.attach(model, sink, on_error="raise"):
            model(**inputs())
    finally:
        del ALL_ATTENTION_FUNCTIONS["scaled"]
    assert len(sink.find(f"{CORE}/forward/query")) == 1


def test_an_error_inside_attention_leaves_the_next_call_in_order(build: Any, inputs: Any) -> None:
    model = build("llama", "eager")
    hidden = torch.randn(1, 4, 3, 8)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        call = sys.modules[type(attention_module(model)).__module__].eager_attention_forward
        with pytest.raises(TypeError, match="scaling"):
            call(attention_module(model), hidden, hidden, hidden, None)
        model(**inputs())
    assert len(sink.find(f"{CORE}/forward/context")) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_attention_is_marked_and_its_gradients_are_right(
    reentrant: bool, build: Any, capture: Any, captured: Any
) -> None:
    plain = capture(build("llama").train())
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = capture(model)
    first, second = (record.at for record, _ in found.sink.find(f"{CORE}/forward/query"))
    assert (first.recompute, second.recompute) == (False, True)
    for tensor in ("forward/query", "forward/context", "backward/grad_key"):
        assert torch.equal(found(f"{CORE}/{tensor}"), plain(f"{CORE}/{tensor}"))


def test_a_family_with_attention_of_its_own_is_noted(build: Any, capture: Any) -> None:
    found = capture(build("bloom"))
    reason = "attention is computed inside the module, not through the attention interface"
    assert found.notes()[CORE] == reason
    assert found.has("layers.1.attn.qkv/forward/output")


def test_gpt2_that_computes_eager_attention_by_itself_is_noted(build: Any, capture: Any) -> None:
    found = capture(build("gpt2", "eager", reorder_and_upcast_attn=True))
    assert "reorder_and_upcast_attn" in found.notes()[CORE]


def test_padding_is_captured_as_the_model_sees_it(build: Any, captured: Any) -> None:
    model = build("llama", "eager").eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        model(input_ids=torch.arange(3, 13).reshape(2, 5), attention_mask=mask)
    probs = captured(sink)(f"{CORE}/forward/probs")
    assert probs[0, :, 2:, :2].abs().max() == 0
    assert (probs[1, :, -1] > 0).all()


def test_16_bit_models_are_captured_in_their_dtype(build: Any, inputs: Any, captured: Any) -> None:
    model = build("llama").to(torch.bfloat16)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        model(**inputs()).loss.backward()
    found = captured(sink)
    for tensor in ("forward/query", "forward/context", "backward/grad_value"):
        assert found(f"{CORE}/{tensor}").dtype is torch.bfloat16
    assert {r.dtype for r in sink.records if r.name.module == CORE} == {"bfloat16"}
