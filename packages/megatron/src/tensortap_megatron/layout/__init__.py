"""The layout `megatron-pt`: the `.pt` files of an older Megatron fork, to and from a run."""

from __future__ import annotations

from pathlib import Path

from tensortap.layouts import Moved, Progress
from tensortap.sinks import TensorSink
from tensortap.store import Run
from tensortap_megatron.layout.exporting import export
from tensortap_megatron.layout.importing import load_folder
from tensortap_megatron.layout.sink import MegatronPtSink

__all__ = ["MEGATRON_PT", "MegatronPt", "MegatronPtSink"]


class MegatronPt:
    """`megatron-pt`; `words` says how files are named, `files` what they hold.

    Rank 0's files lie in the folder itself, those of other ranks in `rank00001/`, ….
    """

    name = "megatron-pt"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; records without values are skipped, and counted."""
        return export(run, out, select, progress)

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`; also reads what the fork itself wrote, and bare tensors."""
        return load_folder(folder, sink, progress)


MEGATRON_PT = MegatronPt()
"""What the entry point names."""
