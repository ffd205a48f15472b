"""How fast a training goes, and whether it waits for reads."""

import time
from collections import deque
from dataclasses import dataclass

from vcache.pipelines.loading.read_stats import ReadStats
from vcache.pipelines.training.reports import HeadProgress, StepReport

WINDOW_SECONDS = 10.0
"""Rates are those of the last seconds."""
REPORTS_PER_SECOND = 8
LIMITED_SHARE = 0.5
"""Reading limits where the steps wait for it more than half of the time."""


@dataclass(frozen=True)
class _Sample:
    at: float
    step: int
    read: ReadStats


class Pace:
    """Counts steps, and looks at what was read and waited for since."""

    def __init__(self, stats: ReadStats, source: str = "disk") -> None:
        """`source` is where the batches are read from, as StepReport says it."""
        self._stats, self._source, self._step = stats, source, 0
        self._samples = deque([self._sample()])
        self._epoch = self._samples[0]
        self._reported = 0.0

    def step(self) -> None:
        self._step += 1

    def is_report_due(self) -> bool:
        """Now and then; a screen shows no more."""
        now = time.monotonic()
        if now - self._reported < 1 / REPORTS_PER_SECOND:
            return False
        self._reported = now
        return True

    def report(self, heads: tuple[HeadProgress, ...], steps_left: int) -> StepReport:
        """Of the last seconds; `steps_left` are those of the head that has the most."""
        now = self._sample()
        self._samples.append(now)
        while len(self._samples) > 2 and now.at - self._samples[1].at > WINDOW_SECONDS:
            self._samples.popleft()
        first = self._samples[0]
        seconds = max(1e-9, now.at - first.at)
        rate, read = (now.step - first.step) / seconds, now.read - first.read
        waiting = min(1.0, read.wait_seconds / seconds)
        return StepReport(
            heads=heads,
            steps_per_second=rate,
            read_bytes_per_second=read.bytes_read / seconds,
            waiting=waiting,
            limited_by="reading" if waiting > LIMITED_SHARE else "computing",
            source=self._source,
            seconds_left=steps_left / rate if rate else None,
        )

    def end_epoch(self) -> tuple[int, float]:
        """Bytes read and seconds waited for them since the last call."""
        read = self._stats - self._epoch.read
        self._epoch = self._sample()
        return read.bytes_read, read.wait_seconds

    def _sample(self) -> _Sample:
        return _Sample(time.monotonic(), self._step, self._stats.copy())
