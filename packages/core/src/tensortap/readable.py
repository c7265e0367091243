"""Tensors as they come by: whether their values can be read here, and what subclasses stand for."""

from __future__ import annotations

import sys

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_META = "meta tensor: it has a shape but no data"
NOTES = (_META,)
"""Reasons that are nobody's mistake: worth a note in the coverage, and no gap."""


def unreadable(tensor: torch.Tensor) -> str | None:
    """Why the values of a tensor cannot be read here, or `None`."""
    if type(tensor) not in _PLAIN and not _has_memory(tensor):
        return f"{type(tensor).__name__}: a tensor subclass without memory of its own"
    if tensor.device.type == "meta":
        return _META
    if tensor.is_nested:
        return "nested tensor: not supported"
    if tensor.layout is not torch.strided:
        return f"{tensor.layout} tensor: only strided tensors are supported"
    if tensor.is_quantized:
        return "torch.quantized tensor: not supported, capture what it was made from"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside a torch.func transform: the tensor has no values of its own"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    """Wrapper subclasses and fake tensors have shapes but no bytes: reading them would crash."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
    if isinstance(tensor, fake):
        return False
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # How functional tensors say no.
        return False


def unwrapped(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What a tensor subclass stands for, and whether that is all of the logical tensor.

    Of a DTensor it is the piece this rank holds. What torch_xla shards is whole as far as the
    program can tell, and is a DTensor in name only. Any other subclass stands for itself.
    """
    if type(tensor) in _PLAIN:
        return tensor, True
    if type(tensor).__module__.startswith("torch_xla."):
        return getattr(tensor, "global_tensor", tensor), True
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and isinstance(tensor, dtensor):
        local: torch.Tensor = tensor.to_local()
        return local, False
    return tensor, True
