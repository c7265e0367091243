"""The process groups a Megatron model is spread over, and this rank's place in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Group:
    """Size of a group, this rank's place in it, and the global rank of its first member."""

    size: int = 1
    rank: int = 0
    first: int = 0


_ALONE = Group()


@dataclass(frozen=True, slots=True)
class Parallel:
    """Groups by their short names: tp, cp, dp, pp, and for experts ep, etp, edp.

    `embd` joins the first and last pipeline stage, which both hold a tied embedding. A group
    that was never made counts as one of a single rank.
    """

    groups: Mapping[str, Group] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Group:
        return self.groups.get(name, _ALONE)

    @property
    def spread(self) -> bool:
        """Does any rank hold less than the whole of an activation?"""
        return any(self[name].size > 1 for name in ("tp", "cp", "ep", "etp"))

    def described(self) -> dict[str, int]:
        """As in `RunInfo.parallel`: sizes, `…_rank` and `…_first`."""
        found: dict[str, int] = {}
        for name, group in self.groups.items():
            found |= {name: group.size, f"{name}_rank": group.rank, f"{name}_first": group.first}
        return found


_COLLECTION = {"expt_tp": "etp", "expt_dp": "edp"}
_NAMES = ("tp", "cp", "dp", "pp", "embd", "ep", "expt_tp", "expt_dp")


def parallel_of(model: nn.Module) -> Parallel:
    """The groups a model was built with, or else Megatron's global ones; issues no collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Parallel()
    own = _collection(model)
    found = {}
    for name in _NAMES:
        process_group = getattr(own, name, None) or _global(name)
        group = _measured(process_group)
        if group is not None:
            found[_COLLECTION.get(name, name)] = group
    return Parallel(found)


def _collection(model: nn.Module) -> Any:
    """The groups that a model, or the one inside of it, was built with; named so since 0.15."""
    for module in model.modules():
        for word in ("pg_collection", "model_comm_pgs"):
            found = getattr(module, word, None)
            if found is not None:
                return found
    return None


def _measured(process_group: Any) -> Group | None:
    """`None` for a group that was never made, or that this rank is no member of."""
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        return None
    ranks = torch.distributed.get_process_group_ranks(process_group)
    here = torch.distributed.get_rank()
    return Group(len(ranks), ranks.index(here), ranks[0]) if here in ranks else None


def _global(name: str) -> Any:
    from megatron.core import parallel_state

    getters: Mapping[str, Callable[..., Any]] = {
        "tp": parallel_state.get_tensor_model_parallel_group,
        "cp": parallel_state.get_context_parallel_group,
        "dp": parallel_state.get_data_parallel_group,
        "pp": parallel_state.get_pipeline_model_parallel_group,
        "embd": parallel_state.get_embedding_group,
        "ep": parallel_state.get_expert_model_parallel_group,
        "expt_tp": parallel_state.get_expert_tensor_parallel_group,
        "expt_dp": parallel_state.get_expert_data_parallel_group,
    }
    try:
        return getters[name]()
    except AssertionError:  # How Megatron says that a group was never made.
        return None
