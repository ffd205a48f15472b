"""The stages of an extraction, each at work on another video: decode threads -> the backbone -> the writer.

    num_threads feeders   a video decoded once, and the images of every view of every model prepared in uint8
    read-ahead            prepared rows, in order, as many as the threads and two batches
    the calling thread    batches in fixed slots, through the backbone
    MAX_BATCHES           batches computed, being copied from the device or waiting to be written
    one writer            shards in order; a shard is committed while the next one is computed

What is held at the same time, in bytes, is at most

    num_threads x (frames of a decoded video)  +  (num_threads + 2 B) x V  +  B x V  +  MAX_BATCHES x B x R

with B clips in a batch, V bytes of the prepared views of one video (T x 3 x S x S each), and R bytes of a stored row of the
largest task; where a job has several tasks, one more half-filled batch of prepared clips for each. The backbone's own memory
comes on top. A slow stage makes the others wait and nothing grow.

An error in any stage, and Ctrl-C, ends the others: what was committed is kept, nothing of the shards at hand, no thread is left,
and the error comes out of `run_jobs`.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.extract.views import PreparedClip, View
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.decoding import Decode, Decoder
from vcache.pipelines.progress import ExtractionProgress, LimitClock
from vcache.pipelines.shards import ShardJob, TargetTask
from vcache.pipelines.writing import BatchRow, RowBatch, ShardWriting
from vcache.store.writer import RowFailure

MAX_BATCHES = 3
"""One being computed or copied, one waiting, one being written."""


@dataclass(frozen=True)
class PreparedVideo:
    """A clip for each of some tasks, all from one pass over the video."""

    clips: tuple[PreparedClip, ...]
    damage: VideoError | None
    """What is wrong with the video, if it was taken all the same."""
    num_video_frames: int = 0
    """Of the whole file."""
    fps: float | None = None


@dataclass(frozen=True)
class PreparedRow:
    """One video of a job, or why it gives nothing."""

    job: ShardJob
    index: int
    result: PreparedVideo | VideoError


@dataclass
class _OpenBatch:
    """The next batch of a task, being filled."""

    task: TargetTask
    counts: bool
    slots: list[PreparedClip | None] = field(default_factory=list)
    rows: list[BatchRow] = field(default_factory=list)

    def add(self, row: int, clip: PreparedClip | None, trouble: RowFailure | None) -> bool:
        """Put the next row into its slot; whether the batch is then complete: full, or at the end of the shard."""
        self.rows.append(BatchRow(row, len(self.slots), trouble))
        self.slots.append(clip)
        return len(self.slots) == self.task.target.extractor.batch_size or row == self.task.task.rows[-1]


def run_jobs(
    jobs: Iterable[ShardJob],
    *,
    decoder: Decoder,
    num_threads: int,
    progress: ExtractionProgress,
    report: Callable[[], None],
) -> None:
    """Extract and commit the jobs one after the other; `report` is called after every batch of clips.

    A video that cannot be used is recorded as failed in all tasks of its job and the run goes on; any other error stops it.

    Args:
        decoder: closed if the run ends early, so that nothing has to be waited for.
    """
    jobs = tuple(jobs)
    batch_size = max((task.target.extractor.batch_size for job in jobs for task in job.tasks), default=1)
    clock = LimitClock()
    feeders = rows_ahead(jobs, decoder, num_threads, num_threads + 2 * batch_size)
    with ShardWriting(progress, MAX_BATCHES) as writing, closing(feeders) as rows:
        backbone = _BackboneStage(writing, clock)
        for row in _timed(rows, clock):
            if backbone.take(row):
                clock.update(progress)
                report()
        backbone.finish()
        with clock.waiting_for("disk"):
            writing.drain()
    clock.update(progress)
    report()


def rows_ahead(jobs: Iterable[ShardJob], decoder: Decoder, num_threads: int, read_ahead: int) -> Generator[PreparedRow]:
    """The rows of the jobs in order, with up to `read_ahead` of them decoded or being decoded ahead."""
    pending: deque[Future[PreparedRow]] = deque()
    pool = ThreadPoolExecutor(num_threads, "decode")
    try:
        for job in jobs:
            for index in range(len(job.videos)):
                pending.append(pool.submit(prepared_row, job, index, decoder.decode))
                if len(pending) >= read_ahead:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:  # also where the caller stops asking
        decoder.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def prepared_row(job: ShardJob, index: int, decode: Decode) -> PreparedRow:
    """A video of the job, ready for all that the job makes of it."""
    try:
        return PreparedRow(job, index, prepared_video(job.tasks, job.videos[index], decode))
    except VideoError as error:
        return PreparedRow(job, index, error)


def prepared_video(tasks: Sequence[TargetTask], video: Video, decode: Decode) -> PreparedVideo:
    """What `prepared_clips` gives for the view of each task."""
    return prepared_clips([(task.target.extractor, task.view) for task in tasks], video, decode)


def prepared_clips(wanted: Sequence[tuple[ClipExtractor, View]], video: Video, decode: Decode) -> PreparedVideo:
    """Decode a video once, and make each view as its model sees it, alike ones once; VideoError if it cannot be used."""
    rules = [view.clip_rule(extractor.sampling, video.video_id) for extractor, view in wanted]
    distinct = tuple(dict.fromkeys(rules))
    decoded = decode(wanted[0][0].request(video, distinct))
    made: dict[object, PreparedClip] = {}
    clips = []
    for (extractor, view), rule in zip(wanted, rules, strict=True):
        alike = (view, rule, extractor.preprocessing)
        if alike not in made:
            made[alike] = view.prepare(decoded, distinct.index(rule), extractor.preprocessing, video.video_id)
        clips.append(made[alike])
    return PreparedVideo(tuple(clips), decoded.damage, decoded.num_video_frames, decoded.fps)


class _BackboneStage:
    """Fills batches, runs them, and hands them to the writer in order; on a GPU one behind, so that it never stands idle."""

    def __init__(self, writing: ShardWriting, clock: LimitClock) -> None:
        self._writing, self._clock = writing, clock
        self._open: dict[TargetTask, _OpenBatch] = {}
        self._started: deque[RowBatch] = deque()

    def take(self, row: PreparedRow) -> bool:
        """Add a row to the batches of its tasks; whether that completed one."""
        completed, result = False, row.result
        error = result if isinstance(result, VideoError) else result.damage
        for number, task in enumerate(row.job.tasks):
            batch = self._open.setdefault(task, _OpenBatch(task, counts=number == len(row.job.tasks) - 1))
            clip = None if isinstance(result, VideoError) else result.clips[number]
            if batch.add(task.task.rows[row.index], clip, _trouble(row, task, error) if error else None):
                self._run(self._open.pop(task))
                completed = True
        return completed

    def finish(self) -> None:
        """Hand over what is still on the device."""
        self._hand_over(0)

    def _run(self, batch: _OpenBatch) -> None:
        with self._clock.waiting_for("disk"):
            self._writing.reserve()
        extractor, encoded = batch.task.target.extractor, None
        if any(clip is not None for clip in batch.slots):
            empty = [None] * (extractor.batch_size - len(batch.slots))
            encoded = extractor.start([*batch.slots, *empty], batch.task.task.arrays)
        self._started.append(RowBatch(batch.task, batch.rows, encoded, batch.counts))
        self._hand_over(1 if encoded is not None and encoded.copied is not None else 0)

    def _hand_over(self, leave: int) -> None:
        while len(self._started) > leave:
            batch = self._started.popleft()
            if batch.encoded is not None:
                batch.encoded.wait()
            self._writing.submit(batch)


def _trouble(row: PreparedRow, task: TargetTask, error: VideoError) -> RowFailure:
    place = task.task.rows[row.index]
    # The path as listed when the row was made; the file may lie elsewhere now.
    path = task.target.store.part_videos(task.task.part).paths[place]
    return RowFailure(place, row.job.videos[row.index].video_id, path, error.kind, error.reason)


def _timed(rows: Iterator[PreparedRow], clock: LimitClock) -> Iterator[PreparedRow]:
    while True:
        with clock.waiting_for("decode"):
            row = next(rows, None)
        if row is None:
            return
        yield row
