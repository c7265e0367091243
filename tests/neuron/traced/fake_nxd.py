"""A fake of what neuronx-distributed does that tensortap depends on; PyPI has only a stub of it.

Written after the public sources of NxD, release 2.29, in words of its own:
`src/neuronx_distributed/parallel_layers/layers.py` (attributes and collectives of the layers) and
`src/neuronx_distributed/utils/tensor_capture/{api,registry,model_modification}.py`.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class FakeGroup:
    """A process group without processes: size and rank are all the layers ask it for."""

    ranks: int = 1
    place: int = 0

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.place


def padding_to(size: int, ranks: int) -> int:
    return -size % ranks


def gathered(value: torch.Tensor, axis: int, group: Any) -> torch.Tensor:
    if group.size() == 1:
        return value
    pieces = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(pieces, value.contiguous(), group=group)
    return torch.cat(pieces, axis)


def summed(value: torch.Tensor, group: Any) -> torch.Tensor:
    if group.size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total


def scattered(value: torch.Tensor, axis: int, group: Any) -> torch.Tensor:
    return value.chunk(group.size(), axis)[group.rank()].contiguous()


class ColumnParallelLinear(nn.Module):
    """layers.py, ColumnParallelLinear: a piece of the output axis, gathered if asked to be."""

    def __init__(self, input_size, output_size, bias=False, gather_output=True, *, group,
                 sequence_parallel_enabled=False, sequence_dimension=None, pad=False,
                 keep_padded_output=False, stride=1, skip_bias_add=False,
                 rank_ordering=None):  # fmt: skip
        super().__init__()
        self.gather_output, self.pad, self.keep_padded_output = (
            gather_output,
            pad,
            keep_padded_output,
        )
        self.tensor_parallel_group, self.rank_ordering, self.stride = group, rank_ordering, stride
        self.pad_size = padding_to(output_size, group.size()) if pad else 0
        self.input_size, self.output_size = input_size, output_size + self.pad_size
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension
        self.weight_partition_dim, self.skip_bias_add = 0, skip_bias_add
        piece = self.output_size // group.size()
        self.weight = nn.Parameter(torch.empty(piece, input_size))
        held = self.output_size if gather_output else piece
        self.bias = nn.Parameter(torch.zeros(held)) if bias else None

    def load(self, whole: torch.Tensor) -> None:
        padded = nn.functional.pad(whole, (0, 0, 0, self.pad_size))
        blocks = padded.chunk(self.stride, 0)
        group = self.tensor_parallel_group
        self.weight.data = torch.cat([scattered(block, 0, group) for block in blocks], 0)

    def forward(self, value):
        group = self.tensor_parallel_group
        if self.sequence_parallel_enabled:
            value = gathered(value, self.sequence_dimension or 0, group)
        out = value @ self.weight.t()
        if self.gather_output:
            out = gathered(out, -1, group)
            if not self.keep_padded_output and self.pad and self.pad_size > 0:
                out = out.narrow(-1, 0, self.output_size - self.pad_size)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class RowParallelLinear(nn.Module):
    """layers.py, RowParallelLinear: summands, all-reduced or reduce-scattered if asked to be."""

    def __init__(self, input_size, output_size, bias=False, input_is_parallel=True, *, group,
                 reduce_output=True, sequence_parallel_enabled=False, sequence_dimension=None,
                 pad=False, skip_bias_add=False, rank_ordering=None):  # fmt: skip
        super().__init__()
        self.input_is_parallel, self.reduce_output, self.pad = input_is_parallel, reduce_output, pad
        self.tensor_parallel_group, self.rank_ordering, self.stride = group, rank_ordering, 1
        self.pad_size = padding_to(input_size, group.size()) if pad else 0
        self.input_size, self.output_size = input_size + self.pad_size, output_size
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension
        self.weight_partition_dim, self.skip_bias_add = 1, skip_bias_add
        self.weight = nn.Parameter(torch.empty(output_size, self.input_size // group.size()))
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None

    def load(self, whole: torch.Tensor) -> None:
        padded = nn.functional.pad(whole, (0, self.pad_size))
        self.weight.data = scattered(padded, 1, self.tensor_parallel_group)

    def forward(self, value):
        group = self.tensor_parallel_group
        if not self.input_is_parallel:
            value = scattered(nn.functional.pad(value, (0, self.pad_size)), -1, group)
        out = value @ self.weight.t()
        if self.reduce_output:
            out = summed(out, group)
            if self.sequence_parallel_enabled:
                out = scattered(out, self.sequence_dimension or 0, group)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class ParallelEmbedding(nn.Module):
    """layers.py, ParallelEmbedding: `_forward_shard_across_embed` and `…_vocab`."""

    def __init__(self, num_embeddings, embedding_dim, *, group, shard_across_embedding=False,
                 sequence_parallel_enabled=False, sequence_dimension=None, pad=False,
                 collect_output=True, rank_ordering=None):  # fmt: skip
        super().__init__()
        self.tensor_model_parallel_group, self.rank_ordering, self.stride = group, rank_ordering, 1
        self.shard_across_embedding, self.pad = shard_across_embedding, pad
        self.sequence_parallel_enabled, self.sequence_dim = (
            sequence_parallel_enabled,
            sequence_dimension,
        )
        self.collect_output = collect_output
        cut = embedding_dim if shard_across_embedding else num_embeddings
        self.pad_size = padding_to(cut, group.size()) if pad else 0
        self.weight_partition_dim = 1 if shard_across_embedding else 0
        shape = [num_embeddings, embedding_dim]
        shape[self.weight_partition_dim] = (cut + self.pad_size) // group.size()
        self.embedding_dim = embedding_dim + (self.pad_size if shard_across_embedding else 0)
        self.weight = nn.Parameter(torch.empty(*shape))

    def load(self, whole: torch.Tensor) -> None:
        pads = (0, self.pad_size) if self.shard_across_embedding else (0, 0, 0, self.pad_size)
        padded = nn.functional.pad(whole, pads)
        self.weight.data = scattered(
            padded, self.weight_partition_dim, self.tensor_model_parallel_group
        )

    def forward(self, ids):
        group = self.tensor_model_parallel_group
        if self.shard_across_embedding:
            out = nn.functional.embedding(ids, self.weight)
            if self.collect_output:
                out = gathered(out, -1, group)
            if self.pad and self.pad_size > 0:  # Of a piece that is not collected as well.
                out = out.narrow(-1, 0, self.embedding_dim - self.pad_size)
            return out
        first = self.weight.shape[0] * group.rank()
        here = (ids >= first) & (ids < first + self.weight.shape[0])
        out = nn.functional.embedding((ids - first) * here, self.weight) * here[..., None]
        if not self.collect_output:
            return out
        if self.sequence_parallel_enabled:
            if self.sequence_dim:
                return out
            return scattered(summed(out.transpose(0, 1).contiguous(), group), 0, group)
        return summed(out, group)


class _Captured:
    """registry.py, CapturedModelInfo."""

    def __init__(self, modules, room, inputs) -> None:
        self.modules_to_capture, self.max_tensors, self.capture_inputs = modules, room, inputs
        self.hooks: list[Any] = []
        self.module_tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.manual_tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.counts: dict[str, int] = {}


class TensorRegistry:
    """registry.py, TensorRegistry: one for the whole process; `clear` forgets what to capture."""

    _instance = None

    @classmethod
    def get_instance(cls):
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def __init__(self) -> None:
        self.enabled = False
        self.model_info = _Captured([], 10, False)

    def clear(self) -> None:
        self.model_info = _Captured([], 10, False)

    def configure(
        self, enabled=False, modules=None, max_tensors=None, capture_inputs=False
    ) -> None:
        self.enabled = enabled
        self.model_info = _Captured(list(modules or []), max_tensors, capture_inputs)

    def register_tensor(self, name, tensor, module=None) -> None:
        if not self.enabled:
            return
        info = self.model_info
        kept = tensor.clone().detach()
        if any(name == path or name.startswith(f"{path}.") for path in info.modules_to_capture):
            if "lm_head" in name:
                assert not module.sequence_parallel_enabled
                if not module.keep_padded_output and module.pad and module.pad_size > 0:
                    kept = kept.narrow(-1, 0, module.output_size - module.pad_size)
            info.module_tensors[name] = kept  # A second call of a module replaces the first.
            return
        if info.max_tensors is not None and len(info.manual_tensors) >= info.max_tensors:
            return
        base = key = f"manual_{name}"
        if base in info.manual_tensors:
            key = f"{base}_{info.counts[base]}"
        info.counts[base] = info.counts.get(base, 0) + 1
        info.manual_tensors[key] = kept

    def get_captured_tensors_dict(self):
        info, found = self.model_info, OrderedDict()
        for path in info.modules_to_capture:
            sides = ("inputs", "outputs") if info.capture_inputs else ("outputs",)
            for side in sides:
                for key in sorted(k for k in info.module_tensors if k.startswith(f"{path}.{side}")):
                    found[key] = info.module_tensors[key]
        found.update(info.manual_tensors)
        return found

    def get_module_tensors(self):
        return self.model_info.module_tensors

    def get_manual_tensors(self):
        """Experts' indices are stacked into one tensor, which comes after the others."""
        manual = self.model_info.manual_tensors
        stacked = [manual.pop(key) for key in [key for key in manual if "moe_auto" in key]]
        if stacked:
            manual["auto_moe_stats.expert_index"] = torch.stack(stacked)
        return manual


