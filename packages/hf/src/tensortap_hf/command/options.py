"""Options that the commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tensortap.errors import ConfigError
from tensortap_hf import modes
from tensortap_hf.command import samples
from tensortap_hf.command.capturing import Calibration
from tensortap_hf.command.models import Loaded
from tensortap_hf.command.paths import require_file
from tensortap_hf.command.samples import Samples
from tensortap_hf.modes import Mode
from tensortap_hf.modes.generic import quantization_method

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")
]
RandomInit = Annotated[
    str | None,
    typer.Option(
        metavar="CONFIG", help="Random weights instead: mamba-130m, or any local config.json."
    ),
]
Modes = Annotated[
    str,
    typer.Option(
        "--modes", help="all, essential, quant_only, fp_only, or names with commas: 0,2-1,bf16."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="A text, or .jsonl with a sample a line; default: random token ids."),
]
SeqLen = Annotated[int, typer.Option(min=1, help="Tokens in a sample, at most.")]
CalibData = Annotated[
    Path | None, typer.Option(help="What to calibrate on; default: what --data says.")
]
CalibSamples = Annotated[int, typer.Option(min=1, help="How many samples to calibrate on.")]
CalibSeqLen = Annotated[int, typer.Option(min=1, help="Tokens in one of them, at most.")]
Alpha = Annotated[
    float | None,
    typer.Option(help="Quantile for the percentile observers of quamba (0.9995 if not given)."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Modules that stay as they are, by canonical names: layers.0.mlp.*."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CALIBRATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """Captured samples and calibration, as they were asked for."""

    data: Path | None
    samples: int
    seq_len: int
    calib_data: Path | None
    calib_samples: int
    calib_seq_len: int
    alpha: float | None

    def check(self) -> None:
        """Raise `ConfigError` for what can be told to be wrong without a model."""
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ConfigError(f"--percentile-alpha {self.alpha:g} is not in (0, 1].")
        require_file(self.data, "--data")
        require_file(self.calib_data, "--calib-data")

    def read(self, loaded: Loaded) -> tuple[Samples, Calibration]:
        """Both, for this model."""
        vocabulary = vocabulary_of(loaded)
        found = samples.read(self.data, self.samples, self.seq_len, loaded.tokenizer, vocabulary)
        calibrating = samples.read(
            self.calib_data or self.data, self.calib_samples, self.calib_seq_len,
            loaded.tokenizer, vocabulary, seed=_CALIBRATION_SEED,
        )  # fmt: skip
        return found, Calibration(calibrating, self.alpha)

    def arguments(self) -> list[str]:
        """The same on a command line."""
        given = {
            "--data": self.data, "--samples": self.samples, "--seq-len": self.seq_len,
            "--calib-data": self.calib_data, "--calib-samples": self.calib_samples,
            "--calib-seq-len": self.calib_seq_len, "--percentile-alpha": self.alpha,
        }  # fmt: skip
        return [
            word
            for option, value in given.items()
            if value is not None
            for word in (option, str(value))
        ]


def vocabulary_of(loaded: Loaded) -> int:
    """How many token ids the model has embeddings for."""
    embedding = getattr(loaded.model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    config = getattr(loaded.model, "config", None)
    size = size or getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{loaded.source} takes no token ids; modes are captured of text models.")
    return size


def require_modes(wanted: str) -> None:
    """Raise `ConfigError` for words that are a mode or preset of no family; needs no model."""
    presets = {name for one in modes.families() for name in modes.family(one).presets}
    for word in _words(wanted):
        spelled, _, name = word.rpartition("/")
        if spelled:
            modes.family(spelled)
        if name not in presets.union(modes.names()):
            modes.get(word)  # Raises, with what is nearest.


def _words(wanted: str) -> list[str]:
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    if not words:
        raise ConfigError("--modes is empty; write all, or names with commas.")
    return words


def chosen_modes(wanted: str, loaded: Loaded) -> tuple[Mode, ...]:
    """The modes that `--modes` means for a model; raises `ConfigError`.

    A quantised checkpoint has one mode: as it was loaded.
    """
    served = modes.families_of(loaded.model)
    if not served:
        raise ConfigError(f"No family of modes serves {type(loaded.model).__name__}.")
    quantized = quantization_method(loaded.model) is not None
    names = [
        name
        for word in _words(wanted)
        for name in (
            ["generic/loaded"] if quantized and word == "all" else _preset(word, served[0])
        )
    ]
    return modes.resolve(list(dict.fromkeys(names)), model=loaded.model)


def passed_over(wanted: str, loaded: Loaded) -> str | None:
    """Why the family that is meant for such models is not taken, where nobody spelled one out."""
    if all("/" in word for word in _words(wanted)):
        return None
    for name, reason in modes.refusals(loaded.model).items():
        return f"the modes are those of {modes.families_of(loaded.model)[0]}, not {name}: {reason}"
    return None


def _preset(word: str, preferred: str) -> list[str]:
    """`essential` or `generic/essential` as the modes in it; a mode as itself."""
    spelled, _, name = word.rpartition("/")
    found = modes.family(spelled or preferred)
    if name in found.presets:
        return [f"{found.name}/{mode}" for mode in found.presets[name]]
    return [word]
