"""Where batches come from: rows of arrays of a store, read into memory that is used again while the batch before is used."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.read_stats import ReadStats
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore


class Part(NamedTuple):
    """Rows of a split and the view that each is read in, sorted by view."""

    rows: np.ndarray
    views: np.ndarray


@dataclass(frozen=True)
class ArraySelection:
    """The arrays that some plans read, each once, with the frames that any of them needs."""

    specs: Mapping[str, ArraySpec]
    """By name; the shapes are those that are read."""
    steps: Mapping[str, int]
    """Of the stored frames every so many are read."""

    @property
    def row_bytes(self) -> int:
        return sum(spec.row_bytes for spec in self.specs.values())

    def only(self, names: Iterable[str]) -> "ArraySelection":
        chosen = [name for name in self.specs if name in set(names)]
        return ArraySelection({name: self.specs[name] for name in chosen}, {name: self.steps[name] for name in chosen})


def select_arrays(stored: Mapping[str, ArraySpec], plans: Iterable[ReadPlan]) -> ArraySelection:
    """The union of what the plans read, in the order in which they name it; `stored` are the arrays of the split."""
    steps: dict[str, int] = {}
    for plan in plans:
        for name in plan.arrays:
            wanted = plan.step_of(name) if stored[name].by_frame else 1
            steps[name] = math.gcd(steps.get(name, 0), wanted)
    return ArraySelection({name: _strided(stored[name], step) for name, step in steps.items()}, steps)


def _strided(spec: ArraySpec, step: int) -> ArraySpec:
    return replace(spec, shape=(spec.shape[0] // step, *spec.shape[1:])) if step > 1 else spec


@runtime_checkable
class BatchSource(Protocol):
    """Gives the arrays of parts, one part after the other."""

    def selection(self, wanted: ArraySelection) -> ArraySelection:
        """What it gives for that: the same arrays, perhaps with more of their frames."""

    def batches(self, parts: Sequence[Part], wanted: ArraySelection) -> Iterator[dict[str, Tensor]]:
        """Arrays (rows of the part, *shape of a row) by name, in the order of the part's rows."""


class StoreReader:
    """Reads rows of one split into given memory, and counts."""

    def __init__(self, store: FeatureStore, split: str, stats: ReadStats) -> None:
        self.store, self.split, self.stats = store, split, stats

    def read(self, part: Part, wanted: ArraySelection, out: Mapping[str, np.ndarray]) -> None:
        """Rows in runs of one view: each run is one read, into neighbouring rows of the memory."""
        edges = np.flatnonzero(np.diff(part.views, prepend=-1, append=-1))
        for start, stop in pairwise(edges):
            for (step, num_frames), names in _read_together(wanted).items():
                with self.stats.reading():
                    self.store.read_many(
                        self.split,
                        names,
                        part.rows[start:stop],
                        view=int(part.views[start]),
                        frames=range(0, step * num_frames, step) if step > 1 else None,
                        out={name: out[name][start:stop] for name in names},
                    )
        self.stats.bytes_read += len(part.rows) * wanted.row_bytes


def _read_together(wanted: ArraySelection) -> dict[tuple[int, int], list[str]]:
    """Arrays of which one call reads the same frames: by their step and number, which is 0 of those that are read whole.

    Pixels may be read at the step of the tokens and be more frames than these.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, step in wanted.steps.items():
        names.setdefault((step, wanted.specs[name].shape[0] if step > 1 else 0), []).append(name)
    return names


class DiskSource:
    """Reads each part when the one before is handed out."""

    def __init__(self, reader: StoreReader, buffers: BatchBuffers) -> None:
        self.reader, self.buffers = reader, buffers

    def selection(self, wanted: ArraySelection) -> ArraySelection:
        return wanted

    def batches(self, parts: Sequence[Part], wanted: ArraySelection) -> Iterator[dict[str, Tensor]]:
        return read_ahead(lambda part: self._read(part, wanted), parts)

    def _read(self, part: Part, wanted: ArraySelection) -> dict[str, Tensor]:
        arrays = self.buffers.take(wanted.specs, len(part.rows))
        self.reader.read(part, wanted, {name: array.numpy() for name, array in arrays.items()})
        return arrays


def gather(array: Tensor, slots: np.ndarray, out: np.ndarray) -> None:
    """`out` becomes the rows of an array in memory that are at these slots."""
    # Four times as fast as torch's index_select here (measured); "clip" as any other mode would go through a copy.
    np.take(array.numpy(), slots, axis=0, out=out, mode="clip")


def read_ahead(read: Callable[[Part], dict[str, Tensor]], parts: Sequence[Part]) -> Iterator[dict[str, Tensor]]:
    """What `read` gives for each part; while one is used, a thread reads the next."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        ahead = reader.submit(read, parts[0]) if parts else None
        for number in range(1, len(parts) + 1):
            assert ahead is not None
            arrays = ahead.result()
            ahead = reader.submit(read, parts[number]) if number < len(parts) else None
            yield arrays
            del arrays
