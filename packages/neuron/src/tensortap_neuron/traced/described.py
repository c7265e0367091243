"""What there is to know about a model before it is compiled: its modules and how it is spread."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from tensortap.errors import ConfigError, NotSupported
from tensortap_neuron.traced.layers import Lies, all_lies, group_of, kind
from tensortap_neuron.traced.naming import is_attention
from tensortap_neuron.traced.nxdi import real

_OUT = "self_attn.o_proj"
_CHILDREN = ("self_attn", _OUT, "mlp", "input_layernorm", "post_attention_layernorm")
_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"})
"""Model types whose NxDI decoder layers have these children (models/*/modeling_*.py)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the placement and naming of captured tensors depends on; kept beside the artifact.

    `configured`: tp and the rest come from a NeuronConfig, and are no defaults. `residual_fused`:
    with `qkv_kernel_fuse_residual_add` the residual is added by the next layer, so that a layer's
    output is without it while the context is encoded. `qkv_kernel`, `mlp_kernel`,
    `mlp_residual_fused` and `moe_kernel` are the other flags of fused kernels. `hidden` is the
    width of the residual stream, 0 where nothing tells. `options` are those that `application` was
    given for its NeuronConfig, as texts; `None` where it was made by hand. `lies`: how the tensors
    of modules lie that are known to be parallel layers, by path.
    """

    model_class: str = ""
    model_type: str = ""
    layers: int = 0
    configured: bool = False
    tp: int = 1
    sequence_parallel: bool = False
    context_parallel: bool = False
    residual_fused: bool = False
    qkv_kernel: bool = False
    mlp_kernel: bool = False
    mlp_residual_fused: bool = False
    moe_kernel: bool = False
    hidden: int = 0
    options: Mapping[str, str] | None = None
    lies: Mapping[str, Lies] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is kept beside a compiled model."""
        return {
            **{word: getattr(self, word) for word in _PLAIN},
            "lies": {path: asdict(lies) for path, lies in self.lies.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        """Inverse of `to_json`; raises `ValueError`, `TypeError` or `KeyError`."""
        plain = {word: content[word] for word in _PLAIN}
        for word, value in plain.items():
            if not _is_like(getattr(cls(), word), value):
                raise ValueError(f"{word} is {value!r}")
        return cls(
            **plain,
            lies={path: Lies.from_json(said) for path, said in content["lies"].items()},
        )


def _is_like(default: Any, value: Any) -> bool:
    """Can it stand where this default does? Numbers are no less than it."""
    if default is None:
        return value is None or isinstance(value, dict)
    return type(value) is type(default) and (type(default) is not int or value >= default)


FLAGS = {
    "residual_fused": "qkv_kernel_fuse_residual_add",
    "qkv_kernel": "qkv_kernel_enabled",
    "mlp_kernel": "mlp_kernel_enabled",
    "mlp_residual_fused": "mlp_kernel_fuse_residual_add",
    "moe_kernel": "moe_fused_nki_kernel_enabled",
}
"""Our words for flags of a NeuronConfig."""
_PLAIN = tuple(found.name for found in fields(Facts) if found.name != "lies")


@dataclass(frozen=True, slots=True)
class Described:
    """A model's modules by their NxD paths, and its facts.

    `complete`: these are all modules there are. A configuration tells only those that every
    model of its kind has. `problem`: why nothing can be captured from this model at all.
    """

    modules: tuple[str, ...]
    complete: bool
    facts: Facts
    inputs_only: frozenset[str] = frozenset()
    problem: str | None = None


def describe(model_or_config: Any, modules: Any = None) -> Described:
    """Read a live model, an NxDI application, a configuration or a folder with `config.json`.

    `modules` are the paths NxDI lists (`list_capturable_modules_in_application`, whose mapping of
    lists is taken as it is); they come before what is found here. Raises `ConfigError`.
    """
    model = model_or_config
    if isinstance(model, (str, os.PathLike)):
        model = _Read(_config_file(Path(model)))
    config = model if not isinstance(model, nn.Module) else getattr(model, "config", None)
    config = _text(config)
    live = isinstance(model, nn.Module) and not hasattr(model, "models")
    if modules is not None:
        listed, complete = tuple(path for path in _listed(modules) if path != "layers"), True
    elif live:
        listed, complete = _available(model), True
    else:
        listed, complete = _usual(config), False
    if not listed:
        raise ConfigError(
            f"{type(model_or_config).__name__} has no modules and no num_hidden_layers; give the "
            "model, its NxDI application, its configuration, or the folder of the checkpoint."
        )
    neuron = getattr(config, "neuron_config", None)
    facts = _facts(model, config, neuron, listed, live=live)
    if _head_fails(config, neuron):
        listed = tuple(path for path in listed if path != "lm_head")
    known = facts.model_type in _KNOWN and not live
    attention = frozenset(path for path in listed if is_attention(path)) if known else frozenset()
    return Described(listed, complete, facts, attention, problem(neuron))


def _head_fails(config: Any, neuron: Any) -> bool:
    """Does NxD fail on capturing the logits, as the vocabulary is padded to divide over ranks?

    They are divided when tokens are sampled on the device, and `TensorRegistry.register_tensor`
    cuts the padding of all of the vocabulary off the piece of one rank.
    """
    vocabulary, tp = (
        getattr(of, word, None) for of, word in ((config, "vocab_size"), (neuron, "tp_degree"))
    )
    return isinstance(vocabulary, int) and isinstance(tp, int) and vocabulary % max(tp, 1) > 0


class _Read:
    """A configuration file as an object with attributes, as transformers gives it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        for key, value in content.items():
            setattr(self, key, _Read(value) if isinstance(value, Mapping) else value)


def _config_file(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as failure:
        raise ConfigError(f"{path} cannot be read as a model's configuration: {failure}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not the configuration of a model.")
    return content


def _text(config: Any) -> Any:
    """The configuration of the language model inside of a multimodal one."""
    inner = getattr(config, "text_config", None)
    return config if inner is None else inner


def _listed(modules: Any) -> Iterator[str]:
    """A list of paths, or NxDI's lists by submodel; each path once."""
    lists: Sequence[Any] = list(modules.values()) if isinstance(modules, Mapping) else [modules]
    found = list(dict.fromkeys(path for some in lists for path in some))
    if not all(isinstance(path, str) for path in found):
        raise ConfigError("modules= lists the paths of modules as text, as NxDI does.")
    yield from found


def _available(model: nn.Module) -> tuple[str, ...]:
    """What NxD's own `get_available_modules` says, or the same without NxD.

    Lists of modules are in there as well, but have no call of their own to capture.
    """
    lister = _nxd_lister()
    found = lister(model) if lister is not None else [p for p, _ in model.named_modules() if p]
    called = {p for p, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    return tuple(path for path in dict.fromkeys(found) if path in called)


def _nxd_lister() -> Any:
    """NxD's function, where the real package is; the PyPI stub of that name raises on import."""
    try:
        return real("neuronx_distributed.utils.tensor_capture", "get_available_modules")
    except NotSupported:
        return None


def _usual(config: Any) -> tuple[str, ...]:
    """What a model with this configuration has for certain."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return ()
    children = _children(config) if getattr(config, "model_type", "") in _KNOWN else ()
    inside = (
        path
        for number in range(layers)
        for path in (
            f"layers.{number}",
            *(f"layers.{number}.{child}" for child in children),
        )
    )
    return ("embed_tokens", *inside, "norm", "lm_head")


def _children(config: Any) -> tuple[str, ...]:
    """Of a layer. With another attention for prompts than for tokens its projections are two."""
    neuron = getattr(config, "neuron_config", None)
    degrees = (getattr(neuron, word, 1) for word in ("cp_degree", "attention_dp_degree"))
    return _CHILDREN if len(set(degrees)) == 1 else tuple(c for c in _CHILDREN if c != _OUT)


def _facts(model: Any, config: Any, neuron: Any, listed: Sequence[str], *, live: bool) -> Facts:
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        layers = len({path.split(".")[1] for path in listed if path.startswith("layers.")})
    parallel = {p: m for p, m in model.named_modules() if kind(m) is not None} if live else {}
    lies = all_lies(model) if live else {}
    found = Facts(
        model_class=type(model).__name__ if isinstance(model, nn.Module) else "",
        model_type=str(getattr(config, "model_type", "") or ""),
        layers=layers,
        hidden=width_of(config),
        tp=max((group_of(module).size for module in parallel.values()), default=1),
        lies={p: lies[m] for p, m in model.named_modules() if m in lies} if live else {},
    )
    return found if neuron is None else configured(found, neuron)


def configured(facts: Facts, neuron: Any) -> Facts:
    """`facts` with what a NeuronConfig says."""
    kernels: dict[str, Any] = {w: bool(getattr(neuron, flag, False)) for w, flag in FLAGS.items()}
    return replace(
        facts,
        configured=True,
        tp=int(getattr(neuron, "tp_degree", 1) or 1),
        sequence_parallel=bool(getattr(neuron, "sequence_parallel_enabled", False)),
        context_parallel=int(getattr(neuron, "cp_degree", 1) or 1) > 1,
        **kernels,
    )


def width_of(config: Any) -> int:
    """Width of the residual stream; 0 where the configuration does not tell."""
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else 0


def problem(neuron: Any) -> str | None:
    """Why what is captured under this NeuronConfig would be dropped, or wrong; and what to do.

    `NeuronBaseForCausalLM._get_constructed_outputs` hands captures on only when tokens are
    sampled on the device *and* logits are returned, and neither speculates; NeuronConfig sets
    `output_logits` by itself, but not when the user has set it before.
    """
    if neuron is None:
        return None
    if getattr(neuron, "on_device_sampling_config", None) is None:
        return (
            "without on_device_sampling_config NxDI drops every captured tensor, silently when "
            "output_logits=True was set. Set on_device_sampling_config=OnDeviceSamplingConfig() "
            "in the NeuronConfig; the default samples greedily"
        )
    for word in ("enable_fused_speculation", "is_medusa"):
        if getattr(neuron, word, False):
            return f"with {word} NxDI hands no captured tensors on. Turn it off for the capture"
    if getattr(neuron, "windowed_context_encoding_size", None):
        return (
            "with windowed_context_encoding_size modules are called once a window, and NxD keeps "
            "the last one only, which may be all padding. Turn it off for the capture"
        )
    if getattr(neuron, "async_mode", False):
        return (
            "with async_mode the tensors of a forward come back ranked and a step late. Turn it "
            "off for the capture"
        )
    return None
