"""An NxDI application that hands out its tensors: compiled, or loaded and checked.

The steps are those of NxDI's own example (examples/tensor_capture/tensor_capture_example.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import ConfigError, NotSupported, nearest
from tensortap_neuron.traced.capture import FILE, Capture
from tensortap_neuron.traced.choosing import EVERY_LAYER, prepare
from tensortap_neuron.traced.hook import TracedHook
from tensortap_neuron.traced.nxdi import real

_NXDI = "neuronx_distributed_inference"


@dataclass(frozen=True, slots=True)
class Application:
    """An NxDI application on the device, and the capture it was compiled with."""

    app: Any
    capture: Capture

    def generate(
        self,
        input_ids: torch.Tensor,
        hook: TracedHook,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 1,
        **options: Any,
    ) -> Any:
        """Generate through NxDI's Hugging Face adapter; each call is one step of the run.

        `input_ids` of shape (batch, tokens), padded on the right where rows differ. `options`
        go to `generate`. Returns what that returns.
        """
        adapter = real(f"{_NXDI}.utils.hf_adapter", "HuggingFaceGenerationAdapter")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hook.step()
        return adapter(self.app).generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            **hook.kwargs,
            **options,
        )


def application(
    model_dir: str | os.PathLike[str],
    compiled_dir: str | os.PathLike[str],
    *,
    skip_compile: bool = False,
    select: str = EVERY_LAYER,
    neuron: Mapping[str, Any] | None = None,
    moe: bool = False,
) -> Application:
    """Compile the checkpoint in `model_dir` with a capture, or load what was compiled, and start.

    `neuron` are options of NxDI's NeuronConfig (`tp_degree`, `seq_len`, `batch_size`, …); the
    capture's own are added. With `skip_compile` the model in `compiled_dir` must have been
    compiled with this very capture: else `ConfigError` says what differs. Raises `NotSupported`
    where neuronx-distributed-inference is not installed, or has no such model.
    """
    model, compiled = Path(model_dir), Path(compiled_dir)
    model_type = _model_type(model)
    model_class = _model_class(model_type)
    config, capture = _configured(model, model_class, select, dict(neuron or {}), moe=moe)
    if skip_compile:
        capture.check(compiled)
    app = model_class(str(model), config)
    if not skip_compile:
        # No configuration beside an artifact of which nobody knows whether it is whole.
        (compiled / FILE).unlink(missing_ok=True)
        app.compile(str(compiled))
        capture.save(compiled)
    app.load(str(compiled))
    return Application(app, capture)


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise ConfigError(
            f"{path} does not say model_type ({type(failure).__name__}); give the folder of a "
            "Hugging Face checkpoint."
        ) from None


def _model_class(model_type: str) -> Any:
    types: Mapping[str, Mapping[str, Any]] = real(f"{_NXDI}.utils.constants", "MODEL_TYPES")
    if "causal-lm" not in types.get(model_type, {}):
        known = [word for word, tasks in types.items() if "causal-lm" in tasks]
        raise NotSupported(
            f"This neuronx-distributed-inference has no language model of type {model_type!r}; "
            f"it has {nearest(model_type, known)}."
        )
    return types[model_type]["causal-lm"]


def _configured(
    model: Path, model_class: Any, select: str, options: dict[str, Any], *, moe: bool
) -> tuple[Any, Capture]:
    """The model's configuration with the capture in it.

    The capture depends on the configuration, and that on the capture: so it is made twice.
    """
    given = {option: _text(value) for option, value in options.items()}
    load = real(f"{_NXDI}.utils.hf_adapter", "load_pretrained_config")
    sampling = real(f"{_NXDI}.models.config", "OnDeviceSamplingConfig")
    options.setdefault("on_device_sampling_config", sampling(do_sample=False, deterministic=True))
    options["output_logits"] = True
    config_class = model_class.get_config_cls()
    neuron_class = model_class.get_neuron_config_cls()

    def configuration(**more: Any) -> Any:
        return config_class(neuron_class(**options, **more), load_config=load(str(model)))

    capture = prepare(configuration(), select, moe=moe)
    capture = replace(capture, facts=replace(capture.facts, options=given))
    return configuration(tensor_capture_config=capture.tensor_capture_config()), capture


def _text(value: Any) -> str:
    """An option as it is compared; of an object its type, which is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str, list, dict, torch.dtype)):
        return str(value)
    return type(value).__name__
