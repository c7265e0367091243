"""`metadata.pt` of the layout `layers-pt`: what a folder of layers says of itself.

The older scripts put the model's configuration object into it. It is read without running code:
objects stand for themselves by the attributes they were saved with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import ConfigError
from tensortap.names import TensorName
from tensortap.records import Coordinates, Placement, RunInfo
from tensortap_neuron.layouts.files import Inert, read_objects

METADATA = "metadata.pt"
OURS = "tensortap"
"""The key of what tensortap adds, for an import that gives the run back."""
_DEPTH = 16
_MOST = 1 << 20
"""Elements of a tensor that becomes a list."""


@dataclass(frozen=True, slots=True)
class About:
    """What `metadata.pt` says; nothing, where there is none."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    left_padded: bool = False

    @property
    def created(self) -> str:
        """When the run was made, where tensortap wrote the file."""
        return _text(self.ours, "created")

    @property
    def at(self) -> Coordinates:
        """The coordinates that the forward had in its run."""
        step, microbatch = (_number(self.ours, key) for key in ("step", "microbatch"))
        return Coordinates(step=step, microbatch=microbatch, eval=self.ours.get("eval") is True)

    def described(self, info: RunInfo) -> RunInfo:
        """`info` with the model, mode and versions it came from."""
        return replace(
            info,
            model_class=_text(self.ours, "model_class"),
            model_config=self.config,
            mode=_text(self.ours, "mode") or None,
            format=_text(self.ours, "format") or None,
            versions={key: str(v) for key, v in _mapping(self.ours, "versions").items()},
            settings=_mapping(self.ours, "settings"),
        )

    def name_of(self, what: str) -> TensorName | None:
        """The tensor's own name, where tensortap wrote the file."""
        text = _text(self._record(what), "name")
        try:
            return TensorName.parse(text) if text else None
        except ConfigError:
            return None

    def native_of(self, what: str) -> str:
        """The module's path in its model."""
        return _text(self._record(what), "native")

    def dims_of(self, what: str) -> str | None:
        """The names of the axes."""
        return _text(self._record(what), "dims") or None

    def device_of(self, what: str) -> str:
        """Where the values were."""
        return _text(self._record(what), "device") or "cpu"

    def placement_of(self, what: str, shape: Sequence[int]) -> Placement | None:
        """Where padding begins: as the run knew it, else behind the longest row of the mask."""
        if self.ours:
            axes = _mapping(self._record(what), "valid").items()
            valid = {int(axis): n for axis, n in axes if axis.isdecimal() and type(n) is int}
            good = all(axis < len(shape) and 0 <= n <= shape[axis] for axis, n in valid.items())
            return Placement(valid=valid) if valid and good else None
        longest = max(self.lengths, default=0)
        if len(shape) != 3 or not 0 < longest < shape[1] or len(self.lengths) != shape[0]:
            return None
        return Placement(valid={1: longest})

    def lost(self, found: Mapping[str, Path]) -> dict[str, str]:
        """Tensors that the statistics speak of and no file holds, with the reason."""
        return {
            what: _why(said)
            for key, said in self.statistics.items()
            if (what := key.removesuffix("_output")) not in found and isinstance(said, dict)
        }

    def _record(self, what: str) -> Mapping[str, Any]:
        return _mapping(_mapping(self.ours, "records"), what)


def _why(said: Mapping[str, Any]) -> str:
    error = said.get("error")
    return f"its statistics failed: {error}" if error else "the statistics list it, no file does"


def read_about(path: Path) -> About:
    """Read `metadata.pt`; raises `RunError` naming it. What has another form is left out."""
    content = read_objects(path)
    lengths, left = _lengths(content)
    ours = _mapping(content, OURS)
    about = ours.get("metadata")
    if not isinstance(about, dict):
        said = {key: plain(content[key]) for key in content if key not in _ELSEWHERE}
        about = {**said, "token_ids": _token_ids(content)}
    return About(
        metadata={key: value for key, value in about.items() if value is not None},
        config=_config(content.get("config")),
        statistics=_mapping(content, "statistics"),
        ours=ours,
        lengths=lengths,
        left_padded=left,
    )


_ELSEWHERE = frozenset({"config", "statistics", "input_ids", "output_logits", OURS})
"""Keys that become something else than metadata of the run."""


def _config(found: Any) -> dict[str, Any]:
    config = plain(found)
    return config if isinstance(config, dict) else {}


def plain(value: Any, depth: int = 0) -> Any:
    """Plain data of what a file holds: tensors as lists, objects as their attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= _MOST else f"a tensor of {tuple(value.shape)}"
    if depth == _DEPTH:
        return "…"
    if isinstance(value, Inert):
        return plain(value.state, depth + 1)
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth + 1) for item in value]
    return str(value)


def _token_ids(content: Mapping[str, Any]) -> Any:
    return plain(content["input_ids"]) if "input_ids" in content else None


def _lengths(content: Mapping[str, Any]) -> tuple[tuple[int, ...], bool]:
    """Tokens of each row, by the attention mask, and whether pads come first."""
    mask = _rows(content.get("attention_mask"))
    if mask is None:
        return (), False
    lengths = tuple(sum(map(bool, row)) for row in mask)
    first = all(all(row[:length]) for row, length in zip(mask, lengths, strict=True))
    return (lengths, False) if first else ((), True)


def _rows(found: Any) -> list[list[Any]] | None:
    """A matrix of tokens, as a tensor or as lists."""
    rows = found.tolist() if isinstance(found, torch.Tensor) else found
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        return None
    if all(isinstance(row, int) for row in rows):
        return [list(rows)]
    good = all(isinstance(row, list) and row for row in rows)
    return list(rows) if good else None


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _text(content: Mapping[str, Any], key: str) -> str:
    found = content.get(key)
    return found if isinstance(found, str) else ""


def _number(content: Mapping[str, Any], key: str) -> int:
    found = content.get(key)
    return found if type(found) is int and 0 <= found < 1 << 31 else 0
