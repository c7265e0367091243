"""Where Megatron keeps the gradient of a parameter, and when its value is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def accumulated(parameter: nn.Parameter) -> torch.Tensor | None:
    """The gradient so far in this step, as `main_grad` will hold it.

    Called right after torch accumulated into `.grad`, which is before Megatron's
    DistributedDataParallel adds that to `main_grad` and begins to reduce over the ranks. A fused
    weight gradient is in `main_grad` already, and `.grad` is a placeholder.
    """
    found: Any = parameter
    main: torch.Tensor | None = getattr(found, "main_grad", None)
    fresh: torch.Tensor | None = parameter.grad
    if main is None or fresh is None:
        return fresh if main is None else main
    fused = getattr(found, "grad_added_to_main_grad", False)
    if fused and not getattr(found, "zero_out_wgrad", False):
        return main
    total: torch.Tensor = (main + fresh).to(main.dtype)
    return total


def late(module: nn.Module) -> bool:
    """Does Megatron gather the parameters of a module only when it begins to run?

    With `overlap_param_gather` DistributedDataParallel waits for them in a hook of each module.
    """
    words = (getattr(hook, "__qualname__", "") for hook in module._forward_pre_hooks.values())
    return any("DistributedDataParallel._make_forward_pre_hook" in word for word in words)
