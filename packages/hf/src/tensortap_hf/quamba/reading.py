"""What the codes of a captured run stand for."""

from __future__ import annotations

from typing import Any

import torch

from tensortap.store import Run


def values(run: Run, name: str, **at: Any) -> torch.Tensor:
    """The numbers of a tensor: codes times their scale in float32, other tensors as they are.

    `at` is what `run.tensor` takes (`step=`, `microbatch=`, `call=`). Makes tensors of modes with
    different dtypes comparable.
    """
    tensor = run.tensor(name, **at)
    if tensor.dtype != torch.int8:
        return tensor
    return tensor.float() * run.tensor(f"{name}_scale", **at)
