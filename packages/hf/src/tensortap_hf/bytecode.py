"""What the code of a module class refers to, without running it.

transformers looks attention and state-space functions up by name when a module runs. Which names
a class uses is in its code, for hundreds of classes, so no table of classes is needed.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_BASES = ("torch.nn.modules.module", "transformers.modeling_utils")


def words(kind: type) -> frozenset[str]:
    """Every global and attribute that the code of a module class mentions."""
    return _words(kind)


@lru_cache(maxsize=4096)
def _words(kind: type) -> frozenset[str]:
    names = (code.co_names for f in _functions(kind) for code in _codes(f.__code__))
    return frozenset(itertools.chain.from_iterable(names))


def _functions(kind: type) -> tuple[FunctionType, ...]:
    """The undecorated functions of a module class and the module classes it builds on."""
    classes = (c for c in kind.__mro__ if issubclass(c, nn.Module) and c.__module__ not in _BASES)
    members = (inspect.unwrap(f) for c in classes for f in vars(c).values() if callable(f))
    return tuple(f for f in members if isinstance(f, FunctionType))


def namespaces(kind: type, word: str) -> list[dict[str, Any]]:
    """The modules, as dictionaries, in which the code of a class looks `word` up."""
    found = {
        id(f.__globals__): f.__globals__
        for f in _functions(kind)
        if word in f.__globals__ and any(word in code.co_names for code in _codes(f.__code__))
    }
    return list(found.values())


def never_calls(kind: type, child: str) -> bool:
    """Does the code of a class only ever read the weight and bias of this child?

    Hooks on such a child never fire: its parameters are handed to a function.
    """
    return not any(
        here.argval == child
        and here.opname.startswith("LOAD_")
        and after.argval not in ("weight", "bias")
        for f in _functions(kind)
        if f.__name__ != "__init__"
        for code in _codes(f.__code__)
        for here, after in _pairs(code)
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _pairs(code: CodeType) -> Iterator[tuple[dis.Instruction, dis.Instruction]]:
    instructions = list(dis.get_instructions(code))
    return itertools.pairwise(instructions)
