"""How much a loader has read and how long that took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(kw_only=True)
class ReadStats:
    """Sums since the loader was made, to be read while it works; the difference of two says what happened between them."""

    bytes_read: int = 0
    """From the store; what is gathered from resident memory is not read again."""
    read_seconds: float = 0.0
    """In which the store was being read, beside the consumer."""
    wait_seconds: float = 0.0
    """In which the consumer waited for a batch: nearly all that passed where reading limits, nearly none where computing does."""

    def copy(self) -> "ReadStats":
        return ReadStats(bytes_read=self.bytes_read, read_seconds=self.read_seconds, wait_seconds=self.wait_seconds)

    def __sub__(self, before: "ReadStats") -> "ReadStats":
        return ReadStats(
            bytes_read=self.bytes_read - before.bytes_read,
            read_seconds=self.read_seconds - before.read_seconds,
            wait_seconds=self.wait_seconds - before.wait_seconds,
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.read_seconds += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds += time.perf_counter() - began
