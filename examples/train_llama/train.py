"""Trains a small Llama with Megatron-core; quantises and captures its tensors when asked to.

    torchrun --nproc-per-node 2 examples/train_llama/train.py --tp 2

It is an ordinary Megatron training loop. All that tensortap adds is the block around it:

    with quantize(model, "mxfp4"), tensortap.attach(model, "runs/mxfp4"):
        for step in range(steps):
            train_step()

`instruments`, below, is that block with environment variables to switch it.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from options import one_line_errors, parse

# Megatron says at every import that Apex and Transformer Engine would make it faster, and calls
# what torch renamed.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning)

with one_line_errors():
    import checkpoint
    from cpu import leave, run_on_cpu
    from data import Batch, load_corpus, microbatches
    from launch import build, start
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from model import choose_model
    from report import Report, mean_over_ranks
    from torch import Tensor

CAPTURE = ("TENSOR_SAVE_ENABLED", "TENSOR_SAVE_DIR", "TENSORTAP_ENABLED", "TENSORTAP_DIR")


@contextmanager
def instruments(model: DistributedDataParallel) -> Iterator[None]:
    """What the environment asks for, until the end of the block; plain training if nothing.

    `quantize` reads the format from CUSTOM_QUANT_TYPE, `attach` what to capture and where to from
    the variables in CAPTURE and their like.
    """
    with ExitStack() as stack:
        with one_line_errors():
            if os.environ.get("CUSTOM_QUANT_TYPE"):
                from tensortap_megatron import quantize

                stack.enter_context(quantize(model))
            if any(os.environ.get(name) for name in CAPTURE):
                import tensortap

                stack.enter_context(tensortap.attach(model))
        yield
        with one_line_errors():
            stack.close()


def train(options: Namespace) -> None:
    device = start(options)
    with one_line_errors():
        llama = choose_model(options)
        corpus = load_corpus(options, llama.vocab_size)
        report = Report(options.tensorboard)
        model, optimizer = build(llama, options, device)
    done = checkpoint.resume(options, model, optimizer)
    report.begin(options, model, done)
    with instruments(model):
        for step in range(done, options.steps):
            batches = microbatches(corpus, options, step, device)
            losses, norm = train_step(model, optimizer, batches, options)
            report.step(step, mean_over_ranks(losses, device), norm)
            checkpoint.save_if_due(options, step + 1, model, optimizer)
    report.close()


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch],
    options: Namespace,
) -> tuple[list[Tensor], float | None]:
    """One step of the optimizer: the microbatches' losses and the norm of the gradient."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    replicas = parallel_state.get_data_parallel_world_size()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=options.global_batch // (options.micro_batch * replicas),
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch,
        forward_only=False,
    )
    updated, norm, _ = optimizer.step()
    return losses, norm if updated else None


def forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """What Megatron's schedules call for every microbatch, on every pipeline stage."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, mean_loss


def mean_loss(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The loss to differentiate, and the same to report; `losses` is `[batch, seq / cp]`."""
    # Megatron multiplies by the number of context parallel ranks what each of them returns.
    share = losses.float().mean() / parallel_state.get_context_parallel_world_size()
    # It also scales this tensor in place, which a reported alias would show.
    return share, share.detach().clone()


if __name__ == "__main__":
    options = parse()
    with one_line_errors():
        run_on_cpu()
    train(options)
    leave()
