"""The writer behind the backbone: a thread that writes finished batches in order and commits shards meanwhile."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from vcache.extract.views import PreparedClip
from vcache.pipelines.batches import EncodedBatch
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.shards import TargetTask
from vcache.store.writer import RowFailure, ShardWriter


class Stopped(Exception):
    """What open shards are left with, uncommitted, when the run ends early."""


class BatchRow(NamedTuple):
    """A row of the part, its slot, and what is wrong with its video: the slot may hold it all the same."""

    row: int
    slot: int
    trouble: RowFailure | None


@dataclass(frozen=True)
class RowBatch:
    """Rows of one task, in order."""

    task: TargetTask
    rows: Sequence[BatchRow]
    encoded: EncodedBatch | None
    """None if all rows failed."""
    counts: bool
    """Whether the videos of the run are counted with this task: a job of several tasks has each video several times."""

    def clip(self, row: BatchRow) -> PreparedClip | None:
        return self.encoded.slots[row.slot] if self.encoded is not None else None

    @property
    def is_last(self) -> bool:
        return self.rows[-1].row == self.task.task.rows[-1]


class ShardWriting:
    """Writes batches in a thread; a context manager, at whose clean end all is on disk.

    At most `max_batches` batches are between `reserve` and the end of their writing: that is the bound on the memory of
    finished rows, max_batches x batch_size x (bytes of a row). If the block ends with an exception, the shard that is being
    committed at the moment is committed, and nothing of the others.
    """

    def __init__(self, progress: ExtractionProgress, max_batches: int) -> None:
        self._progress, self._max_batches = progress, max_batches
        self._changed = threading.Condition()
        self._queue: deque[RowBatch] = deque()
        self._unwritten = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> "ShardWriting":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Raises:
            Whatever the writer met, if the block itself raised nothing.
        """
        try:
            if error is None:
                self.drain()
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._thread.join()

    def drain(self) -> None:
        """Wait until all that was submitted is written; raises what the writer met."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwritten == 0 or self._error is not None)
            if self._error is not None:
                raise self._error

    def reserve(self) -> None:
        """Wait for room for one more batch; raises what the writer met, if it has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwritten < self._max_batches or self._error is not None)
            if self._error is not None:
                raise self._error
            self._unwritten += 1

    def submit(self, batch: RowBatch) -> None:
        """Hand over a batch for which room was reserved; batches of a task come in the order of its rows."""
        with self._changed:
            self._queue.append(batch)
            self._changed.notify_all()

    def _run(self) -> None:
        writers: dict[TargetTask, ShardWriter] = {}
        error: BaseException = Stopped()
        try:
            for batch in self._batches():
                self._write(batch, writers)
                with self._changed:
                    self._unwritten -= 1
                    self._changed.notify_all()
        except BaseException as caught:  # handed to the thread that waits for room, whatever it is
            error = caught
        try:
            for writer in writers.values():
                writer.__exit__(type(error), error, None)
        finally:
            with self._changed:
                self._error = None if isinstance(error, Stopped) else error
                self._queue.clear()
                self._changed.notify_all()

    def _batches(self) -> Iterator[RowBatch]:
        """What is submitted, until the run stops."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                batch = self._queue.popleft()
            yield batch

    def _write(self, batch: RowBatch, writers: dict[TargetTask, ShardWriter]) -> None:
        if batch.task not in writers:
            task = batch.task.task
            writer = ShardWriter(batch.task.target.store, task.part, task.shard, task.arrays, task.view)
            writers[batch.task] = writer.__enter__()
        self._write_rows(batch, writers[batch.task])
        if batch.is_last:
            writers.pop(batch.task).__exit__(None, None, None)
        if batch.counts:
            self._progress.videos_done += len(batch.rows)
            self._progress.failures += sum(batch.clip(row) is None for row in batch.rows)

    def _write_rows(self, batch: RowBatch, writer: ShardWriter) -> None:
        arrays = batch.encoded.rows() if batch.encoded is not None else []
        for place in batch.rows:
            clip = batch.clip(place)
            written = arrays[place.slot] if clip is not None else None
            if clip is None or written is None:
                assert place.trouble is not None, f"row {place.row} has neither a clip nor a reason"
                writer.fail(place.trouble)
                continue
            writer.write(place.row, written, partial=place.trouble)
            self._progress.bytes_written += sum(array.nbytes for array in written.values())
            self._progress.frames_done += len(clip.images)
