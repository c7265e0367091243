"""One prompt through the model: a run of every layer, and the older guide's files beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import tensortap
from tensortap.errors import ConfigError, RunExists
from tensortap.layouts import layout
from tensortap.store.disk import whole_folder
from tensortap_neuron.command.calling import forward
from tensortap_neuron.command.naming import Place, with_inputs
from tensortap_neuron.command.prompts import Prompt, folder_of

RUN, FILES = "run", "layers-pt"
"""Below a prompt's folder: the run, and the same in the layout that older scripts read."""


class Capturer(Protocol):
    """A model that is ready to run: eager or lazy, or compiled."""

    @property
    def places(self) -> list[Place]:
        """What is expected of it, in order."""

    def capture(self, prompt: Prompt, run: Path, metadata: Mapping[str, Any]) -> None:
        """Run the prompt once, and write the run."""


@dataclass(frozen=True, slots=True)
class Module:
    """A model that runs as a module, on `device`."""

    model: nn.Module
    device: torch.device
    places: list[Place]

    def capture(self, prompt: Prompt, run: Path, metadata: Mapping[str, Any]) -> None:
        """One teacher-forced forward of the whole prompt."""
        ids = prompt.tensor.to(self.device)
        select = ",".join(with_inputs(self.places))
        # A lazy graph whose values the model reads early costs time; what is captured is right.
        on_error = "warn" if self.device.type == "xla" else "raise"
        with (
            tensortap.attach(
                self.model, run, **_CAPTURE, select=select, metadata=metadata, on_error=on_error
            ),
            torch.no_grad(),
        ):
            forward(self.model, ids)


_CAPTURE: Mapping[str, Any] = {
    # Whatever the environment says of taps is meant for others.
    "enabled": True, "steps": "0:", "ranks": "", "phases": ("forward",), "values": "full",
    "overwrite": True,
}  # fmt: skip


def require_new(out: Path, prompts: int, *, overwrite: bool) -> None:
    """Raise, before a model is loaded, where a prompt's folder is there already or cannot be made.

    That is `RunExists` or `ConfigError`.
    """
    above = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be made: nothing can be written to {above}.")
    folders = [out / folder_of(number) for number in range(prompts)]
    taken = [folder for folder in folders if folder.exists()]
    if taken and not overwrite:
        raise RunExists(f"{taken[0]} exists; choose another --out, or pass --overwrite.")


def capture(
    model: Capturer, prompt: Prompt, out: Path, metadata: Mapping[str, Any]
) -> tuple[Path, tuple[str, ...]]:
    """Write a prompt's folder, whole or not at all; returns it, and what could not be exported.

    An older folder is replaced once the new one is there.
    """
    final = out / prompt.folder
    about = {
        "prompt": prompt.text, "token_ids": list(prompt.ids), "tokens": prompt.tokens, **metadata
    }  # fmt: skip
    with whole_folder(final) as partial:
        partial.mkdir(parents=True)
        model.capture(prompt, partial / RUN, about)
        with tensortap.open_run(partial / RUN) as run:
            moved = layout("layers-pt").export(run, partial / FILES, "*", lambda done: None)
    # What the run itself lacks, the run says.
    return final, tuple(line for line in moved.skipped if not line.startswith(str(partial)))
