"""One digest for one set of weights, wherever they lie."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tensortap_hf.fingerprint import fingerprint


class Tied(nn.Module):
    """Weights under two names, an empty buffer, a number, and extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("none", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(3))

    def get_extra_state(self) -> Any:
        return {"anything": object()}


def test_equal_weights_have_one_fingerprint_and_any_change_has_another() -> None:
    model = Tied().bfloat16()
    before = fingerprint(model)
    assert len(before) == 16
    assert fingerprint(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.embed.weight[4, 2] += 1
    changed = fingerprint(model)
    assert changed != before
    model.count += 1
    assert fingerprint(model) not in (changed, before)


def test_what_is_not_contiguous_has_the_fingerprint_of_its_values() -> None:
    plain, strided = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    strided.weight.data = plain.weight.data.T.contiguous().T
    assert fingerprint(strided) == fingerprint(plain)


def test_names_dtypes_and_shapes_count() -> None:
    zeros = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(zeros.weight)
    others = [copy.deepcopy(zeros).half(), nn.Sequential(zeros), nn.Linear(3, 2, bias=False)]
    nn.init.zeros_(others[2].weight)
    assert len({fingerprint(model) for model in (zeros, *others)}) == 4


def test_weights_that_lie_nowhere_count_by_their_shape() -> None:
    one, other = (nn.Linear(2, size, device="meta") for size in (3, 4))
    assert fingerprint(one) != fingerprint(other)
