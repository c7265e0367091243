"""The backend for the native `neuron` device (TorchNeuron, torch-neuronx for torch 2.13 and later).

Operations run eagerly there and in the background, as on CUDA; reading a tensor waits for all of
them. So hooks reduce and clone on the device, and at the end of a step there is one
synchronisation, after which everything is copied. The device has no float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from tensortap.backends import Allocate, Reduction, Snapshot
from tensortap.records import Statistics
from tensortap_neuron import reduction
from tensortap_neuron.pending import Clone, Pending, Vector, contiguous_clone, still_waiting

_WIDE = torch.float32


class NeuronBackend:
    """One for all native Neuron tensors; implements `tensortap.backends.DeferredBackend`.

    Clones wait on the device: at most `max_pending` bytes of them, then they are copied within
    the step, which costs one more synchronisation.
    """

    lazy = False

    def __init__(self) -> None:
        self._powers: dict[torch.device, torch.Tensor] = {}

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """Queue the reduction; its vector stays on the device."""
        layout = reduction.layout(tensor, exponents=exponents, wide=_WIDE)
        powers = self._powers_on(tensor.device) if exponents and tensor.numel() else None
        return Vector(layout, reduction.vector(tensor, layout, powers) if tensor.numel() else None)

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Queue a clone; it stays on the device."""
        clone = contiguous_clone(tensor, stride)
        return Clone(clone.nbytes, clone.shape, clone, lambda one: self.collect([], [one]))

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """One synchronisation, then the copies."""
        return self.collect(reductions, [])

    def collect(
        self, reductions: Sequence[Reduction], snapshots: Sequence[Snapshot]
    ) -> list[Statistics]:
        """One synchronisation for each device, then the copies."""
        vectors = cast("Sequence[Vector]", reductions)
        queued = still_waiting(cast("list[Pending]", [*vectors, *snapshots]))
        for device in {tensor.device for _, tensor in queued}:
            torch.get_device_module(device).synchronize(device)
        self._bring([(one, tensor) for one, tensor in queued if isinstance(one, Vector)])
        for one, tensor in queued:
            if isinstance(one, Clone):
                one.arrived(tensor.cpu())
        return [vector.statistics() for vector in vectors]

    def _bring(self, queued: Sequence[tuple[Pending, torch.Tensor]]) -> None:
        """All vectors of a device by one copy."""
        for device in {tensor.device for _, tensor in queued}:
            same = [(one, tensor) for one, tensor in queued if tensor.device == device]
            lengths = [tensor.numel() for _, tensor in same]
            found = torch.cat([tensor for _, tensor in same]).cpu()
            for (one, _), value in zip(same, torch.split(found, lengths), strict=True):
                one.arrived(value)

    def _powers_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._powers:
            self._powers[device] = reduction.powers_of_two(_WIDE, device)
        return self._powers[device]
