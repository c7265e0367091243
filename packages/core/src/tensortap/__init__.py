"""tensortap shows what happens to the numbers inside a model: the public API, nothing else."""

from tensortap.errors import (
    AlreadyAttached,
    CaptureError,
    CaptureWarning,
    ConfigError,
    NotSupported,
    PluginError,
    RunCorrupt,
    RunError,
    RunExists,
    SelectionError,
    TensortapError,
)
from tensortap.names import TensorName
from tensortap.records import (
    Coordinates,
    FormatInfo,
    Part,
    Placement,
    RunInfo,
    Statistics,
    TensorRecord,
)
from tensortap.selfcheck import SelfCheck, selfcheck
from tensortap.sinks import MemorySink, TeeSink, TensorSink
from tensortap.store import Run, RunDirectorySink, open_run
from tensortap.tap import Tap, attach, detach_all

__version__ = "0.1.0"

__all__ = [
    "AlreadyAttached",
    "CaptureError",
    "CaptureWarning",
    "ConfigError",
    "Coordinates",
    "FormatInfo",
    "MemorySink",
    "NotSupported",
    "Part",
    "Placement",
    "PluginError",
    "Run",
    "RunCorrupt",
    "RunDirectorySink",
    "RunError",
    "RunExists",
    "RunInfo",
    "SelectionError",
    "SelfCheck",
    "Statistics",
    "Tap",
    "TeeSink",
    "TensorName",
    "TensorRecord",
    "TensorSink",
    "TensortapError",
    "attach",
    "detach_all",
    "open_run",
    "selfcheck",
]