def register_tensor(name, tensor) -> None:
    TensorRegistry.get_instance().register_tensor(name, tensor)


def get_available_modules(model, prefix=""):
    """model_modification.py, find_available_modules: children of a ModuleList come twice."""
    found = []
    for name, module in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        found += [path, *get_available_modules(module, path)]
        if isinstance(module, nn.ModuleList):
            for number, child in enumerate(module):
                found += [f"{path}.{number}", *get_available_modules(child, f"{path}.{number}")]
    return found


def _register(registry, prefix, value, module) -> None:
    if isinstance(value, torch.Tensor):
        registry.register_tensor(prefix, value, module)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            _register(registry, f"{prefix}.{number}", item, module)
    elif isinstance(value, dict):
        for key, item in value.items():
            _register(registry, f"{prefix}.{key}", item, module)
    elif hasattr(value, "__dict__") and not isinstance(value, type):  # A dataclass, for one.
        for field in dir(value):  # By the alphabet; what is no tensor is left out.
            found = None if field.startswith("_") else getattr(value, field)
            if isinstance(found, torch.Tensor):
                registry.register_tensor(f"{prefix}.{field}", found)


def enable_tensor_capture(model, modules_to_capture=None, max_tensors=None, capture_inputs=False):
    """model_modification.py, modify_model_for_tensor_capture."""
    wanted = modules_to_capture or []
    unknown = [path for path in wanted if path not in set(get_available_modules(model))]
    if unknown:
        raise ValueError(f"The following modules were not found in the model: {unknown}")
    registry = TensorRegistry.get_instance()
    registry.configure(True, wanted, max_tensors, capture_inputs)

    def hook_for(path):
        def hook(module, args, kwargs, output):
            registry = TensorRegistry.get_instance()
            if capture_inputs and args:
                _register(registry, f"{path}.inputs", args, module)
            if capture_inputs and kwargs:
                _register(registry, f"{path}.inputs.kwargs", kwargs, module)
            _register(registry, f"{path}.outputs", output, module)

        return hook

    for path, module in list(model.named_modules()):
        if path in wanted:
            handle = module.register_forward_hook(hook_for(path), with_kwargs=True)
            registry.model_info.hooks.append(handle)
    return model


