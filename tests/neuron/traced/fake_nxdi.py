"""A fake of what neuronx-distributed-inference does around a traced model; PyPI has only a stub.

Written after its public sources (main of 2026-07) in words of its own: `models/config.py`
(NeuronConfig, TensorCaptureConfig), `models/model_base.py` (`_get_captured_tensors`,
`_get_constructed_outputs`, `forward`), `models/model_wrapper.py` (padding to buckets, capture
enabled for each submodel), `utils/hf_adapter.py`. One bucket of one submodel is one graph; a graph
returns what it returned while it was traced, so the fake traces each with its own module instance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_llama import KERNELS, FakeNeuronLlama
from transformers import LlamaConfig, LlamaForCausalLM


class OnDeviceSamplingConfig:
    def __init__(self, **options: Any) -> None:
        self.options = options


class TensorCaptureConfig:
    """config.py: adds one to the room for tensors by hand when experts are captured."""

    def __init__(self, **options: Any) -> None:
        self.modules_to_capture = options.pop("modules_to_capture", [])
        self.max_intermediate_tensors = options.pop("max_intermediate_tensors", None)
        self.auto_capture_moe_tensors = options.pop("auto_capture_moe_tensors", False)
        self.capture_inputs = options.pop("capture_inputs", False)
        if self.auto_capture_moe_tensors:
            self.max_intermediate_tensors = (self.max_intermediate_tensors or 0) + 1

    def get_offset(self) -> int:
        modules = len(self.modules_to_capture) * (2 if self.capture_inputs else 1)
        return modules + (self.max_intermediate_tensors or 0)


class IncompatibleConfigError(Exception):
    pass


class NeuronConfig:
    """config.py: turns `output_logits` on, and refuses, only where the user has not set it."""

    def __init__(self, **options: Any) -> None:
        self.tp_degree = options.pop("tp_degree", 1)
        self.seq_len = options.pop("seq_len", 64)
        self.ctx_batch_size = options.pop("ctx_batch_size", None)
        self.is_continuous_batching = options.pop("is_continuous_batching", False)
        self.context_encoding_buckets = options.pop("context_encoding_buckets", [8, 16])
        self.torch_dtype = options.pop("torch_dtype", torch.bfloat16)
        self.sequence_parallel_enabled = options.pop("sequence_parallel_enabled", False)
        for kernel in KERNELS:
            setattr(self, kernel, options.pop(kernel, False))
        self.on_device_sampling_config = options.pop("on_device_sampling_config", None)
        self.output_logits = options.pop("output_logits", False)
        self.enable_fused_speculation = options.pop("enable_fused_speculation", False)
        self.is_medusa = options.pop("is_medusa", False)
        self.async_mode = options.pop("async_mode", False)
        self.windowed_context_encoding_size = options.pop("windowed_context_encoding_size", None)
        self.cp_degree = options.pop("cp_degree", 1)
        self.tensor_capture_config = options.pop("tensor_capture_config", None)
        assert not options, options
        if self.tensor_capture_config and not self.output_logits:
            self.output_logits = True
            if self.on_device_sampling_config is None:
                raise IncompatibleConfigError("Tensor capture requires on device sampling")


class LlamaInferenceConfig:
    def __init__(self, neuron_config: NeuronConfig, load_config: Callable[[Any], None]) -> None:
        self.neuron_config = neuron_config
        load_config(self)


def load_pretrained_config(folder: str) -> Callable[[Any], None]:
    def load(config: Any) -> None:
        vars(config).update(json.loads((Path(folder) / "config.json").read_text()))

    return load


class _Graph:
    """One submodel for one bucket: the outputs it has are those of when it was traced."""

    def __init__(self, model: FakeNeuronLlama, neuron: NeuronConfig, hole: str | None) -> None:
        self.model, self.neuron, self.hole = model, neuron, hole

    def __call__(self, *args: torch.Tensor) -> list[torch.Tensor]:
        registry = fake_nxd.TensorRegistry.get_instance()
        capture = self.neuron.tensor_capture_config
        if capture is not None:
            info = fake_nxd._Captured(
                capture.modules_to_capture, capture.max_intermediate_tensors, capture.capture_inputs
            )
            registry.enabled, registry.model_info = True, info
        logits = self.model(*args)
        captured = _captured(registry, capture, self.hole) if capture is not None else []
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        first = tokens if self.neuron.on_device_sampling_config is not None else logits
        return [first, *([logits] if self.neuron.output_logits else []), *captured]


def _captured(registry: Any, capture: TensorCaptureConfig, hole: str | None) -> list[torch.Tensor]:
    """model_base.py, `_get_captured_tensors`; what `hole` names was not called in this bucket."""
    seen, found = registry.get_module_tensors(), []
    for path in capture.modules_to_capture:
        for side in ("outputs", "inputs") if capture.capture_inputs else ("outputs",):
            keys = [key for key in seen if key.startswith(f"{path}.{side}") and path != hole]
            found.append(seen[keys[0]] if keys else torch.zeros(1, dtype=torch.bfloat16))
    room = capture.max_intermediate_tensors or 0
    manual = list(registry.get_manual_tensors().values())[:room] if room else []
    nan = torch.full((1,), float("nan"), dtype=torch.bfloat16)
    registry.clear()
    return [*found, *manual, *[nan] * (room - len(manual))]


class FakeApplication(torch.nn.Module):
    """NeuronBaseForCausalLM: a context encoding model for each bucket, one for tokens."""

    checkpoint: LlamaForCausalLM
    """The weights: a fake artifact has none of its own."""
    holes: ClassVar[dict[int, str]] = {}
    """Bucket -> module that is not called in it."""
    compiled: ClassVar[list[str]] = []

    def __init__(self, model_path: str, config: Any) -> None:
        super().__init__()
        self.model_path, self.config, self.neuron_config = model_path, config, config.neuron_config
        self.kv_cache_populated = False
        self.models: list[Any] = []

    @classmethod
    def get_config_cls(cls) -> Any:
        return LlamaInferenceConfig

    @classmethod
    def get_neuron_config_cls(cls) -> Any:
        return NeuronConfig

    def compile(self, folder: str) -> None:
        capture = self.neuron_config.tensor_capture_config
        model = self._model()
        fake_nxd.enable_tensor_capture(
            model, capture.modules_to_capture
        )  # Raises for unknown ones.
        fake_nxd.disable_tensor_capture(model)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.pt").write_text(json.dumps(vars(capture)))
        self.compiled.append(folder)

    def load(self, folder: str) -> None:
        capture = TensorCaptureConfig(**json.loads((Path(folder) / "model.pt").read_text()))
        assert (
            capture.modules_to_capture
            == self.neuron_config.tensor_capture_config.modules_to_capture
        )
        self.start(self._model())

    def start(self, model: FakeNeuronLlama) -> FakeApplication:
        """Trace: hooks are there while a graph is made, and its outputs are fixed then."""
        neuron = self.neuron_config
        if neuron.tensor_capture_config is not None:
            options = neuron.tensor_capture_config
            fake_nxd.enable_tensor_capture(
                model, options.modules_to_capture, options.max_intermediate_tensors,
                options.capture_inputs,
            )  # fmt: skip
        buckets = neuron.context_encoding_buckets
        self._prefill = {b: _Graph(model, neuron, self.holes.get(b)) for b in buckets}
        self._decode = _Graph(model, neuron, self.holes.get(1))
        return self

    def _model(self) -> FakeNeuronLlama:
        config = LlamaConfig(**{k: v for k, v in vars(self.config).items() if k != "neuron_config"})
        return FakeNeuronLlama(config, self.neuron_config).load(self.checkpoint)

    def reset(self) -> None:
        self.kv_cache_populated = False

    def forward(self, input_ids, attention_mask=None, position_ids=None, seq_ids=None,
                input_capture_hook=None, tensor_capture_hook=None):  # fmt: skip
        if input_capture_hook is not None:
            seq_ids, sampling = torch.arange(input_ids.shape[0]), torch.ones(1, 3)
            input_capture_hook(self, [input_ids, attention_mask, position_ids, seq_ids, sampling])
        outputs = self._run(input_ids, attention_mask, position_ids)
        neuron, made = self.neuron_config, SimpleNamespace(captured_tensors=None)
        if neuron.on_device_sampling_config is not None and neuron.output_logits and not (
            neuron.enable_fused_speculation or neuron.is_medusa
        ):  # fmt: skip
            made.tokens, made.logits = outputs[:2]
            offset = (
                neuron.tensor_capture_config.get_offset() if neuron.tensor_capture_config else 0
            )
            if offset > 0:
                made.captured_tensors = outputs[2 : 2 + offset]
        else:
            made.logits = outputs[0]
            made.tokens = outputs[0][:, -1].argmax(-1, keepdim=True)
        if tensor_capture_hook and made.captured_tensors:
            tensor_capture_hook(self, made.captured_tensors)
        return made

    def _run(self, ids, mask, positions):
        if int(positions.min()) != 0:
            return self._decode(ids, mask, positions)
        self.kv_cache_populated = True
        bucket = next(b for b in self.neuron_config.context_encoding_buckets if b >= ids.shape[1])
        # model_wrapper.py, `pad_inputs`: ids with the pad token, the mask with 0, positions with 1.
        more = (0, bucket - ids.shape[1])
        pad = torch.nn.functional.pad
        given = [pad(ids, more), pad(mask, more), pad(positions, more, value=1)]
        size = self.neuron_config.ctx_batch_size or ids.shape[0]
        if size == ids.shape[0]:
            return self._prefill[bucket](*given)
        # model_wrapper.py, `forward`: one batch after the other; outputs put together, all of them.
        assert self.neuron_config.is_continuous_batching
        batches = zip(*(tensor.split(size) for tensor in given), strict=True)
        outputs = [self._prefill[bucket](*batch) for batch in batches]
        return [torch.cat(some) for some in zip(*outputs, strict=True)]


class HuggingFaceGenerationAdapter:
    """hf_adapter.py: `generate` starts afresh; `prepare_inputs_for_generation`; greedy."""

    def __init__(self, app: FakeApplication) -> None:
        self.app = app

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens, **hooks):
        self.app.reset()
        mask = attention_mask
        for _ in range(max_new_tokens):
            positions = mask.long().cumsum(-1) - 1
            positions.masked_fill_(mask == 0, 1)
            ids = input_ids
            if self.app.kv_cache_populated:
                ids, positions = input_ids[:, -1:], positions.amax(1, keepdim=True)
            made = self.app.forward(ids, mask, positions, **hooks)
            input_ids = torch.cat([input_ids, made.tokens], -1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        return input_ids


def install(monkeypatch: Any, checkpoint: LlamaForCausalLM) -> type[FakeApplication]:
    """Make fake NxD and NxDI importable for one test; returns its application class."""
    fake_nxd.install(monkeypatch)
    kind = type("FakeNeuronLlamaForCausalLM", (FakeApplication,),
                {"checkpoint": checkpoint, "compiled": [], "holes": {}})  # fmt: skip
    root = "neuronx_distributed_inference"
    content = {
        root: {"__version__": "0.8.fake"},
        f"{root}.models": {},
        f"{root}.models.config": {
            kind.__name__: kind
            for kind in (TensorCaptureConfig, OnDeviceSamplingConfig, NeuronConfig)
        },
        f"{root}.utils": {},
        f"{root}.utils.constants": {"MODEL_TYPES": {"llama": {"causal-lm": kind}}},
        f"{root}.utils.hf_adapter": {
            "HuggingFaceGenerationAdapter": HuggingFaceGenerationAdapter,
            "load_pretrained_config": load_pretrained_config,
        },
    }
    for name, found in content.items():
        module = ModuleType(name)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)
    return kind
