"""The model a command works on: a folder, a name on the hub, or random weights of a shape."""

from __future__ import annotations

import importlib
import importlib.util
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensortap.errors import ConfigError, NotSupported

BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    # The configuration of state-spaces/mamba-130m-hf. Weights drawn with its initializer_range of
    # 0.1 make a chaotic model, in which any rounding grows to the size of the logits.
    "mamba-130m": {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 24,
        "expand": 2,
        "conv_kernel": 4,
        "time_step_rank": 48,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }
}
"""Shapes that `--random-init` knows by name."""

_SEED = 0
_LONGEST = 200
"""Characters: transformers lists every model it knows in a message."""
_QUAMBA_LAYER = "QMamba"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode, its tokenizer if it has one, and where both came from."""

    model: nn.Module
    tokenizer: Any
    source: str
    arguments: tuple[str, ...]
    """What on the command line made it."""


def load(model: str | None, random_init: str | None, device: str) -> Loaded:
    """Load the MODEL or make the `--random-init`; raises `ConfigError` or `NotSupported`."""
    if (model is None) == (random_init is None):
        raise ConfigError("Give one of MODEL (a folder, or a name on the hub) and --random-init.")
    _require_transformers()
    if random_init is not None:
        made, where = _random(random_init)
        source = f"random weights of {random_init} (seed {_SEED})"
        arguments: tuple[str, ...] = ("--random-init", random_init)
    else:
        assert model is not None
        made, where, source, arguments = _pretrained(model), model, model, (model,)
    return Loaded(_ready(made, device), _tokenizer(where), source, arguments)


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise NotSupported('transformers is not installed: pip install "tensortap-hf[framework]".')


def _ready(model: Any, device: str) -> nn.Module:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    try:
        ready: nn.Module = model.to(device).eval()
    except (RuntimeError, AssertionError) as failure:
        raise ConfigError(f"--device {device}: {_first_line(failure)}") from failure
    return ready


def _random(shape: str) -> tuple[Any, str | None]:
    """A model of random weights, and the folder where its tokenizer may be."""
    import transformers

    path = Path(shape)
    if shape in BUILT_IN:
        fields, folder = dict(BUILT_IN[shape]), None
    elif path.exists():
        file = path / "config.json" if path.is_dir() else path
        _require_object(file)
        # transformers spells infinity in a way of its own.
        read = transformers.PretrainedConfig.get_config_dict
        fields, folder = (
            _tried(f"--random-init {shape}", lambda: read(str(file)))[0],
            str(file.parent),
        )
    else:
        raise ConfigError(
            f"--random-init {shape}: neither a file, a folder with a config.json, nor one of "
            f"{', '.join(BUILT_IN)}."
        )
    kind = fields.pop("model_type", None)
    fields.pop("quantization_config", None)
    config = _tried(
        f"--random-init {shape}", lambda: transformers.AutoConfig.for_model(kind, **fields)
    )
    torch.manual_seed(_SEED)
    make = _class(config)
    build = make if isinstance(make, type) and issubclass(make, nn.Module) else make.from_config
    return _tried(f"--random-init {shape}", lambda: build(config)), folder


def _pretrained(name: str) -> Any:
    import transformers

    fields, _ = _tried(name, lambda: transformers.PretrainedConfig.get_config_dict(name))
    if is_quamba(fields):
        return _quamba(name)
    if "model_type" not in fields:
        raise NotSupported(
            f"{name}: its config.json has no model_type, so transformers cannot load it; "
            "checkpoints of mamba_ssm have converted twins whose names end in -hf."
        )
    config = _tried(name, lambda: transformers.AutoConfig.from_pretrained(name))
    # Packed weights have the dtypes they were stored in; all others are wanted exactly.
    dtype = "auto" if getattr(config, "quantization_config", None) else torch.float32
    return _tried(name, lambda: _class(config).from_pretrained(name, dtype=dtype))


def _class(config: Any) -> Any:
    """The class that a checkpoint was made with, where transformers has it."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def is_quamba(fields: Mapping[str, Any]) -> bool:
    """Is this the config.json that `QuambaLMHeadModel.save_pretrained` writes?"""
    layer = (fields.get("ssm_cfg") or {}).get("layer")
    return "model_type" not in fields and _QUAMBA_LAYER in json.dumps(layer)


def _quamba(path: str) -> Any:
    """An int8 checkpoint of Quamba: loaded by the package itself, on a GPU."""
    missing = (
        "the package quamba is not installed"
        if importlib.util.find_spec("quamba") is None
        else "there is no CUDA device"
        if not torch.cuda.is_available()
        else None
    )
    if missing is not None:
        raise NotSupported(
            f"{path} is an int8 checkpoint of Quamba, and {missing}. It holds no fp32 weights to "
            "emulate modes or a reference from: give the model it was made from "
            "(state-spaces/mamba-…-hf), whose quamba modes run anywhere."
        )
    module = importlib.import_module("quamba.quamba_mixer_seq")
    return _tried(path, lambda: module.QuambaLMHeadModel.from_pretrained(path, device="cuda"))


def _tokenizer(where: str | None) -> Any:
    """The tokenizer beside a model; `None`: it has none, and bytes stand in."""
    import transformers

    if where is None:
        return None
    try:
        found = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None  # There is none; samples say so in the run's metadata.
    # Where there are no files, transformers makes one of special tokens only, which loses all text.
    words = found.get_vocab().keys() - set(found.all_special_tokens)
    return found if words else None


def _require_object(path: Path) -> None:
    """Raise `ConfigError` for a file that is no JSON object, saying so better than transformers."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise ConfigError(f"{path} cannot be read: {failure.strerror}.") from failure
    except ValueError as failure:
        raise ConfigError(f"{path} is no JSON: {failure}.") from failure
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no configuration: it is not a JSON object.")


def _tried(what: str, load: Callable[[], Any]) -> Any:
    """What transformers raises, as one line: a class for every field that may be wrong."""
    try:
        return load()
    except Exception as failure:
        raise ConfigError(f"{what} cannot be loaded: {_first_line(failure)}") from failure


def _first_line(failure: BaseException) -> str:
    """What a message begins with; with the line after it where that gives the reason."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return textwrap.shorten(first or type(failure).__name__, _LONGEST, placeholder=" …")
