"""`ScanResult`: what a scan measured, by layer; saved, loaded and judged without the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from tensortap.errors import ConfigError, TensortapError
from tensortap.store.disk import replace_file
from tensortap.store.dtypes import dtype_name
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.weights.options import METHODS, Options
from tensortap_analysis.weights.saved import Metrics, encoded, stats_of, texts
from tensortap_analysis.weights.sources.source import Skipped
from tensortap_analysis.weights.weight import Kind, Weight

_KIND, _SCHEMA = "tensortap-scan", 1
_LARGEST = 4 << 30
_LONGEST = 120
"""Of what a damaged file is said to hold."""


class ReportError(TensortapError):
    """A file that should be a saved scan and is none."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a weight is: `stored` is how a matrix lies in the checkpoint, `out in` or `in out`.

    `copy_of` names an earlier weight that has the very same values: the two are tied, or one was
    copied from the other. `offset` is what the model adds to the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    stored: str = "out in"
    note: str | None = None
    copy_of: str | None = None
    offset: float = 0.0

    @classmethod
    def of(cls, weight: Weight, copy_of: str | None = None) -> Facts:
        """The facts of a weight."""
        return cls(
            weight.name, weight.shape, dtype_name(weight.dtype), weight.kind,
            "in out" if weight.transposed else "out in", weight.note, copy_of, weight.offset,
        )  # fmt: skip

    @property
    def numel(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Facts:
        """Inverse of `asdict`, from JSON."""
        shape, kind = document["shape"], document["kind"]
        if not isinstance(shape, list) or any(type(one) is not int or one < 0 for one in shape):
            raise ValueError(f"{shape!r} is no shape")
        if kind not in get_args(Kind) or (kind != "vector" and len(shape) < 2):
            raise ValueError(f"{shape!r} is no shape of a weight that is a {kind}")
        texts([document[key] for key in ("name", "dtype", "stored")], "what a weight is")
        texts([document[k] for k in ("note", "copy_of") if document[k] is not None], "a note")
        if type(document.get("offset", 0.0)) not in (int, float):
            raise ValueError("an offset is a number")
        return cls(**{**document, "shape": tuple(shape)})


@dataclass(frozen=True, slots=True)
class Peer:
    """A weight that was not selected, measured in part to hold others of its role against it."""

    facts: Facts
    stats: dict[str, Metrics]


@dataclass(frozen=True)
class ScanResult(Mapping[str, dict[str, Metrics]]):
    """Layer to `{method: {metric: value}}`, in the order of the checkpoint.

    The mapping has the matrices: linear layers, embeddings, convolutions, stacks of experts.
    `vectors` (norms, biases, and tables such as `A_log`) have "sparsity" and "norms" only.
    `facts` says what each of both is, `skipped` what is in neither or lacks a method, and why;
    `notes` hold for all of it. `peers` are norms of weights that were not selected.
    """

    source: str
    methods: tuple[str, ...]
    options: Options
    layers: Mapping[str, dict[str, Metrics]]
    vectors: Mapping[str, dict[str, Metrics]] = field(default_factory=dict)
    facts: Mapping[str, Facts] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    peers: Mapping[str, Peer] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> dict[str, Metrics]:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """How many values were measured."""
        return sum(facts.numel for facts in self.facts.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON; `ScanResult.load` reads it. The same scan, the same bytes."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        replace_file(Path(path), f"{text}\n".encode(), sync=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScanResult:
        """Read a saved scan; raises `ReportError` for anything else."""
        try:
            text = _text(Path(path))
            return cls.from_json(json.loads(text, parse_constant=_refused))
        except FileNotFoundError:
            raise ReportError(f"There is no saved scan at {path}.") from None
        except UnicodeDecodeError:
            raise ReportError(f"{path} is no saved scan: it is no text.") from None
        except OSError as failure:
            raise ReportError(f"{path} cannot be read: {failure.strerror}.") from None
        except KeyError as failure:
            raise ReportError(f"{path} is no saved scan: it lacks {failure}.") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as failure:
            raise ReportError(f"{path} is no saved scan: {str(failure)[:_LONGEST]}.") from failure

    def to_json(self) -> dict[str, Any]:
        """What `save` writes; infinities are the strings `inf` and `-inf`."""

        def rows(measured: Mapping[str, dict[str, Metrics]]) -> dict[str, Any]:
            return {
                layer: {"weight": asdict(self.facts[layer]), **encoded(stats)}
                for layer, stats in measured.items()
            }

        return {
            "kind": _KIND,
            "schema": _SCHEMA,
            "source": self.source,
            "methods": list(self.methods),
            "options": asdict(self.options),
            "notes": list(self.notes),
            "layers": rows(self.layers),
            "vectors": rows(self.vectors),
            "skipped": [asdict(one) for one in self.skipped],
            "peers": {
                layer: {"weight": asdict(peer.facts), **encoded(peer.stats)}
                for layer, peer in self.peers.items()
            },
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ScanResult:
        """Inverse of `to_json`; raises `ValueError` for another kind of document."""
        if (document["kind"], document["schema"]) != (_KIND, _SCHEMA):
            raise ValueError(f"schema {document['schema']} of {document['kind']!r} is not known")
        both = {**document["vectors"], **document["layers"]}
        facts = {layer: Facts.from_json(row["weight"]) for layer, row in both.items()}
        options = document["options"]
        methods = texts(document["methods"], "methods")
        if not both or not set(methods) <= set(METHODS):
            raise ValueError("it has no weight that was measured")
        return cls(
            source=texts([document["source"]], "the source")[0],
            methods=methods,
            options=Options(**{**options, "formats": texts(options["formats"], "formats")}),
            layers=stats_of(document["layers"], methods),
            vectors=stats_of(document["vectors"], ()),
            facts=facts,
            skipped=tuple(map(_skipped, document["skipped"])),
            notes=texts(document["notes"], "notes"),
            peers=_peers(document.get("peers", {})),
        )


def _skipped(row: Mapping[str, Any]) -> Skipped:
    texts([value for value in row.values() if value is not None], "what was left out")
    return Skipped(**row)


def _peers(rows: Mapping[str, Any]) -> dict[str, Peer]:
    stats = stats_of(rows, ())
    return {
        layer: Peer(Facts.from_json(row["weight"]), stats[layer]) for layer, row in rows.items()
    }


def _text(path: Path) -> str:
    """What a file or pipe holds; devices give without end, and are refused by `ReportError`."""
    if path.is_char_device() or path.is_block_device():
        raise ReportError(f"{path} is no saved scan: it is a device.")
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ReportError(f"{path} is no saved scan: it is larger than {_LARGEST >> 30} GiB.")
    return content.decode("utf-8")


def check_target(path: Path, source: str, overwrite: bool) -> None:
    """Raise `ConfigError` where a scan of `source` cannot be saved, or would replace another's."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ConfigError(f"The scan cannot be saved as {path}: that is no file.")
    for file in (path, Path(f"{path}.journal")):
        require_writable(file, "--output")
    if overwrite or not path.exists():
        return
    try:
        found = ScanResult.load(path).source
    except ReportError:
        raise ConfigError(
            f"{path} exists and is no scan: save it elsewhere, or pass --overwrite."
        ) from None
    if found != source and Path(found).resolve() != Path(source).resolve():
        raise ConfigError(
            f"{path} is the scan of {found}: save this one elsewhere, or pass --overwrite."
        )


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")
