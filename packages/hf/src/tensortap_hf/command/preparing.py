"""What comes before a capture: the model, its modes, and the inputs, read and looked through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensortap_hf.command import printing
from tensortap_hf.command.capturing import Plan
from tensortap_hf.command.layers import layers as layers_of
from tensortap_hf.command.layers import require_words
from tensortap_hf.command.models import load
from tensortap_hf.command.options import Inputs, chosen_modes, passed_over, require_modes
from tensortap_hf.fingerprint import fingerprint
from tensortap_hf.modes import Mode


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is captured of what, as it was asked for."""

    model: str | None
    random_init: str | None
    device: str
    modes: str
    layers: str
    exclude: Sequence[str]


def prepared(wanted: Wanted, inputs: Inputs) -> tuple[Plan, tuple[Mode, ...]]:
    """Load and read everything; says on stderr what a user may not expect.

    Raises `ConfigError` or `NotSupported`, what can be told without a model first.
    """
    inputs.check()
    require_modes(wanted.modes)
    require_words(wanted.layers)
    loaded = load(wanted.model, wanted.random_init, wanted.device)
    chosen = chosen_modes(wanted.modes, loaded)
    layers = layers_of(loaded.model, wanted.layers)
    read, calibration = inputs.read(loaded)
    excluded = [word for one in wanted.exclude for word in ("--exclude", one)]
    command = [*loaded.arguments, "--layers", wanted.layers, *inputs.arguments(), *excluded]
    weights = fingerprint(loaded.model)
    plan = Plan(
        loaded, layers, read, calibration, weights, tuple(wanted.exclude), {"command": command}
    )
    _warn(plan, inputs.samples)
    if (reason := passed_over(wanted.modes, loaded)) is not None:
        printing.warn(reason)
    return plan, chosen


def _warn(plan: Plan, asked: int) -> None:
    if plan.samples.tokens == "random" and plan.loaded.arguments[0] != "--random-init":
        printing.warn("no --data: the inputs are random token ids, unlike any text.")
    if plan.samples.tokens == "bytes":
        printing.warn(f"{plan.loaded.source} has no tokenizer: token ids are bytes of the text.")
    if len(plan.samples.ids) < asked:
        found = printing.count(len(plan.samples.ids), "sample")
        printing.warn(f"{plan.samples.source} has {found}, not {asked}.")
