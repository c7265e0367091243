"""`--compiled`: the model as an NxDI application, compiled or loaded, and its prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortap.errors import ConfigError
from tensortap_neuron.command.devices import DTYPES, tried
from tensortap_neuron.command.models import LOCAL, where
from tensortap_neuron.command.naming import Place, in_order, places
from tensortap_neuron.command.prompts import Prompt

if TYPE_CHECKING:
    from tensortap_neuron.traced import Application

_HOOK: Mapping[str, Any] = {
    # Whatever the environment says of taps is meant for others.
    "enabled": True, "steps": "0:", "values": "full", "on_error": "raise", "overwrite": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model that NxDI has compiled; it returns what it was compiled to return."""

    application: Application
    folder: Path
    places: list[Place]

    def capture(self, prompt: Prompt, run: Path, metadata: Mapping[str, Any]) -> None:
        """Context encoding of the prompt: one forward of the bucket that it fits in.

        Raises `ConfigError` where it fits in none, or the model cannot be run.
        """
        what = f"--compiled {self.folder} cannot run a prompt of {len(prompt.ids)} tokens"
        with self.application.capture.hook(run, **_HOOK, metadata=metadata) as hook:
            tried(what, lambda: self.application.generate(prompt.tensor, hook, max_new_tokens=1))


def start(
    model: str, folder: Path, *, skip_compile: bool, dtype: str, options: Mapping[str, Any]
) -> Compiled:
    """Compile to `folder`, or load from it, and start; see `traced.application` for errors.

    What NxDI itself raises, of its configuration, compiler or devices, is a `ConfigError`.
    """
    from tensortap_neuron.traced import HIDDEN_STATES, application

    neuron = dict(options)
    if dtype != "auto":
        neuron.setdefault("torch_dtype", DTYPES[dtype])
    where, act = checkpoint(model), "loaded" if skip_compile else "compiled"
    found: Application = tried(
        f"--compiled {folder}: {model} cannot be {act}",
        lambda: application(
            where, folder, skip_compile=skip_compile, select=HIDDEN_STATES, neuron=neuron
        ),
    )
    names = found.capture.names.values()
    return Compiled(found, folder, in_order(places(f"{name}/forward/output" for name in names)))


def checkpoint(model: str) -> Path:
    """The folder of the checkpoint, in the local cache where `model` is a name."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(tried(where(model), lambda: snapshot_download(model, **LOCAL)))


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """`tp_degree=32` as `{"tp_degree": 32}`: values are JSON, or else text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key.isidentifier()):
            raise ConfigError(f"--neuron-config {word}: write KEY=VALUE, such as tp_degree=32.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
