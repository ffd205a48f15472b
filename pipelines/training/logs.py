"""What a training leaves on disk while it runs, beside the weights; every line is there as soon as it is written.

RUN/metrics.jsonl   a line per epoch: the fields of EpochReport
RUN/steps.jsonl     at most about a thousand lines over the whole run: STEP_FIELDS
RUN/tensorboard/    the same numbers as event files, where TensorBoard is installed
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vcache.pipelines import console
from vcache.pipelines.training import event_file
from vcache.pipelines.training.event_file import EventFile
from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport

METRICS, STEPS, TENSORBOARD = "metrics.jsonl", "steps.jsonl", "tensorboard"

MAX_STEP_LINES = 1000
STEP_FIELDS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_top1",
    "steps_per_second",
    "read_bytes_per_second",
    "waiting",
    "source",
    "time",
)
"""Of a line of steps.jsonl. Loss and top-1 are means over the epoch so far, `source` is where the batches are read from ("disk",
"RAM" or "GPU memory"), `time` is in seconds since 1970."""


class LogError(ValueError):
    """A log has a line that no training wrote."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill left unfinished; none if there is no file.

    Raises:
        LogError: a line is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is no whole line
    return [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]


def print_note(note: str) -> None:
    console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


class RunLog:
    """The logs of one head's run. Nothing is made before the first line, and nothing stays open after it."""

    def __init__(self, run: Path, *, on_note: Callable[[str], None] = print_note) -> None:
        """`on_note` is told once when TensorBoard files cannot be written, which stops no training."""
        self.run, self.on_note = run, on_note
        self.num_epochs = len(read_log(run / METRICS))
        """Lines of metrics.jsonl: what `truncate` is to be given when the training resumes from here."""
        self._last_step: int | None = None
        self._done_steps = 0
        self._events: EventFile | None = None
        self._has_events = True

    def append_epoch(self, report: EpochReport) -> None:
        _append(self.run / METRICS, asdict(report))
        self.num_epochs += 1
        scalars = {
            "val/loss": report.val_loss,
            "val/top1": report.val_top1,
            "val/top5": report.val_top5,
            "val/mean_class_accuracy": report.val_mean_class_accuracy,
            "val/mean_average_precision": report.val_mean_average_precision,
            "speed/epoch_seconds": report.seconds,
        }
        if report.step != self._last_step:
            scalars |= _train_scalars(report.train_loss, report.train_top1, report.lr)
        self._write_event(report.step, scalars)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether `append_step` would keep a line after this step."""
        interval = -(-num_steps // MAX_STEP_LINES)
        return self._last_step is None or step // interval != self._last_step // interval

    def append_step(self, head: HeadProgress, report: StepReport) -> None:
        """Keep the first report of every thousandth part of the run; may be called after every step."""
        if not self.is_due(head.step, head.num_steps):
            return
        self._last_step = head.step
        speeds = (report.steps_per_second, report.read_bytes_per_second, report.waiting, report.source)
        values = (head.epoch, head.step, head.lr, head.loss, head.train_top1, *speeds, round(time.time(), 3))
        _append(self.run / STEPS, dict(zip(STEP_FIELDS, values, strict=True)))
        scalars = {
            "speed/steps_per_second": report.steps_per_second,
            "speed/read_mb_per_second": report.read_bytes_per_second / 1e6,
            "speed/waiting": report.waiting,
        }
        self._write_event(head.step, {**_train_scalars(head.loss, head.train_top1, head.lr), **scalars})

    def truncate(self, num_epochs: int, step: int | None = None) -> None:
        """Forget all but the first epochs and steps, to resume after them.

        Args:
            step: optimiser steps that are done; None: those of the epochs that are kept.
        """
        lines = read_log(self.run / METRICS)[:num_epochs]
        done = step if step is not None else (lines[-1]["step"] if lines else 0)
        _keep_lines(self.run / METRICS, len(lines))
        _keep_lines(self.run / STEPS, sum(line["step"] <= done for line in read_log(self.run / STEPS)))
        self.num_epochs, self._done_steps, self._last_step, self._events = len(lines), done, done or None, None

    def _write_event(self, step: int, scalars: Mapping[str, float | None]) -> None:
        if not self._has_events:
            return
        try:
            if self._events is None and not event_file.is_installed():
                self._has_events = False
                return
            if self._events is None:
                self._events = EventFile(self.run / TENSORBOARD, self._done_steps)
            self._events.write(step, scalars)
        except Exception as error:  # of a package that the training can do without
            self._has_events = False
            self.on_note(
                f"no more TensorBoard files are written for {self.run}: {type(error).__name__}: {error}. "
                f"{METRICS} and {STEPS} have the same numbers."
            )


def _train_scalars(loss: float | None, top1: float | None, lr: float) -> dict[str, float | None]:
    return {"train/loss": loss, "train/top1": top1, "lr": lr}


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """One line, after whole lines only. JSON has no infinity: a number that is not finite is null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file.fileno()) != b"\n":
            _keep_lines(path, path.read_bytes().count(b"\n"))
        file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)


def _keep_lines(path: Path, number: int) -> None:
    """Cut the file behind its first lines, in one step."""
    if path.is_file():
        kept = path.read_bytes().split(b"\n")[:number]
        os.truncate(path, sum(len(line) + 1 for line in kept))


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise LogError(
            f"line {number} of {path} is no JSON: {line[:40]!r}. Take the line out to read the rest."
        ) from None
