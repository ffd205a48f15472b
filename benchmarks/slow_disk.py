"""A disk of a stated speed, and the speed of the one that is there."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vcache.store.reader import FeatureStore


class SlowDisk:
    """Makes reads of all stores wait their turn on a disk of so many bytes a second; a read that takes longer is not slowed."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second, self._free_at, self._lock = bytes_per_second, 0.0, threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        read_many, disk = FeatureStore.read_many, self

        def slow(self: FeatureStore, *args: Any, **options: Any) -> dict[str, np.ndarray]:
            began = time.perf_counter()
            arrays = read_many(self, *args, **options)
            disk.wait(began, sum(array.nbytes for array in arrays.values()))
            return arrays

        with mock.patch.object(FeatureStore, "read_many", slow):
            yield

    def wait(self, began: float, num_bytes: int) -> None:
        with self._lock:
            self._free_at = max(began, self._free_at) + num_bytes / self.bytes_per_second
            until = self._free_at
        time.sleep(max(0.0, until - time.perf_counter()))


def read_files(folder: Path) -> float:
    """Seconds of reading every shard file to its end."""
    began, buffer = time.perf_counter(), memoryview(bytearray(1 << 22))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began
