"""A fake of TorchNeuron's `neuron` device, for machines without one.

TorchNeuron registers `neuron` through PyTorch's PrivateUse1 ("What is TorchNeuron?", AWS Neuron
documentation 2.33); operations run in the background until `torch.neuron.synchronize()` or the
read of a value; there is no float64. The fake keeps real tensors of that device type, with their
own storage, and runs every operation on the host at once, through a fallback for all of ATen. It
counts what would have waited. What it cannot show is timing, and which operations TorchNeuron
itself falls back to the host for.

PrivateUse1 can be named once in a process and never back: use it in a process of its own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

waits: Counter[str] = Counter()
"""How often each thing was done that waits for the device: "synchronize", "read"."""

_EXTENSION_DEVICE = 12  # DLPack's kDLExtDev, which torch reads as PrivateUse1.
_HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_memory: dict[int, torch.Tensor] = {}
_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_capsule.restype, _capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class FakeNeuronModule:
    """`torch.neuron`, as far as torch and tensortap call it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """No random numbers are made on the device."""

    def synchronize(self, device: object = None) -> None:
        waits["synchronize"] += 1


def install() -> None:
    """Make `device="neuron"` work in this process."""
    _setup_privateuseone_for_python_backend("neuron", backend_module=FakeNeuronModule())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    install.library = library  # type: ignore[attr-defined]  # Registered while it lives.


@torch.compiler.disable
def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on tensors of the device."""
    if op._schema.name == "aten::_copy_from":
        source, target = args[:2]
        if _is_here(source) and not _is_here(target):
            waits["read"] += 1
        _on_host(target).copy_(_on_host(source))
        return target
    if op._schema.name == "aten::_local_scalar_dense":
        waits["read"] += 1
    if any(tensor.dtype is torch.float64 for tensor in args if _is_here(tensor)):
        raise TypeError(f"{op}: Neuron devices have no float64")
    host_args, host_kwargs = tree_map(_on_host, (_tensors(op, args), kwargs))
    out = op(*host_args, **host_kwargs)
    written = _written(op, args, kwargs)
    for one, host in zip(written, _written(op, host_args, host_kwargs), strict=True):
        if host.size() != one.size():  # An `out=` argument was resized.
            new = _to_device(host)
            place = (new.untyped_storage(), 0, new.size(), new.stride())
            torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_HOST, one, *place)
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    returned = op._schema.returns
    if returned and returned[0].alias_info:
        base = next(one for one in args if _is_here(one))
        return tree_map(lambda one: _view(base, one), out)
    return tree_map(_to_device, out)


def _tensors(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers come back from the fallback as numbers, where the schema has tensors."""
    return tuple(
        torch.tensor(one) if isinstance(one, (int, float)) and str(wanted.type) == "Tensor" else one
        for one, wanted in zip(args, op._schema.arguments, strict=False)
    )


def _is_here(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "neuron"


def _on_host(value: Any) -> Any:
    """The same memory as a CPU tensor; `device=` arguments as the CPU; anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "neuron" else value
    if not _is_here(value):
        return value
    flat = _memory[value.untyped_storage()._cdata].view(value.dtype)
    return torch.as_strided(flat, value.size(), value.stride(), value.storage_offset())


def _to_device(value: Any) -> Any:
    """A new tensor of the device with the values of one on the host."""
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach().contiguous().clone()
    whole = plain if plain.numel() else torch.zeros(1, dtype=plain.dtype)
    memory = whole.reshape(-1).view(torch.uint8)
    capsule = memory.__dlpack__()
    # In a DLTensor the device type follows the pointer to the data.
    ctypes.c_int32.from_address(_capsule(capsule, b"dltensor") + 8).value = _EXTENSION_DEVICE
    raw = torch._C._from_dlpack(capsule)
    _memory[raw.untyped_storage()._cdata] = memory
    return _view(torch.ops.aten.view.dtype.redispatch(_HOST, raw, plain.dtype), plain)


def _view(base: torch.Tensor, like: Any) -> Any:
    if not isinstance(like, torch.Tensor):
        return like
    place = (like.size(), like.stride(), like.storage_offset())
    return torch.ops.aten.as_strided.default.redispatch(_HOST, base, *place)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments an in-place or `out=` operation returns."""
    named = dict(zip((one.name for one in op._schema.arguments), args, strict=False)) | kwargs
    return [
        named[one.name]
        for one in op._schema.arguments
        if one.alias_info and one.alias_info.is_write and one.name in named
    ]
