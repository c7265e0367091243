"""How a model is to run, as the command line says, and the model that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensortap.errors import ConfigError
from tensortap_neuron.command import calling, compiled, devices, models
from tensortap_neuron.command.capturing import Capturer, Module
from tensortap_neuron.command.naming import places_of


@dataclass(frozen=True, slots=True)
class How:
    """The options of `layers` about the model."""

    model: str
    device: str | None
    dtype: str
    compiled: Path | None
    skip_compile: bool
    neuron_config: Sequence[str]

    @property
    def where(self) -> str:
        """The device, as a word."""
        return self.device or ("cpu" if self.compiled is None else "neuron")

    def check(self) -> None:
        """Raise `ConfigError` for what can be told to be wrong without a model."""
        devices.require_words(self.where, self.dtype)
        compiled.options_of(self.neuron_config)
        if self.compiled is not None:
            if self.where != "neuron":
                raise ConfigError(f"--compiled runs on Neuron, not on --device {self.where}.")
            return
        for option, given in (
            ("--skip-compile", self.skip_compile),
            ("--neuron-config", self.neuron_config),
        ):
            if given:
                raise ConfigError(f"{option} needs --compiled DIR: nothing else is compiled first.")

    def ready(self) -> tuple[Capturer, dict[str, Any]]:
        """The model where it runs, and what the metadata of its runs says."""
        runner, about = self._module() if self.compiled is None else self._compiled(self.compiled)
        return runner, {
            "model": self.model,
            **about,
            "compiler_flags": devices.flags(),
            "packages": devices.versions(),
        }

    def _module(self) -> tuple[Capturer, Mapping[str, Any]]:
        device = devices.device_of(self.where)
        loaded = models.load(self.model, self.dtype)
        wanted = places_of(loaded)
        if device.type == "xla":
            calling.prepare(loaded)
        dtype = str(next(loaded.parameters()).dtype).removeprefix("torch.")
        runner = Module(devices.moved(loaded, device), device, wanted)
        found = {"device": str(device), "hardware": devices.hardware(device), "dtype": dtype}
        return runner, {key: value for key, value in found.items() if value is not None}

    def _compiled(self, folder: Path) -> tuple[Capturer, Mapping[str, Any]]:
        options = compiled.options_of(self.neuron_config)
        runner = compiled.start(
            self.model, folder, skip_compile=self.skip_compile, dtype=self.dtype, options=options
        )
        return runner, {
            "device": "neuron",
            "dtype": self.dtype,
            "compiled": str(folder),
            "neuron_config": options,
        }
