"""`measure`: the metrics of one matrix, by method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tensortap_analysis.weights.measures.blas import one_thread
from tensortap_analysis.weights.measures.facts import Facts
from tensortap_analysis.weights.measures.norms import norms
from tensortap_analysis.weights.measures.quantization import quantization
from tensortap_analysis.weights.measures.sparsity import sparsity
from tensortap_analysis.weights.measures.spectral import spectral
from tensortap_analysis.weights.options import Options

_METHODS: dict[str, Callable[[Facts, Options], dict[str, Any]]] = {
    "spectral": spectral,
    "quantization": quantization,
    "sparsity": sparsity,
    "norms": norms,
}


@torch.no_grad()
def measure(
    matrix: torch.Tensor, dtype: torch.dtype, methods: Iterable[str], options: Options
) -> dict[str, dict[str, Any]]:
    """Metrics of a 2-d CPU matrix [out, in] whose values were stored in `dtype`, by method.

    Safe to call from several threads; see the contract in `tensortap_analysis.weights.weight`.
    """
    facts = Facts(matrix.detach().contiguous(), dtype)
    with one_thread():
        return {name: _METHODS[name](facts, options) for name in methods}
