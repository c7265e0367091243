"""The command line of train.py; what a user can get wrong ends in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TEXT = Path(__file__).with_name("constitution.txt")
INSTALL = 'pip install "tensortap[megatron]" megatron-core==0.16.1'


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a Llama with Megatron-core.")
    _add_parallelism(parser)
    _add_training(parser)
    _add_files(parser)
    options = parser.parse_args(arguments)
    wrong = _wrong(options, int(os.environ.get("WORLD_SIZE", "1")))
    if wrong and os.environ.get("RANK", "0") == "0":
        stop(wrong)
    if wrong:
        sys.exit(2)  # Rank 0 has said it.
    return options


def stop(message: str) -> NoReturn:
    """End with one line instead of a traceback; exit status 2."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """While a run is prepared, an error is about what the user asked for or has installed."""
    try:
        yield
    except ImportError as error:
        stop(f"{error}: {INSTALL}")
    except Exception as error:
        # Plain training does not import tensortap, not even for the name of its errors.
        if isinstance(error, ValueError) or type(error).__module__ == "tensortap.errors":
            stop(str(error))
        raise


def _add_parallelism(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism; what remains of the processes is data parallel")
    group.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor parallel ranks")
    group.add_argument("--pp", type=_count, default=1, metavar="N", help="pipeline stages")
    group.add_argument("--cp", type=_count, default=1, metavar="N", help="context parallel ranks")
    group.add_argument("--sequence-parallel", action="store_true", help="with --tp above 1")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--size", choices=("tiny", "small", "1b"), default="tiny")
    group.add_argument("--steps", type=_count, default=30, metavar="N", help="in all; default 30")
    group.add_argument("--micro-batch", type=_count, default=4, metavar="N", help="default 4")
    group.add_argument("--global-batch", type=_count, default=8, metavar="N", help="default 8")
    group.add_argument("--seq-length", type=_count, default=128, metavar="N", help="default 128")
    group.add_argument("--lr", type=float, default=1e-3, help="constant; default 0.001")
    group.add_argument("--seed", type=int, default=1, help="of weights and batches; default 1")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp8"), default="fp32")
    group.add_argument(
        "--spec", choices=("local", "te"), help="default: te (Transformer Engine) where it works"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--data", default=str(TEXT), help="a text, or PREFIX of PREFIX.bin and PREFIX.idx"
    )
    group.add_argument(
        "--hf-model", type=Path, metavar="FOLDER", help="a Hugging Face Llama: sizes and weights"
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="default: --hf-model's, or else bytes"
    )
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="saved to, resumed from")
    group.add_argument("--save-every", type=_count, metavar="N", help="default: at the end only")
    group.add_argument("--tensorboard", type=Path, metavar="DIR")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _wrong(options: argparse.Namespace, world: int) -> str | None:
    """What cannot be, in words; every rank finds the same."""
    model_ranks = options.tp * options.pp * options.cp
    replicas = world // model_ranks
    if world % model_ranks:
        return (
            f"--tp {options.tp} x --pp {options.pp} x --cp {options.cp} needs a multiple of "
            f"{model_ranks} processes and there are {world}: torchrun --nproc-per-node "
            f"{model_ranks} examples/train_llama/train.py …"
        )
    if options.sequence_parallel and options.tp == 1:
        return "--sequence-parallel shards along the sequence what --tp replicates: give --tp 2."
    if options.global_batch % (options.micro_batch * replicas):
        return (
            f"--global-batch {options.global_batch} is no multiple of --micro-batch "
            f"{options.micro_batch} x {replicas} data parallel ranks."
        )
    pieces = 2 * options.cp if options.cp > 1 else 1
    pieces *= options.tp if options.sequence_parallel else 1
    if options.seq_length % pieces:
        return f"--seq-length {options.seq_length} cannot be cut into {pieces} equal pieces."
    for folder in (options.hf_model, options.tokenizer):
        if folder and not folder.is_dir():
            return f"{folder} is no folder."
    for folder in (options.checkpoint, options.tensorboard):
        if folder and folder.exists() and not folder.is_dir():
            return f"{folder} is no folder, so nothing can be written below it."
    return None
