"""`prepare`: from a selection of tensortap names to what a model is compiled to hand out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensortap.errors import ConfigError, NotSupported, SelectionError
from tensortap.names import TensorName
from tensortap.selection import Selection, closest
from tensortap_neuron.traced.capture import Capture
from tensortap_neuron.traced.described import Described, describe
from tensortap_neuron.traced.naming import expert_index, names_of

_STREAM = r"embed|layers\.\d+|final_norm"
HIDDEN_STATES = f"re:({_STREAM})/forward/output"
"""The outputs of the embedding, every decoder layer and the final norm."""
EVERY_LAYER = f"re:({_STREAM}|lm_head)/forward/output"
"""The same, and the logits."""


def prepare(
    model_or_config: Any,
    select: str = EVERY_LAYER,
    *,
    modules: Any = None,
    manual: Sequence[str] = (),
    moe: bool = False,
) -> Capture:
    """Turn a selection into a capture, before the model is compiled.

    `model_or_config` is a model on NxD's layers, an NxDI application or its configuration, a
    Hugging Face configuration, or the folder of a checkpoint. `select` are globs over tensortap
    names (`"layers.*/forward/output,!layers.*.*/*"`). From a configuration only the modules are
    known that every model of its type has; `modules` are then the paths that NxDI's
    `list_capturable_modules_in_application` lists. `manual` are names for the tensors that the
    model's code hands to `register_tensor`, in the order in which it does; `moe` also captures
    which experts tokens are routed to.

    Raises `SelectionError` naming near matches when a pattern matches nothing, `NotSupported`
    for a NeuronConfig under which NxDI drops what is captured.
    """
    selection = Selection.parse(select)
    by_hand = tuple(str(_forward(name)) for name in manual)
    found = describe(model_or_config, modules)
    if found.problem is not None:
        raise NotSupported(f"Nothing would be captured: {found.problem}.")
    names = names_of(found.modules)
    offered = {path: tuple(_offered(path, name, found)) for path, name in names.items()}
    chosen = [path for path in names if any(map(selection.matches, offered[path]))]
    _require_apart(by_hand, names)
    experts = [str(expert_index(layer)) for layer in range(found.facts.layers)] if moe else []
    known = [name for some in offered.values() for name in some]
    _require_matches(selection, found, names, known, extra=[*manual, *experts])
    if not (chosen or manual or moe):
        raise selection.nothing_in(
            [f"{name}/forward/output" for name in names.values()], "this model"
        )
    selected = [name for name in known if selection.matches(name)]
    return Capture(
        names={path: names[path] for path in chosen},
        select=selection.text,
        inputs=any(name.endswith("/input") for name in selected),
        manual=by_hand,
        moe=moe,
        facts=found.facts,
    )


def _require_apart(manual: Sequence[str], names: dict[str, str]) -> None:
    """Raise `ConfigError` where a name given by hand is another's: one moment has one of each."""
    own = {f"{name}/forward/{word}" for name in names.values() for word in ("output", "input")}
    for place, name in enumerate(manual):
        if name in own or name in manual[:place]:
            raise ConfigError(f"manual: {name} is the name of another tensor; choose a new one.")


def _offered(path: str, name: str, found: Described) -> Iterator[str]:
    """The tensors of a module that can be captured."""
    if path not in found.inputs_only:
        yield f"{name}/forward/output"
    yield f"{name}/forward/input"


def _forward(name: str) -> TensorName:
    parsed = TensorName.parse(name)
    if parsed.phase != "forward":
        raise ConfigError(f"{name}: a compiled model has forward tensors only.")
    return parsed


def _require_matches(
    selection: Selection,
    found: Described,
    names: dict[str, str],
    known: list[str],
    *,
    extra: Sequence[str],
) -> None:
    """Raise when an including pattern matches nothing: before an hour of compiling, not after."""
    dead = [
        text for text in selection.dead([*known, *extra], []) if f"!{text}" not in selection.text
    ]
    if not dead:
        return
    raise SelectionError(
        f"{', '.join(map(repr, dead))} {'matches' if len(dead) == 1 else 'match'} nothing that "
        f"can be captured in this model. Closest: {', '.join(closest(dead[0], known))}."
        f"{_hint(dead[0], names, found)}"
    )


def _hint(pattern: str, names: dict[str, str], found: Described) -> str:
    """What is most likely wrong with a pattern: NxD's own path, the form, or what is known."""
    if _matches_attention(pattern, names, found):
        return (
            " Of what attention returns NxDI hands out cos_cache, the first by the alphabet; what "
            "other frameworks call its output is that of attn.out."
        )
    if pattern.startswith("lm_head") and "lm_head" not in found.modules:
        return (
            " NxD cannot hand out logits of a vocabulary that tp_degree does not divide: it fails "
            "when it cuts the padding of all ranks off the piece of one."
        )
    said = ""
    for native, name in _renamed(names).items():
        if native in pattern.split("/")[0].split("."):
            said += f" {native!r} is called {name!r} here."
    for word in ("output", "input"):
        if "/" not in pattern and pattern.endswith(f".{word}"):
            said += f" An {word} is written {pattern.removesuffix(f'.{word}')}/forward/{word}."
    if not found.complete and not said:
        said = (
            " A configuration tells only these modules; give modules=, from NxDI's "
            "list_capturable_modules_in_application(app), to capture others."
        )
    return said


def _matches_attention(pattern: str, names: dict[str, str], found: Described) -> bool:
    selection = Selection.parse(pattern)
    return any(selection.matches(f"{names[path]}/forward/output") for path in found.inputs_only)


def _renamed(names: dict[str, str]) -> dict[str, str]:
    """Last word of a path -> last word of its name, where they differ."""
    last = ((path.rpartition(".")[2], name.rpartition(".")[2]) for path, name in names.items())
    return {native: name for native, name in last if native != name}
