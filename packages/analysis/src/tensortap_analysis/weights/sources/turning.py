"""Which weights lie [in, out] in a checkpoint, where others lie [out, in]."""

from __future__ import annotations

from collections.abc import Sequence

from tensortap_analysis.weights.sources.source import Config, Entry

_UP, _DOWN = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"


def turned(entries: Sequence[Entry], config: Config) -> set[str]:
    """Names of weights that lie [in, out].

    A bias is as long as the outputs. Where that leaves a square matrix undecided, those of the
    same last word (`c_proj`) decide. Stacks of experts are told by the model's hidden size,
    and square ones by those beside them: gpt-oss has as many inputs as outputs in `down_proj`.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    votes: dict[str, list[bool]] = {}
    for entry in entries:
        rows, columns = entry.shape if len(entry.shape) == 2 else (0, 0)
        bias = shapes.get(entry.name.removesuffix("weight") + "bias")
        if rows != columns and bias in ((rows,), (columns,)):
            votes.setdefault(_word(entry.name), []).append(bias == (columns,))
    words = {word for word, all_ in votes.items() if all(all_)}
    flat = {e.name for e in entries if len(e.shape) == 2 and _word(e.name) in words}
    stacks = {e.name: e for e in entries if len(e.shape) == 3 and not e.decoded}
    decided = {name: found for name, entry in stacks.items()
               if (found := _stack_turned(entry, config)) is not None}  # fmt: skip
    siblings = {_parent(name): found for name, found in decided.items()}
    lying = {name: decided.get(name, siblings.get(_parent(name), False)) for name in stacks
             if _last(name) in (*_UP, _DOWN)}  # fmt: skip
    return flat | {name for name, is_turned in lying.items() if is_turned}


def _word(name: str) -> str:
    """`c_proj` of `h.0.attn.c_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else name


def _stack_turned(entry: Entry, config: Config) -> bool | None:
    """Does `gate_up_proj` [experts, hidden, …] or `down_proj` [experts, …, hidden] lie [in, out]?

    `None` where nobody knows: the hidden size is not known, or both axes have it.
    """
    hidden, sides = config.get("hidden_size"), entry.shape[1:]
    if hidden not in sides or sides[0] == sides[1]:
        return None
    first_is_hidden = bool(sides[0] == hidden)
    word = _last(entry.name)
    if word in _UP:
        return first_is_hidden
    return not first_is_hidden if word == _DOWN else None


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _parent(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]
