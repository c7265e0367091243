"""Axes of the activations of every kind of module, and how ranks share them.

Megatron keeps activations as [seq, batch, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from tensortap_megatron import parameters, parts
from tensortap_megatron.facts import Facts
from tensortap_megatron.naming import Named, is_layer
from tensortap_megatron.placements import Axis, Plan, Plans
from tensortap_megatron.shards import Cut, shared, split, unless_whole, whole

BATCH = Axis("batch")


def plans(named: Named, facts: Facts) -> Plans:
    """Tensors seen at a module -> their plans; empty for modules nothing is known of."""
    if named.in_expert or _overlapped(named):
        # Their tokens come from many ranks, in an order that only the dispatcher knows.
        return {"weight": parameters.weight(named, facts)} if parts.is_linear(named.module) else {}
    return _KINDS.get(named.word, _by_class)(named, facts)


def _overlapped(named: Named) -> bool:
    """Layers of shared experts that communicate outside: gathered before, summed afterwards."""
    config = getattr(named.module, "config", None)
    overlap = bool(getattr(config, "moe_shared_expert_overlap", False))
    return overlap and ".shared_expert." in named.name


def _seq(cut: Cut) -> Axis:
    return Axis("seq", cut)


def _hidden(facts: Facts) -> Plan:
    """A tensor of the residual stream."""
    return Plan((_seq(facts.residual), BATCH, Axis("hidden")))


def _residual(named: Named, facts: Facts) -> Plans:
    """A block between two places of the residual stream, or one that looks at a second stream."""
    hidden = _hidden(facts)
    return dict.fromkeys(("input", "output", "input.context", "input.key_value_states"), hidden)


def _tokens(named: Named, facts: Facts) -> Plans:
    """The embedding: [batch, seq] to [batch, seq, hidden], or at once to the residual stream."""
    tokens = Plan((BATCH, _seq(facts.inner)))
    if getattr(named.module, "reduce_scatter_embeddings", False):
        return {"input": tokens, "output": _hidden(facts)}
    return {"input": tokens, "output": Plan((BATCH, _seq(facts.inner), Axis("hidden")))}


def _embedding(named: Named, facts: Facts) -> Plans:
    """The embedding with positions and dropout: tokens to the residual stream."""
    tokens = Plan((BATCH, _seq(facts.inner)))
    inputs = dict.fromkeys(("input", "input.1", "input.input_ids", "input.position_ids"), tokens)
    return {**inputs, "output": _hidden(facts)}


def _root(named: Named, facts: Facts) -> Plans:
    """The whole model: token ids in, logits or the loss of each token out.

    A block or a layer that is tapped by itself is given the residual stream.
    """
    if is_layer(named.module) or isinstance(getattr(named.module, "layers", None), nn.ModuleList):
        return _residual(named, facts)
    tokens = Plan((BATCH, _seq(facts.inner)))
    inputs = dict.fromkeys(("input", "input.1", *_TOKEN_ARGUMENTS), tokens)
    logits = Plan((BATCH, _seq(facts.inner), _vocab(facts)))
    return {**inputs, "output": replace(tokens, otherwise=logits)}


_TOKEN_ARGUMENTS = ("input.position_ids", "input.labels", "input.loss_mask")


def _vocab(facts: Facts) -> Axis:
    """Logits; generation gathers them in the layer (`runtime_gather_output`)."""
    cut = unless_whole(facts.over_tensor, facts.padded_vocabulary)
    return Axis("vocab", cut, facts.vocabulary)


def linear(named: Named, facts: Facts) -> Plans:
    """A column- or row-parallel linear layer, by its class.

    `…_quantized` are operands of the product itself, where sequence parallelism has gathered.
    """
    if parts.row_parallel(named.module):
        inner = Axis(_inner_word(named), facts.over_tensor)
        into = Plan((_seq(facts.inner), BATCH, inner))
        outof, product = _hidden(facts), Plan((_seq(facts.inner), BATCH, Axis("hidden")))
        quantized = {"input_quantized": into, "output_quantized": product}
    else:
        into = _hidden(facts)
        outof = _column_output(named, facts)
        product = Plan((_seq(facts.inner), BATCH, Axis("hidden")))
        quantized = {"input_quantized": product, "output_quantized": replace(outof, parts=())}
    weight = parameters.weight(named, facts)
    return {
        "input": replace(into, also=parts.of_input(named)),
        "weight": weight,
        "input_local": into,
        "output": outof,
        **quantized,
    }


def _column_output(named: Named, facts: Facts) -> Plan:
    if parts.is_head(named):
        return Plan((_seq(facts.inner), BATCH, _vocab(facts)))
    gathered = bool(getattr(named.module, "gather_output", False))
    cut = whole if gathered else parts.column_cut(named, facts)
    axis = Axis(_outer_word(named), cut)
    axes = (_seq(facts.inner), BATCH, axis)
    return Plan(axes, parts.of_output(named, facts, axis=2), unknown=parts.unplaced(named))


def _inner_word(named: Named) -> str:
    return {"attn.out": "(head dim)", "mlp.down": "ffn"}.get(named.word, "channel")


def _outer_word(named: Named) -> str:
    if named.word.startswith("attn."):
        return "(head dim)"
    return "ffn" if ".up" in named.word or ".gate_up" in named.word else "channel"


def _attention(named: Named, facts: Facts) -> Plans:
    """Query, key and value as the core gets them: [seq, batch, head, dim]."""
    query = _heads(facts, split(facts.tp))
    keys = replace(_heads(facts, _groups(facts)), partial_gradient=_key_sum(facts))
    context = Plan((_seq(facts.inner), BATCH, Axis("(head dim)", facts.over_tensor)))
    # Ring attention has the keys in an order of its own.
    probs = Plan(
        (BATCH, Axis("head", facts.over_tensor), _seq(facts.inner), Axis("key")),
        unknown=facts.parallel["cp"].size > 1,
    )
    found = {"query": query, "key": keys, "value": keys, "context": context, "probs": probs}
    repeated = dict.fromkeys(("key_quantized", "value_quantized"), query)
    return {**found, **repeated, "query_quantized": query, "probs_quantized": probs}


def _dropped(named: Named, facts: Facts) -> Plans:
    """Dropout of attention probabilities."""
    probs = _attention(named, facts)["probs"]
    return {"input": probs, "output": probs}


def _heads(facts: Facts, cut: Cut) -> Plan:
    return Plan((_seq(facts.inner), BATCH, Axis("head", cut), Axis("dim")))


def _groups(facts: Facts) -> Cut:
    """Heads of keys: split, or with fewer of them than ranks shared by ranks in a row."""
    groups = int(getattr(facts.config, "num_query_groups", None) or facts.tp.size)
    return split(facts.tp) if groups >= facts.tp.size else shared(facts.tp, groups)


def _key_sum(facts: Facts) -> tuple[str, ...]:
    """Ranks that share a key head have the gradient of their own queries only."""
    groups = int(getattr(facts.config, "num_query_groups", None) or facts.tp.size)
    return ("tp",) if groups < facts.tp.size else ()


def _query_norm(named: Named, facts: Facts) -> Plans:
    heads = _heads(facts, split(facts.tp))
    return {"input": heads, "output": heads}


def _key_norm(named: Named, facts: Facts) -> Plans:
    heads = replace(_heads(facts, _groups(facts)), partial_gradient=_key_sum(facts))
    return {"input": heads, "output": heads}


def _mixer_norm(named: Named, facts: Facts) -> Plans:
    """The gated norm between scan and output projection sees this rank's heads."""
    inner = Plan((_seq(facts.inner), BATCH, Axis("channel", facts.over_tensor)))
    return {"input": inner, "output": inner}


