"""`TracedHook`: the `tensor_capture_hook` that writes a tensortap run."""

from __future__ import annotations

import atexit
import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.destination import destination
from tensortap.errors import CaptureError, CaptureWarning, ConfigError
from tensortap.names import TensorName
from tensortap.records import Values
from tensortap.selection import Selection
from tensortap.sinks import CoverageSink, PayloadSink, TensorSink
from tensortap_neuron.traced.capture import Capture
from tensortap_neuron.traced.described import configured, problem, width_of
from tensortap_neuron.traced.fitting import fit
from tensortap_neuron.traced.forwards import Forward, Forwards
from tensortap_neuron.traced.recording import measured, record_of, remark, where
from tensortap_neuron.traced.returned import Came, sort_out
from tensortap_neuron.traced.running import describe_traced

_OPTIONS = frozenset(
    {"select", "values", "steps", "exponents", "max_bytes", "durable", "on_error", "overwrite"}
    | {"metadata", "enabled", "directory"}
)


class TracedHook:
    """Writes what a compiled model hands out; call it, or pass it, as `tensor_capture_hook`.

        with capture.hook("runs/neuron") as hook:
            adapter.generate(input_ids, attention_mask=mask, **hook.kwargs)

    Passing `hook.inputs` as `input_capture_hook` as well (`hook.kwargs` is both) tells it how
    long the prompt is, so that the padding of the bucket is cut. A failure in here never
    reaches the model, unless `on_error="raise"`; the run then says that it is incomplete.
    """

    def __init__(
        self,
        capture: Capture,
        sink: str | os.PathLike[str] | TensorSink | None,
        options: Mapping[str, Any],
    ) -> None:
        wrong = sorted(set(options) - _OPTIONS)
        if wrong:
            raise ConfigError(
                f"hook() has no option {wrong[0]!r}; options: {', '.join(sorted(_OPTIONS))}."
            )
        default: Values = sink.default_values if isinstance(sink, PayloadSink) else "full"
        self.capture = capture
        self.settings = Settings.resolve(options, values=default)
        self.coverage = Coverage()
        self._select = _narrowed(capture, self.settings)
        self._forwards = Forwards()
        self._seen: list[dict[str, Any]] = []
        self._seq = itertools.count()
        self._failure: BaseException | None = None
        self._app: Any = None
        self._problem: str | None = None
        self._facts = capture.facts
        self._called = 0
        info = describe_traced(capture, self.settings)
        self._open = self.settings.enabled
        if self._open:
            self._sink, self.path = destination(sink, self.settings, info)
            self._sink.open(info)
            atexit.register(self._at_exit)

    @property
    def kwargs(self) -> dict[str, Callable[..., None]]:
        """Both hooks, for `generate(**hook.kwargs)` or `app.forward(**hook.kwargs)`."""
        return {"tensor_capture_hook": self, "input_capture_hook": self.inputs}

    def __call__(self, app: Any, captured: Any) -> None:
        """Record what one forward handed out: NxDI's list, or NxD's dictionary."""
        self._meet(app)
        self._called += 1
        self._guarded(lambda: self._take(captured))

    def inputs(self, app: Any, given: Sequence[Any]) -> None:
        """Take note of the inputs of the forward to come; NxDI calls it before each."""
        self._meet(app)
        self._guarded(lambda: self._forwards.announce(given))

    def step(self) -> None:
        """End the step here: the next forward begins another one."""
        self._guarded(self._end_step)

    def close(self) -> None:
        """Finish the run; raises `CaptureError` when nothing at all was captured.

        Calling it again does nothing.
        """
        if not self._open:
            return
        self._open = False
        atexit.unregister(self._at_exit)
        self._finish()
        if self._failure is None and not self.coverage.total:
            raise CaptureError(f"tensortap captured nothing: {self._why_nothing()}")

    def __enter__(self) -> TracedHook:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CaptureError as failure:
            if self._called:  # Else the error on its way out says all.
                warnings.warn(str(failure), CaptureWarning, stacklevel=2)

    def _meet(self, app: Any) -> None:
        """What the running application says comes before what was known when it was prepared."""
        if app is not self._app:
            text = getattr(app, "text_config", None)  # Of a model of images and text.
            neuron = getattr(text or app, "neuron_config", None)
            self._problem = problem(neuron)
            self._facts = self.capture.facts
            if neuron is not None:
                self._facts = configured(self._facts, neuron)
            width = width_of(text or getattr(app, "config", None))
            if width:  # That of the checkpoint may have been padded.
                self._facts = replace(self._facts, hidden=width)
        self._app = app

    def _guarded(self, act: Callable[[], None]) -> None:
        """Run `act` unless capturing has failed or ended; its failure ends the capture."""
        if not self._open or self._failure is not None:
            return
        try:
            act()
        except Exception as failure:  # `_failed` reports it; generation must go on.
            self._failed(failure)

    def _failed(self, failure: Exception) -> None:
        self._failure = failure
        cause = f"{type(failure).__name__}: {failure}"
        self.coverage.gap("*", f"capture stopped: {cause}")
        message = f"tensortap stopped capturing, the run is incomplete: {cause}"
        if self.settings.on_error == "raise":
            raise CaptureError(message) from failure
        warnings.warn(message, CaptureWarning, stacklevel=4)

    @torch.no_grad()
    def _take(self, captured: Any) -> None:
        came = sort_out(self.capture, captured, self._facts, self._wanted)
        before = self._forwards.step
        forward = self._forwards.begin(*measured(came, self._facts))
        if forward.step != before and before in self.settings.steps and before >= 0:
            self._sink.end_step(before)
        if forward.step not in self.settings.steps:
            return
        self._seen.append(forward.described())
        note = remark(forward)
        if note is not None:
            self.coverage.note("root", note)
        for one in filter(self._selected, came):
            self._write(one, forward)

    def _wanted(self, name: TensorName) -> bool:
        return self._select.matches(str(name))

    def _selected(self, one: Came) -> bool:
        """By its name; what was named for this capture alone always is."""
        return not one.path or self._wanted(one.name)

    def _write(self, one: Came, forward: Forward) -> None:
        """Bring one tensor to the host, cut its padding, and hand it to the sink."""
        fitted = fit(one, forward, self._facts)
        if isinstance(fitted, str):
            self.coverage.gap(str(one.name), f"{fitted} ({where(forward)})")
            return
        if fitted.note is not None:
            self.coverage.note(str(fitted.name), fitted.note)
        record, payload = record_of(one, fitted, forward, self.settings, next(self._seq))
        self._sink.write(record, payload)
        self.coverage.captured(str(record.name))

    def _end_step(self) -> None:
        self._forwards.end_step()

    def _finish(self) -> None:
        """End the last step, report and close; what fails is said like any other failure."""
        with ExitStack() as last_to_first:
            last_to_first.callback(self._settled, self._sink.close)
            last_to_first.callback(self._settled, self._report)
            last_to_first.callback(self._settled, self._end_last)

    def _settled(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as failure:  # Only the first failure is told.
            if self._failure is None:
                self._failed(failure)

    def _end_last(self) -> None:
        if self._failure is None and self._forwards.step in self.settings.steps and self._seen:
            self._sink.end_step(self._forwards.step)

    def _report(self) -> None:
        if isinstance(self._sink, CoverageSink):
            report = self.coverage.report(steps=self._forwards.step + 1)
            self._sink.cover({**report, "forwards": self._seen})

    def _why_nothing(self) -> str:
        if self._problem is not None:
            return f"{self._problem}."
        if not self._called:
            return (
                "the hook was never called with tensors. Pass generate(**hook.kwargs), use a "
                "model compiled with this capture, and set on_device_sampling_config in its "
                "NeuronConfig: without, NxDI drops every captured tensor, silently when "
                "output_logits=True was set."
            )
        if not self._seen:
            return (
                f"steps={self.settings.steps.text!r}, but there were {self._forwards.step + 1} "
                "steps, counted from 0; each prompt begins one."
            )
        gaps = self.coverage.report(steps=0)["gaps"]
        return gaps[0]["reason"] if gaps else "the selection left nothing."

    def _at_exit(self) -> None:
        """The interpreter ends without `close`: what was recorded is still finished."""
        try:
            self.close()
        except CaptureError as failure:
            warnings.warn(f"tensortap: {failure}", CaptureWarning, stacklevel=2)


def _narrowed(capture: Capture, settings: Settings) -> Selection:
    """What is written of what is captured; raises `SelectionError` when that is nothing."""
    select = settings.select if settings.explicit else Selection.parse(capture.select)
    words = ("output", "input") if capture.inputs else ("output",)
    names = [f"{name}/forward/{word}" for name in capture.names.values() for word in words]
    by_hand = capture.manual or capture.moe
    if not by_hand and not any(select.matches(name) for name in names):
        raise select.nothing_in(names, "this capture")
    return select
