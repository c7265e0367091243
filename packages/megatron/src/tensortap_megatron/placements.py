"""From what is known about a tensor's axes to the `Placement` of the piece this rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tensortap.integration import PlacementRule
from tensortap.records import Part, Placement
from tensortap_megatron.shards import Cut, whole


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its word in `dims`, how ranks share it, and how much of it is no padding."""

    word: str
    cut: Cut = whole
    valid: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a tensor is spread: its axes, the parts of a fused one, what is to be summed.

    `also` are modules whose tensor this is as well: the input of `attn.qkv` is that of `attn.q`.
    `otherwise` is the plan of what may be there instead, with another number of axes.
    `partial_gradient` are groups over which its gradient is to be summed. `unknown`: tokens of
    experts, in an order only the dispatcher knows.
    """

    axes: tuple[Axis, ...]
    parts: tuple[Part, ...] = ()
    also: tuple[str, ...] = ()
    partial_gradient: tuple[str, ...] = ()
    unknown: bool = False
    otherwise: Plan | None = None

    @property
    def dims(self) -> str:
        """As in `TensorRecord.dims`: `"seq batch (head dim)"`."""
        return " ".join(axis.word for axis in self.axes)

    def place(self, value: torch.Tensor, *, gradient: bool) -> Placement | None:
        """The placement of one piece; unknown when it has other axes than planned."""
        if self.otherwise is not None and value.dim() == len(self.otherwise.axes):
            return self.otherwise.place(value, gradient=gradient)
        if self.unknown or value.dim() != len(self.axes):
            return Placement(unknown=True)
        cuts = [axis.cut(length) for axis, length in zip(self.axes, value.shape, strict=True)]
        segments = {
            number: held for number, (length, held) in enumerate(cuts) if held != ((0, length),)
        }
        valid = {n: axis.valid for n, axis in enumerate(self.axes) if axis.valid is not None}
        partial = self.partial_gradient if gradient else ()
        shape = tuple(length for length, _ in cuts)
        parts = self.parts + tuple(Part(module, 0, ((0, shape[0]),)) for module in self.also)
        if not (segments or valid or partial or parts):
            return None
        return Placement(shape, segments, valid, partial, parts)


_SHARED = tuple(
    f"input.{word}"
    for word in ("attention_", "rotary_", "position_ids", "input_ids", "labels", "loss_mask", "2")
)
"""Beginnings of arguments that tensor parallelism does not split; a model's third is its mask."""

Plans = Mapping[str, Plan]
"""Tensor, without `grad_` -> its plan."""


@dataclass(frozen=True, slots=True)
class SitePlans:
    """The plans of everything captured at one module.

    `shared_arguments`: masks, positions and the like are the same on every rank.
    """

    activations: Plans = field(default_factory=dict)
    parameters: Plans = field(default_factory=dict)
    shared_arguments: bool = False

    @property
    def dims(self) -> dict[str, str]:
        """Named axes of tensors and parameters, as `Site.dims` wants them."""
        both = {**self.parameters, **self.activations}
        dims = {name: plan.dims for name, plan in both.items() if plan.otherwise is None}
        return dims | {f"grad_{name}": text for name, text in dims.items()}

    def rule(self, *, spread: bool) -> PlacementRule:
        """`spread`: ranks hold pieces, so that a tensor without a plan cannot be placed.

        Where none does, what is not as planned is whole all the same.
        """

        def place(phase: str, tensor: str, value: torch.Tensor) -> Placement | None:
            plans = self.parameters if phase in ("param", "grad") else self.activations
            backward = phase == "backward" and tensor.startswith("grad_")
            plan = plans.get(tensor.removeprefix("grad_") if backward else tensor)
            if plan is None:
                whole = self.shared_arguments and tensor.startswith(_SHARED)
                return Placement(unknown=True) if spread and not whole else None
            found = plan.place(value, gradient=backward or phase == "grad")
            return None if found is not None and found.unknown and not spread else found

        return place