def _router(named: Named, facts: Facts) -> Plans:
    """Probabilities and routing map of all tokens of this rank: [(seq batch), expert]."""
    if facts.parallel["cp"].size > 1:
        return {"input": _hidden(facts)}
    cut = split(facts.tp) if facts.sequence_parallel else whole
    routed = Plan((Axis("(seq batch)", cut), Axis("expert")))
    return {"input": _hidden(facts), "output": routed, "output.1": routed}


def _rotary(named: Named, facts: Facts) -> Plans:
    axes = (_seq(facts.inner), Axis("one"), Axis("one"), Axis("dim"))
    return {"output": Plan(axes)}


def _by_class(named: Named, facts: Facts) -> Plans:
    if parts.is_linear(named.module):
        return linear(named, facts)
    if named.native.endswith("rotary_pos_emb"):
        return _rotary(named, facts)
    return {}


_KINDS: Mapping[str, Callable[[Named, Facts], Plans]] = {
    "root": _root,
    **dict.fromkeys(("embed", "embed.position", "embed.token_type"), _tokens),
    "embedding": _embedding,
    "attn.core": _attention,
    "cross_attn.core": _attention,
    "attn.core.attention_dropout": _dropped,
    "attn.q_norm": _query_norm,
    "attn.k_norm": _key_norm,
    "mlp.router": _router,
    "mixer.norm": _mixer_norm,
    **dict.fromkeys(
        (
            "decoder",
            "embedding.embedding_dropout",
            "layer",
            "input_norm",
            "attn",
            "cross_attn",
            "cross_attn_norm",
            "post_attn_norm",
            "mlp",
            "mlp.shared_expert",
            "mixer",
            "norm",
            "final_norm",
        ),
        _residual,
    ),
}
