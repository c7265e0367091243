"""Names and places of models on NxD's layers that run eagerly: `NXD_CPU_MODE=1`, `app.to_cpu()`.

Found through the entry point `neuronx_distributed`. Ordinary hooks fire in such a model, on each
rank, so that `tensortap.attach` captures it; what is missing is how its tensors lie over ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensortap.generation import make_one_step
from tensortap.integration import Observer, PlacementRule, Site
from tensortap.records import Placement
from tensortap.undo import Undo
from tensortap.wrappers import unwrapped_modules
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.heads import Heads, replicated
from tensortap_neuron.traced.layers import (
    Group,
    Lies,
    all_lies,
    group_of,
    kind,
    place,
    weight_placement,
)
from tensortap_neuron.traced.naming import is_attention, names_of
from tensortap_neuron.traced.placing import Side, lie_of, on_stream

_SHARED = ("input.attention_", "input.position_ids", "input.seq_ids", "input.rotary_")
"""Beginnings of arguments that every rank is given whole."""
_ATTENTION = {"output.hidden_states": "output"}
"""What attention returns first: the first of a tuple elsewhere, a field by its name here."""


class Nxd:
    """Names and places eager models on NxD's parallel layers; anything that holds one is served."""

    name = "nxd"
    precedence = 12

    def refuse(self, model: nn.Module) -> str | None:
        """No parallel layer of NxD in it."""
        if any(kind(module) is not None for module in model.modules()):
            return None
        return f"{type(model).__name__} holds no parallel layer of neuronx-distributed."

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Every module under its canonical name."""
        spread = _Spread.of(model)
        modules = [
            (native, _below(path, spread.base), module)
            for native, path, module in unwrapped_modules(model)
        ]
        names = names_of(path for _, path, _ in modules)
        return [
            Site(
                names[path],
                native,
                module,
                dims={"output": "batch seq hidden"} if on_stream(path) else {},
                placement=spread.rule(module, path),
                words=_ATTENTION if is_attention(path) else {},
            )
            for native, path, module in modules
        ]

    def install(
        self, model: nn.Module, sites: Sequence[Site], observer: Observer, undo: Undo
    ) -> None:
        """Hooks see all there is; `generate` of the adapter around an application is a step."""
        make_one_step(model, observer, undo)

    def describe(self, model: nn.Module) -> Mapping[str, Any]:
        """Configuration, the group of tensor parallelism, the version of NxD."""
        config = getattr(model, "config", None)
        plain = {k: v for k, v in vars(config).items() if _is_plain(v)} if config else {}
        package = sys.modules.get("neuronx_distributed")
        return {
            "model_config": plain,
            "parallel": _parallel(model),
            "versions": {"neuronx-distributed": str(getattr(package, "__version__", "?"))},
        }


integration = Nxd()


@dataclass(frozen=True, slots=True)
class _Spread:
    """How a model is spread: the path of the model inside of its wrappers, group and facts."""

    base: str
    group: Group
    facts: Facts
    heads: Mapping[nn.Module, Heads]
    lies: Mapping[nn.Module, Lies]

    @classmethod
    def of(cls, model: nn.Module) -> _Spread:
        base = _base(model)
        layers = [module for module in model.modules() if kind(module) is not None]
        groups = [group_of(module) for module in layers]
        group = max(groups, key=lambda one: one.size, default=Group())
        inner = model.get_submodule(base)
        split = bool(getattr(inner, "sequence_parallel_enabled", False))
        facts = Facts(tp=group.size, sequence_parallel=split)
        return cls(base, group, facts, replicated(model), all_lies(model))

    def rule(self, module: nn.Module, path: str) -> PlacementRule:
        """What is known of the tensors at one module."""

        def rule(phase: str, tensor: str, value: torch.Tensor) -> Placement | None:
            shape = tuple(value.shape)
            if self.group.size == 1:
                return None
            if phase in ("param", "grad"):
                return self._parameter(module, phase, tensor, shape)
            return self._activation(module, path, tensor, shape)

        return rule

    def _parameter(
        self, module: nn.Module, phase: str, tensor: str, shape: tuple[int, ...]
    ) -> Placement | None:
        if module in self.heads:
            axis = 1 if kind(module) == "RowParallelLinear" else 0
            return self.heads[module].place(shape, axis, self.group)
        if kind(module) is not None:
            return weight_placement(module, tensor, shape, group_of(module))
        # Ranks that see other positions each have a share of a norm's gradient.
        split = phase == "grad" and self.facts.sequence_parallel
        return Placement(unknown=True) if split else None

    def _activation(
        self, module: nn.Module, path: str, tensor: str, shape: tuple[int, ...]
    ) -> Placement | None:
        word = tensor.removeprefix("grad_")
        if word not in ("input", "output"):
            return None if word.startswith(_SHARED) else Placement(unknown=True)
        side: Side = "input" if word == "input" else "output"
        lies = self.lies.get(module)
        if lies is not None:
            lie = lies.output if side == "output" else lies.input
        elif path in ("", self.base):
            return None if side == "input" else Placement(unknown=True)
        else:
            lie, lies = lie_of(path, side, self.facts, prefill=True)
        if module in self.heads and lie == "last":
            return self.heads[module].place(shape, len(shape) - 1, self.group)
        if lie == "sum" and tensor.startswith("grad_"):
            return None  # The gradient of a sum is that of each summand.
        pad = lies.output_pad if side == "output" else lies.input_pad
        stride = lies.stride if side == "output" else 1
        return place(lie, shape, self.group, lies, pad=pad, stride=stride)


def _base(model: nn.Module) -> str:
    """Path of the module that holds the layers; an application has it in its submodels."""
    holding = (
        path
        for path, module in model.named_modules()
        if isinstance(module._modules.get("layers"), nn.ModuleList)
    )
    return next(holding, "")


def _below(path: str, base: str) -> str:
    """The path inside of `base`; as it is for what is elsewhere, and for `base` itself."""
    return path.removeprefix(f"{base}.") if base else path


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _parallel(model: nn.Module) -> dict[str, int]:
    """Size of tensor parallelism, this rank's place in it, and the group's first rank."""
    for module in model.modules():
        found: Any = None
        if kind(module) is not None:
            found = getattr(module, "tensor_parallel_group", None)
            found = found or getattr(module, "tensor_model_parallel_group", None)
        if isinstance(found, torch.distributed.ProcessGroup):
            first = torch.distributed.get_process_group_ranks(found)[0]
            return {"tp": found.size(), "tp_rank": found.rank(), "tp_first": first}
    return {}
