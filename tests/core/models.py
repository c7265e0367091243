"""Small modules that the tests of the core tap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


class Mlp(nn.Module):
    """Two linears; enough for gradients, parameters and three levels of names."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Stack(nn.Module):
    """`depth` residual MLPs."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return x


class Inside(nn.Module):
    """Calls a function as a module: `Inside(f)(x) == f(x)`."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.function(*args, **kwargs)  # type: ignore[operator]


@dataclass
class Pair:
    """A dataclass output."""

    hidden: torch.Tensor
    extra: dict[str, torch.Tensor]
