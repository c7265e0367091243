"""`Capture`: what a traced model is compiled to hand out, and the file that says so beside it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensortap.errors import ConfigError
from tensortap.names import TensorName
from tensortap.selection import Selection
from tensortap.sinks import TensorSink
from tensortap.store.disk import replace_file
from tensortap_neuron.traced.described import FLAGS, Facts

if TYPE_CHECKING:
    from tensortap_neuron.traced.hook import TracedHook

FILE = "tensortap_capture.json"
"""Lies beside `model.pt` and `neuron_config.json` of the compiled model."""
VERSION = 1
_COMPILED = {
    "modules": "modules",
    "inputs": "capture_inputs",
    "manual": "tensors registered by hand",
    "moe": "MoE auto-capture",
}
"""The fields that decide what the compiled graph returns, and what they are called."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Which tensors a compiled model returns besides its own outputs; made by `prepare`.

    `names` are the NxD paths of modules and what they are called here, in the order their tensors
    come back. With `inputs` each module's
    first input follows its first output. `manual` are names for the tensors that the model's
    code registers by `register_tensor`, in the order in which it does. `moe` adds the experts
    that tokens are routed to. `select` says which of all that is recorded.
    """

    names: Mapping[str, str]
    select: str
    inputs: bool = False
    manual: tuple[str, ...] = ()
    moe: bool = False
    facts: Facts = field(default_factory=Facts)

    @property
    def modules(self) -> tuple[str, ...]:
        """NxD paths of the modules that are captured."""
        return tuple(self.names)

    @property
    def max_tensors(self) -> int | None:
        """How many tensors registered by hand the graph has room for; `None`: for none.

        NxD counts every expert layer's indices towards the room before NxDI stacks them into
        one (`TensorRegistry.register_tensor`), so each layer needs its own. What is left of the
        room comes back as single NaNs.
        """
        return (len(self.manual) + (self.facts.layers if self.moe else 0)) or None

    def nxd_options(self) -> dict[str, Any]:
        """Keyword arguments of NxD's `enable_tensor_capture(model, …)`."""
        return {
            "modules_to_capture": list(self.modules),
            "max_tensors": self.max_tensors,
            "capture_inputs": self.inputs,
        }

    def nxdi_options(self) -> dict[str, Any]:
        """Keyword arguments of NxDI's `TensorCaptureConfig`.

        That adds one to `max_intermediate_tensors` itself for the experts' indices. Paths are
        those of NxDI's models, which have no `model.` in front.
        """
        room = self.max_tensors
        return {
            "modules_to_capture": [path.removeprefix("model.") for path in self.modules],
            "max_intermediate_tensors": room - 1 or None if room and self.moe else room,
            "auto_capture_moe_tensors": self.moe,
            "capture_inputs": self.inputs,
        }

    def tensor_capture_config(self) -> Any:
        """NxDI's `TensorCaptureConfig`, for `NeuronConfig(tensor_capture_config=…)`.

        Raises `NotSupported` where neuronx-distributed-inference is not installed.
        """
        from tensortap_neuron.traced.nxdi import real

        config = real("neuronx_distributed_inference.models.config", "TensorCaptureConfig")
        return config(**self.nxdi_options())

    def hook(
        self, sink: str | os.PathLike[str] | TensorSink | None = None, **options: Any
    ) -> TracedHook:
        """A `tensor_capture_hook` that writes what comes back into a run directory or a sink.

        `options` are those of `tensortap.attach` that apply: select, values (default: full),
        steps, exponents, max_bytes, durable, on_error, overwrite, metadata.
        """
        from tensortap_neuron.traced.hook import TracedHook

        return TracedHook(self, sink, options)

    def narrowed(self, select: str) -> Capture:
        """The same compiled capture, of which less is recorded."""
        return dataclasses.replace(self, select=Selection.parse(select).text)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the configuration beside a compiled model, replacing it in one go."""
        path = Path(folder) / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, self._encoded(), sync=True)
        except OSError as failure:
            raise ConfigError(f"{path} cannot be written: {failure.strerror}.") from failure
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Capture:
        """What the model in `folder` was compiled to hand out; raises `ConfigError`."""
        path = Path(folder) / FILE
        try:
            content = json.loads(path.read_text())
            version = content["version"]
            if version != VERSION:
                raise ConfigError(
                    f"{path} has version {version}; this tensortap reads {VERSION}. Upgrade it, "
                    "or compile the model again."
                )
            return cls._decoded(content)
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: the model was not compiled with a capture of tensortap. "
                "Compile it again, without skip_compile."
            ) from None
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as failure:
            raise ConfigError(
                f"{path} cannot be read ({type(failure).__name__}: {failure}); compile the model "
                "again, without skip_compile."
            ) from failure

    def check(self, folder: str | os.PathLike[str]) -> None:
        """Raise `ConfigError` unless the model in `folder` was compiled to hand out just this.

        It says what differs and what to do. What a graph returns is fixed when it is compiled.
        """
        compiled = Capture.load(folder)
        differences = [*self._different(compiled), *_facts_apart(self.facts, compiled.facts)]
        if differences:
            raise ConfigError(
                f"The model in {folder} was compiled otherwise: {'; '.join(differences)}. Give "
                "what it was compiled with, or compile it again, without skip_compile. (In Python, "
                "Capture.load(folder) is its capture, and .narrowed(select) records less of it.)"
            )

    def _different(self, compiled: Capture) -> list[str]:
        said = []
        for word, title in _COMPILED.items():
            here, there = getattr(self, word), getattr(compiled, word)
            if here == there:
                continue
            if not isinstance(here, tuple):
                said.append(f"{title} is {here} here and {there} there")
            else:
                said += _lists_apart(title, here, there)
        return said

    def _encoded(self) -> bytes:
        content = {
            "version": VERSION,
            "select": self.select,
            "modules": dict(self.names),
            "inputs": self.inputs,
            "manual": list(self.manual),
            "moe": self.moe,
            "facts": self.facts.to_json(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @classmethod
    def _decoded(cls, content: Mapping[str, Any]) -> Capture:
        return cls(
            names=_names(content["modules"]),
            select=Selection.parse(content["select"]).text,
            inputs=bool(content["inputs"]),
            manual=_texts(content["manual"]),
            moe=bool(content["moe"]),
            facts=Facts.from_json(content["facts"]),
        )


def _names(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise ValueError(f"{value!r} does not give modules their names")
    if len(set(value.values())) < len(value):
        raise ValueError("two modules have one name")
    for name in value.values():
        _require_name(f"{name}/forward/output")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{value!r} is not a list of names")
    for text in value:
        _require_name(text)
    return tuple(value)


def _require_name(text: str) -> None:
    try:
        TensorName.parse(text)
    except ConfigError as failure:
        raise ValueError(str(failure)) from None


def _lists_apart(title: str, here: tuple[str, ...], there: tuple[str, ...]) -> list[str]:
    """What one list has and the other has not; or that their order differs."""
    missing = [word for word in here if word not in there]
    extra = [word for word in there if word not in here]
    if not missing and not extra:
        return [f"{title} come in another order"]
    said = [f"{_shortened(missing)} {_are(missing)} not in it"] if missing else []
    if extra:
        said.append(f"it also has {_shortened(extra)}")
    return [f"{title}: {', '.join(said)}"]


def _are(words: list[str]) -> str:
    return "is" if len(words) == 1 else "are"


def _shortened(words: list[str], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _facts_apart(here: Facts, there: Facts) -> list[str]:
    """Settings that change what the captured tensors are, where both sides know them."""
    titles = {"layers": "number of layers"}
    if here.configured and there.configured:
        titles |= {
            "tp": "tp_degree",
            "sequence_parallel": "sequence_parallel_enabled",
            **FLAGS,
        }
    said = [
        f"{title} is {getattr(here, word)} here and {getattr(there, word)} there"
        for word, title in titles.items()
        if getattr(here, word) != getattr(there, word)
    ]
    return said or list(_options_apart(here.options, there.options))


def _options_apart(
    here: Mapping[str, str] | None, there: Mapping[str, str] | None
) -> Iterator[str]:
    """Options of NeuronConfig that one application was given and the other not, or otherwise."""
    if here is None or there is None:
        return
    for option in sorted({*here, *there}):
        one, two = (said.get(option, "not given") for said in (here, there))
        if one != two:
            yield f"{option} is {one} here and {two} there"
