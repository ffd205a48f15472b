"""What benchmarks/training.py measures with: clocks, the parts of an epoch, and one forward pass for several stores."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vcache.extract.views import PreparedClip
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.training.step import TrainingStep


@dataclass
class Spent:
    """Seconds by the clock and of the cores within `with`, summed."""

    seconds: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.cpu + other.cpu)


class Remembered:
    """`ClipExtractor.features` of one clip at a time, computed once for all stores."""

    def __init__(self, features: Callable[..., dict[str, Tensor]], names: Sequence[str]) -> None:
        """`names` are all that will be asked for."""
        self.features, self.names, self.known = features, names, dict[bytes, dict[str, Tensor]]()

    def __call__(self, clips: list[PreparedClip], names: list[str]) -> dict[str, Tensor]:
        for clip in clips:
            if clip.images.numpy().tobytes() not in self.known:
                self.known[clip.images.numpy().tobytes()] = self.features([clip], self.names)
        of_clips = [self.known[clip.images.numpy().tobytes()] for clip in clips]
        return {name: torch.cat([features[name] for features in of_clips]) for name in names if name in self.names}


@contextmanager
def measured_parts() -> Iterator[dict[str, float]]:
    """Seconds of the parts of training: what the loader makes of a batch, the two halves of a step, and waiting for a read."""
    parts: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - began

        return run

    epoch = ClipLoader.epoch

    def batches(self: ClipLoader, number: int, **options: Any) -> Iterator[Batch]:
        inner = epoch(self, number, **options)
        advance = timed("waiting for a read", lambda: next(inner, None))
        while (batch := advance()) is not None:
            yield batch

    with (
        mock.patch.object(ClipLoader, "epoch", batches),
        mock.patch.object(Batch, "features", timed("dequantising, maps", Batch.features)),
        mock.patch.object(TrainingStep, "backward", timed("forward, backward", TrainingStep.backward)),
        mock.patch.object(TrainingStep, "update", timed("AdamW", TrainingStep.update)),
    ):
        yield parts
