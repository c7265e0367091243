"""The run directory: written by `RunDirectorySink`, read by `open_run`, mended by `recover`."""

from tensortap.store.reader import Run, open_run
from tensortap.store.recover import Recovery, recover
from tensortap.store.tables import Table
from tensortap.store.writer import RunDirectorySink

__all__ = ["Recovery", "Run", "RunDirectorySink", "Table", "open_run", "recover"]
