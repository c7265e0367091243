"""`Weight`: one parameter of a checkpoint or a live module, read when it is needed.

Contract with the measures (`tensortap_analysis.weights.measures`)
------------------------------------------------------------------
The engine calls, once per matrix, from one of several worker threads at once:

    from tensortap_analysis.weights.measures import measure
    measure(matrix, dtype, methods, options) -> {method: {metric: value}}

- `matrix`: a 2-d CPU tensor in its stored dtype (float64, float32, float16, bfloat16, or a
  float8), [out, in], contiguous, possibly mapped from a file: read it in blocks, never write to
  it, never convert a 16-bit one as a whole. An embedding is [vocabulary, hidden], a convolution
  [out, in x kernel], a vector [1, n] (and then only "sparsity" and "norms" are asked for), a stack
  of experts comes matrix by matrix. It may be empty, and hold NaN or infinities.
- `dtype`: what the values were stored in. It differs from `matrix.dtype` where the engine has
  dequantised (float8 with scales: `matrix` is float32, `dtype` float8_e4m3fn; int8: torch.int8).
  What is resolved is decided by `dtype`.
- `methods`: some of `options.METHODS`; the answer has exactly these keys. One call for all of
  them lets them share a pass over the values.
- `options`: `Options`.

Values are Python's own `int`, `float` (infinities allowed, NaN not), `bool`, `str`, `None`, lists
and dictionaries of them; no tensors, no numpy. The same matrix gives the same answer to the last
bit, whatever else runs: torch computes with one thread in each worker.

`answer[method]["unresolved"]` is a dictionary from metric to a sentence, empty where all is known.
It holds two cases. A metric that the stored dtype cannot know keeps the value of the matrix as it
is stored, which the classic rules judge, and is named there: `{"condition_number": "stored in
bfloat16, which resolves condition numbers up to 593"}`. A metric that cannot be computed (NaN, no
element, zero divided by zero) is `None`, and is named there too. Expected metrics:

    spectral      s_max s_min spectral_norm condition_number condition_number_at_least
                  condition_number_alive (without vectors of zeros) resolution
                  stable_rank total_rank rank_tolerance effective_rank energy_rank_90
                  energy_rank_99 full_rank (= min(rows, columns))   [spectrum]
    quantization  extreme_outlier_percentage dynamic_range dynamic_range_rms kurtosis
                  sqnr_db sqnr_db_per_channel   formats: {name: sqnr_db}
    sparsity      rows columns zeros near_zeros near_zero_threshold zero_fraction
                  near_zero_fraction dead_rows dead_columns duplicated_rows
    norms         l1 l2 max mean std row_norm_min row_norm_max row_norm_mean row_norm_spread
                  nan inf outlier_rows outlier_rows_at outlier_columns outlier_columns_at
                  faint_rows faint_rows_at largest_at

More metrics are welcome; these are the ones that rules and reports name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["linear", "embedding", "convolution", "experts", "table", "vector"]
"""What a weight is read as.

`experts` is any stack of matrices, the first axis counting them; a `table` has two axes and is no
factor of a product (the `A_log` of a state space model, biases by relative position).
"""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter: what it is called, how it lies, and a way to its values.

    `name` is the native one in full (`model.layers.3.self_attn.q_proj.weight`), `layer` what
    reports call it: the module's native path, or `name` where the parameter is not the module's
    `weight`. `shape` is that of the values, `dtype` what they are stored in (before dequantising).
    `transposed`: a linear layer's weight lies [in, out]. `note` says what was assumed. `load`
    gives the values, `load_parts` those of a stack one by one, where reading all would be wasteful.
    `offset` is what the model adds to the values: 1 for the gains of Gemma's normalisations.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    load_parts: Callable[[], Iterator[torch.Tensor]] | None = field(
        default=None, repr=False, compare=False
    )
    transposed: bool = False
    note: str | None = None
    offset: float = 0.0

    @property
    def parameter(self) -> str:
        """`weight`, `bias`, `in_proj_weight`: the last word of the name."""
        return self.name.rpartition(".")[2]

    @property
    def has_spectrum(self) -> bool:
        """Is it a matrix, or several, by which inputs are multiplied or whose rows they pick?"""
        return self.kind not in ("table", "vector")

    @property
    def numel(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in their stored dtype."""
        return self.numel * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The values, in `shape`: mapped from the file where possible; do not write to them."""
        return self.load()

    def matrices(self) -> Iterator[torch.Tensor]:
        """The values as measures take them: [out, in], contiguous; of a stack one by one."""
        for one in self._parts():
            rows, below = (one.shape[0], one.shape[1:]) if one.ndim > 1 else (1, one.shape)
            matrix = one.reshape(rows, math.prod(below))
            yield (matrix.T if self.transposed else matrix).contiguous()

    def _parts(self) -> Iterator[torch.Tensor]:
        if self.kind != "experts":
            yield self.load()
        elif self.load_parts is not None:
            yield from self.load_parts()
        else:
            yield from self.load().unbind()