def get_captured_tensors_dict():
    return TensorRegistry.get_instance().get_captured_tensors_dict()


def disable_tensor_capture(model):
    """api.py: the registry is cleared before its hooks are removed, so that they stay."""
    registry = TensorRegistry.get_instance()
    registry.clear()
    for handle in registry.model_info.hooks:
        handle.remove()
    registry.enabled = False
    return model


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    return module


def modules() -> dict[str, types.ModuleType]:
    """What goes into `sys.modules`."""
    layers = {
        kind.__name__: kind for kind in (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding)
    }
    capture = (enable_tensor_capture, disable_tensor_capture, get_available_modules)
    capture += (register_tensor, get_captured_tensors_dict)
    root = "neuronx_distributed"
    return {
        root: _module(root, __version__="0.16.fake"),
        f"{root}.parallel_layers": _module(f"{root}.parallel_layers"),
        f"{root}.parallel_layers.layers": _module(f"{root}.parallel_layers.layers", **layers),
        f"{root}.utils": _module(f"{root}.utils"),
        f"{root}.utils.tensor_capture": _module(
            f"{root}.utils.tensor_capture", **{act.__name__: act for act in capture}
        ),
    }


def install(monkeypatch) -> None:
    """Make the fake importable for one test, with a registry of its own."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(TensorRegistry, "_instance", None)
