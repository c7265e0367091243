"""The static scales of a calibrated model, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tensortap.errors import ConfigError
from tensortap_hf.quamba.integers import scale_of

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LayerScales:
    """The scales of the activations of one mixer, each for its whole tensor: maximum / 127."""

    in_proj_input: float
    in_proj_output: float
    """x and z."""
    x_proj_input: float
    """Also the output of the convolution and the scan's u; from a quantile."""
    x_proj_output: float
    """dt before its projection, B and C."""
    dt_proj_output: float
    out_proj_input: float
    """After the Hadamard transform."""
    ssm_state: float
    """From a quantile."""

    def __post_init__(self) -> None:
        for name in NAMES:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"the scale {name} is {getattr(self, name)}; it must be positive."
                )


NAMES = tuple(field.name for field in fields(LayerScales))


@dataclass(frozen=True, slots=True)
class Scales:
    """What `calibrate` made of a model and its samples; `save` and `load` keep it in files."""

    layers: tuple[LayerScales, ...]
    hidden_size: int
    intermediate_size: int
    percentile_alpha: float
    sample_lengths: tuple[int, ...]
    """Tokens of each calibration sample."""
    weights: str
    """The fingerprint of the model: scales fit no other weights."""

    def save(self, path: str | Path) -> None:
        """Write `path.safetensors` (one tensor [layers] a scale) and `path.json` (the rest)."""
        tensors, document = _files(path)
        tensors.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: self._column(name) for name in NAMES}, tensors)
        document.write_text(json.dumps(self._description(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Scales:
        """Read what `save` wrote; raises `ConfigError` saying what is wrong with which file."""
        tensors, document = _files(path)
        columns, said = _read_tensors(tensors), _read_json(document)
        layers = _layers(columns, tensors)
        return cls(layers, **_fields(said, document))

    def _column(self, name: str) -> torch.Tensor:
        return torch.tensor([getattr(layer, name) for layer in self.layers])

    def _description(self) -> dict[str, Any]:
        said = {key: value for key, value in asdict(self).items() if key != "layers"}
        return {"schema": _SCHEMA, **said}


def from_maxima(maxima: Mapping[str, float]) -> LayerScales:
    """The scales of one layer from the largest magnitudes its observers saw."""
    return LayerScales(**{name: scale_of(maxima[name]) for name in NAMES})


def _files(path: str | Path) -> tuple[Path, Path]:
    """The two files of a path that may name either, or what they have in common."""
    given = Path(path)
    stem = given.with_suffix("") if given.suffix in (".safetensors", ".json") else given
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise ConfigError(f"scales cannot be read from {path}: {problem}.") from problem


def _read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise ConfigError(f"scales cannot be read from {path}: {problem}.") from problem
    schema = said.pop("schema", None) if isinstance(said, dict) else None
    if schema != _SCHEMA:
        raise ConfigError(f"{path} is of schema {schema!r}; scales of schema {_SCHEMA} are read.")
    return dict(said)


def _layers(columns: Mapping[str, torch.Tensor], path: Path) -> tuple[LayerScales, ...]:
    """One of each row; raises `ConfigError` naming the file, and the layer or the tensor."""
    found = [columns.get(name) for name in NAMES]
    lengths = set()
    for name, column in zip(NAMES, found, strict=True):
        if column is None or column.dim() != 1 or not column.is_floating_point():
            raise ConfigError(f"{path} holds no scales of Quamba modes: {name} {_shown(column)}.")
        lengths.add(len(column))
    if len(lengths) != 1:
        raise ConfigError(f"{path} holds no scales of Quamba modes: its tensors differ in length.")
    made = []
    rows = zip(*(column.tolist() for column in found if column is not None), strict=True)
    for number, row in enumerate(rows):
        try:
            made.append(LayerScales(*row))
        except ConfigError as problem:
            raise ConfigError(f"{path}, layer {number}: {problem}") from problem
    return tuple(made)


def _shown(column: torch.Tensor | None) -> str:
    if column is None:
        return "is missing"
    return f"is {column.dtype} {list(column.shape)}, not floats [layers]"


def _fields(said: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The JSON with every value of its type; raises `ConfigError` naming file and key."""
    for key, (is_right, wanted) in _RIGHT.items():
        if not is_right(said.get(key)):
            raise ConfigError(
                f"{path} holds no scales of Quamba modes: {key} is {said.get(key)!r}, not {wanted}."
            )
    return {**{key: said[key] for key in _RIGHT}, "sample_lengths": tuple(said["sample_lengths"])}


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


_RIGHT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_size": (_is_count, "a number of channels"),
    "intermediate_size": (_is_count, "a number of channels"),
    "percentile_alpha": (
        lambda value: type(value) in (int, float) and 0 < value <= 1, "a number in (0, 1]"
    ),
    "sample_lengths": (
        lambda value: type(value) is list and all(map(_is_count, value)), "numbers of tokens"
    ),
    "weights": (lambda value: type(value) is str, "a fingerprint of weights"),
}  # fmt: skip
