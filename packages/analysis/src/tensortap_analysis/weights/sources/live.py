"""The parameters of a live module, by its own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tensortap_analysis.weights.sources.source import Entry, Listing, Skipped
from tensortap_analysis.weights.weight import Kind

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROWS_ARE_INPUTS = "a transposed convolution: its rows are inputs, as they are read from a file"


def listing(module: nn.Module) -> Listing:
    """What its `state_dict` has; parameters shared by several modules are listed once."""
    skipped: list[Skipped] = []
    entries = list(_entries(module, skipped))
    describe = getattr(getattr(module, "config", None), "to_dict", None)
    facts = describe() if describe is not None else {}
    return Listing(tuple(entries), skipped=tuple(skipped), config=facts)


def _entries(module: nn.Module, skipped: list[Skipped]) -> Iterator[Entry]:
    first: dict[int, str] = {}
    owners = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            skipped.append(Skipped(name, "no tensor"))
            continue
        same = first.setdefault(id(tensor), name)
        if same != name:
            skipped.append(Skipped(name, f"tied to {same}: the same parameter, counted there"))
        elif reason := _unreadable(tensor):
            skipped.append(Skipped(name, reason))
        else:
            owner = owners.get(name.rpartition(".")[0])
            yield _entry(name, tensor, owner)


def _entry(name: str, tensor: torch.Tensor, owner: nn.Module | None) -> Entry:
    """Numbers are those that a file with the same weights gives, where nobody knows the owner."""
    turned = isinstance(owner, _TRANSPOSED) and tensor.ndim > 1
    return Entry(
        name, tuple(tensor.shape), tensor.dtype, _loader(tensor),
        # GPT-2's, which is no class of torch; a file tells it by the length of the bias.
        transposed=type(owner).__name__ == "Conv1D",
        kind=_kind(owner) if name.endswith("weight") and tensor.ndim == 2 else None,
        note=_ROWS_ARE_INPUTS if turned else None,
    )  # fmt: skip


def _kind(owner: nn.Module | None) -> Kind | None:
    """What its class says, whatever it is called."""
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    return "linear" if isinstance(owner, nn.Linear) else None


def _unreadable(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta or is_lazy(tensor):
        return "has no values yet"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor of torch is not read"
    if hasattr(tensor, "placements"):
        return "is sharded over ranks (DTensor); save it and scan the checkpoint"
    return None


def _loader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        values = tensor.detach()
        if type(values).dequantize is not torch.Tensor.dequantize:
            values = values.dequantize()  # torchao and others keep codes behind a float's face
        return values.as_subclass(torch.Tensor).cpu()

    return load
