"""What this machine does: decoding, the forward pass, writing and reading, each measured on the real thing for a few seconds."""

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.extract.views import PreparedClip
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.planning import Rates
from vcache.pipelines.precision import unit_constants
from vcache.pipelines.room import free_bytes, nearest_folder
from vcache.pipelines.setup import ExtractionSetup
from vcache.store.layout import ArraySpec
from vcache.store.object_path import local

_MOST_VIDEOS = 4096
_PIECE_BYTES = 4 * 2**20
_SYNC_BYTES = 64 * 2**20
_MOST_BYTES = 1024 * 2**20
_READ_THREADS = 4  # as many as read a store


class MeasuringError(ValueError):
    """The machine cannot be measured; the message says what stands in the way."""


@dataclass(frozen=True)
class DecodingSample:
    """Some videos of the dataset, decoded."""

    seconds_per_video: float
    """With all threads at work."""
    clips: list[PreparedClip]
    """A batch of them, or fewer."""
    num_decoded: int
    num_failed: int


def measure_rates(setup: ExtractionSetup, seconds: float, on_stage: Callable[[str], None] = lambda name: None) -> Rates:
    """Measure for about `seconds` in all; leaves nothing on the disk.

    Raises:
        MeasuringError: no video of the sample can be decoded, or the store's disk cannot be written.
    """
    extractor = setup.extractor()
    on_stage("decoding a sample of the videos")
    sample = measure_decoding(extractor, setup.dataset.videos, seconds=0.4 * seconds)
    on_stage(f"running the backbone on {setup.backbone.device}")
    forward_seconds = measure_forward(extractor, sample.clips, setup.arrays, seconds=0.35 * seconds)
    on_stage("writing and reading a temporary file")
    row_bytes = max(spec.row_bytes for spec in setup.arrays)
    write, read = measure_disk(local(setup.path), row_bytes, seconds=0.25 * seconds)
    return Rates(
        decode_seconds=sample.seconds_per_video,
        forward_seconds=forward_seconds,
        write_bytes_per_second=write,
        read_bytes_per_second=read,
        shared_cores=setup.backbone.device.type == "cpu",
        num_sampled=sample.num_decoded,
        num_failed=sample.num_failed,
    )


def measure_decoding(extractor: ClipExtractor, videos: Sequence[Video], *, seconds: float) -> DecodingSample:
    """Decode videos from all over the dataset on the extractor's threads until the time is over; at least one a thread."""
    order = random.Random(0).sample(range(len(videos)), min(len(videos), _MOST_VIDEOS))
    pending = [videos[i] for i in reversed(order)]
    busy: list[float] = []
    clips: list[PreparedClip] = []
    failures: list[str] = []
    lock = threading.Lock()
    deadline = time.perf_counter() + seconds

    def decode_until_the_deadline() -> None:
        first = True
        while pending and (first or time.perf_counter() < deadline):
            first = False
            try:
                video, began = pending.pop(), time.perf_counter()
                clip = extractor.prepare(video)
            except IndexError:  # another thread took the last one
                return
            except VideoError as error:
                failures.append(f"{video.path}: {error}")
                continue
            with lock:
                busy.append(time.perf_counter() - began)
                if len(clips) < extractor.batch_size:
                    clips.append(clip)

    num_threads = min(extractor.num_threads, len(pending))
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(decode_until_the_deadline) for _ in range(num_threads)]:
            future.result()
    if not busy:
        raise MeasuringError(
            f"none of {len(failures)} videos of the sample can be decoded; {failures[0]}. "
            "Mend the dataset, or leave the measuring out with --quick."
        )
    # Time at work, not time on the clock: at the end of so short a run threads stand idle.
    return DecodingSample(sum(busy) / num_threads / len(busy), clips, len(busy), len(failures))


def measure_forward(
    extractor: ClipExtractor, clips: list[PreparedClip], arrays: tuple[ArraySpec, ...], *, seconds: float
) -> float:
    """Seconds per video from prepared clips to arrays in the store's dtype, warm."""
    extractor.constants = unit_constants(arrays, extractor.backbone.device)
    began = time.perf_counter()
    extractor.forward(clips[:1], arrays)
    once = time.perf_counter() - began
    batch = clips[: max(1, int(seconds / 2 / once))]  # a whole batch may take minutes on a CPU
    if len(batch) > 1:
        extractor.forward(batch, arrays)
    began, num_clips = time.perf_counter(), 0
    while not num_clips or time.perf_counter() - began < seconds:
        extractor.forward(batch, arrays)
        num_clips += len(batch)
    return (time.perf_counter() - began) / num_clips


def measure_disk(path: Path, row_bytes: int, *, seconds: float) -> tuple[float, float]:
    """Bytes per second written and synced, and read back by rows in random order, on the disk of `path`.

    The page cache is asked to let go of the file before it is read; caches of the drive itself are not under our control.
    A file system in memory shows the speed of the memory, which is right for it.
    """
    folder = nearest_folder(path)
    num_bytes = min(_MOST_BYTES, free_bytes(folder) // 8)
    if num_bytes < _PIECE_BYTES:
        raise MeasuringError(f"the disk of {folder} is full. Make room, or name another one with --store.")
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            written, write_seconds = _write(file, num_bytes, seconds / 2)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            read, read_seconds = _read(file, written, min(row_bytes, written), seconds / 2)
    except OSError as error:
        raise MeasuringError(f"cannot write in {folder}: {error.strerror}. Name another place with --store.") from error
    return written / write_seconds, read / read_seconds


def _write(file: BinaryIO, num_bytes: int, seconds: float) -> tuple[int, float]:
    piece = memoryview(random.Random(0).randbytes(_PIECE_BYTES))  # what compresses would be faster than features are
    began, written, synced = time.perf_counter(), 0, 0
    while not written or (written < num_bytes and time.perf_counter() - began < seconds):
        written += file.write(piece)
        if written - synced >= _SYNC_BYTES:
            os.fsync(file.fileno())
            synced = written
    os.fsync(file.fileno())
    return written, time.perf_counter() - began


def _read(file: BinaryIO, num_bytes: int, row_bytes: int, seconds: float) -> tuple[int, float]:
    starts = list(range(0, num_bytes - row_bytes + 1, row_bytes))
    random.Random(0).shuffle(starts)
    began = time.perf_counter()

    def read_until_the_deadline() -> int:
        buffer, read = bytearray(row_bytes), 0
        while starts and (not read or time.perf_counter() - began < seconds):
            try:
                read += os.preadv(file.fileno(), [buffer], starts.pop())
            except IndexError:  # another thread took the last one
                break
        return read

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        futures = [pool.submit(read_until_the_deadline) for _ in range(_READ_THREADS)]
        total = sum(future.result() for future in futures)
    return total, time.perf_counter() - began
