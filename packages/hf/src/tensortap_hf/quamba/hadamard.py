"""Orthogonal Hadamard matrices, and products with them in n log n.

Sizes are 2**k, 12 * 2**k and 40 * 2**k (768 = 12 * 64, 1536 = 12 * 128, 2560 = 40 * 64). A matrix
is the Kronecker product of a base of size 1, 12 or 40 and Sylvester's matrix, divided by sqrt(n):

    H12   Paley's second construction over GF(5), symmetric
    H40   [[P, P], [P, -P]] of P, Paley's first construction over GF(19); used transposed

These are the matrices of the library fast-hadamard-transform, row for row, so that a tensor is in
the same basis here as in a model that Quamba rotated. Source: R. Paley, On orthogonal matrices,
1933.
"""

from __future__ import annotations

import functools
import math

import torch

from tensortap.errors import NotSupported

_LARGEST = 64
"""Sylvester's matrix is applied in factors of at most this size: each is one small product."""


def matrix(n: int) -> torch.Tensor:
    """The orthogonal matrix H of size n; float64. Raises `NotSupported` for another size."""
    factors = _factors(n)
    return functools.reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64)) / math.sqrt(
        n
    )


def transform(x: torch.Tensor) -> torch.Tensor:
    """`x @ H` along the last axis; in the dtype of `x`, 16-bit tensors in float32."""
    return _transform(x, transpose=False)


def inverse(x: torch.Tensor) -> torch.Tensor:
    """`x @ H.T` along the last axis: undoes `transform`."""
    return _transform(x, transpose=True)


def refusal(n: int) -> str | None:
    """Why there is no Hadamard matrix of this size here, as a sentence; `None`: there is one."""
    if _split(n) is None:
        return f"There is a Hadamard matrix of size 2**k, 12 * 2**k and 40 * 2**k, not of {n}."
    return None


def _transform(x: torch.Tensor, *, transpose: bool) -> torch.Tensor:
    n = x.shape[-1]
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = _factors(n)
    values = working.reshape(-1, *(len(factor) for factor in factors))
    for axis, factor in enumerate(factors, start=1):
        factor = factor.to(device=values.device, dtype=values.dtype)
        values = _along(values, factor.T if transpose else factor, axis)
    return values.reshape(x.shape) / math.sqrt(n)


def _along(values: torch.Tensor, factor: torch.Tensor, axis: int) -> torch.Tensor:
    """The product of one axis with a small matrix."""
    return (values.movedim(axis, -1) @ factor).movedim(-1, axis)


def _factors(n: int) -> tuple[torch.Tensor, ...]:
    """Kronecker factors with entries of +-1, none of them scaled."""
    split = _split(n)
    if split is None:
        raise NotSupported(str(refusal(n)))
    base, rest = split
    factors = [_BASES[base]()] if base > 1 else []
    while rest > 1:
        size = min(rest, _LARGEST)
        factors.append(_sylvester(size))
        rest //= size
    return tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),)


def _split(n: int) -> tuple[int, int] | None:
    """(base, power of two) of a size, or `None`."""
    for base in (40, 12, 1):
        rest, odd = divmod(n, base)
        if not odd and rest > 0 and rest & (rest - 1) == 0:
            return base, rest
    return None


@functools.cache
def _sylvester(n: int) -> torch.Tensor:
    """H(2n) = [[H, H], [H, -H]]; n is a power of two."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(_SIGNS, _sylvester(n // 2))


_SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


@functools.cache
def _h12() -> torch.Tensor:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C the conference matrix of GF(5)."""
    conference = torch.ones(6, 6, dtype=torch.float64).fill_diagonal_(0)
    conference[1:, 1:] = _jacobsthal(5)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, _SIGNS) + torch.kron(torch.eye(6, dtype=torch.float64), diagonal)


@functools.cache
def _h40() -> torch.Tensor:
    """The transpose of [[P, P], [P, -P]]; P = I + S of the skew matrix S of GF(19)."""
    paley = torch.ones(20, 20, dtype=torch.float64)
    paley[0, 1:] = -1
    paley[1:, 1:] = torch.eye(19, dtype=torch.float64) - _jacobsthal(19)
    return torch.kron(_SIGNS, paley).T.contiguous()


_BASES = {12: _h12, 40: _h40}


def _jacobsthal(q: int) -> torch.Tensor:
    """Q[i, j] = 1 where j - i is a square modulo the prime q, -1 where it is not, 0 for i = j."""
    squares = {i * i % q for i in range(1, q)}
    row = [0.0, *(1.0 if d in squares else -1.0 for d in range(1, q))]
    return torch.tensor(
        [[row[(j - i) % q] for j in range(q)] for i in range(q)], dtype=torch.float64
    )
