"""How far an extraction is, and what it is waiting for."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("decode", "device", "disk")
_RECENT_SECONDS = 5.0


@dataclass
class ExtractionProgress:
    """Running counts, reported after every batch."""

    videos_total: int = 0
    """Videos that this run has to do; those stored before are not among them."""
    videos_done: int = 0
    videos_skipped: int = 0
    """Already in the store when the run began."""
    failures: int = 0
    frames_done: int = 0
    """Frames of clips that went through a backbone: a video of two views counts twice."""
    bytes_written: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    """Share of the run's time by what it was waiting for, see `LimitClock`; empty before the first batch."""
    recent_limits: dict[str, float] = field(default_factory=dict)
    """The same of the last five seconds or so."""
    workers: int | None = None
    """Of a cluster, those that are there now."""


class LimitClock:
    """Shares of the time of the thread that runs the backbone: which of the three stages the others wait for.

    "decode": it waits for the next video; "disk": it waits until the writer has room for a batch, or in the end for the
    last shard to be committed; "device": all the rest, which is the backbone. A share near 1 names the stage that a faster one
    would help. With the backbone on a CPU, decoding and it share the cores: what decoding takes from the backbone then shows as
    "device", and only what the backbone has to wait for as "decode".
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = {"decode": 0.0, "disk": 0.0}
        self._history = deque([(self._began, dict(self._waited))])

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        """What is done inside is waiting for "decode" or "disk"."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited[stage] += time.perf_counter() - began

    def update(self, progress: ExtractionProgress) -> None:
        """Write the shares up to now into `progress`."""
        now = time.perf_counter()
        self._history.append((now, dict(self._waited)))
        while len(self._history) > 2 and now - self._history[1][0] >= _RECENT_SECONDS:
            self._history.popleft()
        progress.limits = self._shares_since(self._began, {"decode": 0.0, "disk": 0.0}, now)
        progress.recent_limits = self._shares_since(*self._history[0], now)

    def _shares_since(self, began: float, waited: dict[str, float], now: float) -> dict[str, float]:
        elapsed = max(now - began, 1e-9)
        shares = {stage: (self._waited[stage] - waited[stage]) / elapsed for stage in self._waited}
        return {"decode": shares["decode"], "device": max(0.0, 1 - sum(shares.values())), "disk": shares["disk"]}
