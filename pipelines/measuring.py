"""What this machine does: decoding, the forward pass, writing and reading, each measured on the real thing for a few seconds."""

import itertools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vcache.extract.datasets.base import Video
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError
from vcache.extract.views import PreparedClip, View
from vcache.pipelines.batches import ClipExtractor, EncodedBatch
from vcache.pipelines.decoding import Decode, new_decoder
from vcache.pipelines.planning import Rates
from vcache.pipelines.precision import unit_constants
from vcache.pipelines.room import free_bytes, nearest_folder
from vcache.pipelines.setup import ExtractionSetup
from vcache.pipelines.stages import prepared_clips
from vcache.store.checksum import crc32c
from vcache.store.finite import all_finite
from vcache.store.layout import ArraySpec
from vcache.store.object_path import local

_MOST_VIDEOS = 4096
_PIECE_BYTES = 4 * 2**20
_SYNC_BYTES = 64 * 2**20
_MOST_BYTES = 1024 * 2**20
_READ_THREADS = 4  # as many as read a store
_FLOAT16_EXPONENT = 0x7C00


class MeasuringError(ValueError):
    """The machine cannot be measured; the message says what stands in the way."""


@dataclass(frozen=True)
class DecodingSample:
    """Some videos of the dataset, decoded as the extraction does it."""

    seconds_per_video: float
    """With all processes at work, and all views of all models prepared."""
    seconds_per_view: float
    """The same with one view."""
    clips: tuple[tuple[PreparedClip, ...], ...]
    """For each model a batch of clips of view 0, or fewer."""
    num_decoded: int
    num_failed: int


@dataclass(frozen=True)
class DiskRates:
    """One writer and several readers of one file."""

    write_bytes_per_second: float
    """Checked, summed and synced, as features are."""
    write_cores: float
    """Share of the cores that this takes."""
    read_bytes_per_second: float


def measure_rates(
    setups: Sequence[ExtractionSetup], seconds: float, on_stage: Callable[[str], None] = lambda name: None
) -> Rates:
    """Measure for about `seconds` in all; leaves nothing on the disk.

    Args:
        setups: of the models of one command.

    Raises:
        MeasuringError: no video of the sample can be decoded, or the store's disk cannot be written.
    """
    first = setups[0]
    on_stage("decoding a sample of the videos")
    with closing(new_decoder(first.config.decode_workers, first.decoder)) as decoder:
        sample = measure_decoding(setups, decoder.decode, seconds=0.4 * seconds)
    forward_seconds = []
    for setup, clips in zip(setups, sample.clips, strict=True):
        on_stage(f"running {setup.backbone.facts.model} on {setup.backbone.device}")
        each = 0.35 * seconds / len(setups)
        forward_seconds.append(measure_forward(setup.extractor(), clips, setup.arrays, seconds=each))
    on_stage("writing and reading a temporary file")
    row_bytes = max(spec.row_bytes for setup in setups for spec in setup.arrays)
    disk = measure_disk(local(first.path), row_bytes, seconds=0.25 * seconds)
    return Rates(
        decode_seconds=sample.seconds_per_video,
        view_decode_seconds=sample.seconds_per_view,
        forward_seconds=tuple(forward_seconds),
        write_bytes_per_second=disk.write_bytes_per_second,
        read_bytes_per_second=disk.read_bytes_per_second,
        shared_cores=first.backbone.device.type == "cpu",
        decode_cores=min(1.0, first.config.decode_workers / _num_cores()),
        write_cores=disk.write_cores,
        num_sampled=sample.num_decoded,
        num_failed=sample.num_failed,
    )


def measure_decoding(setups: Sequence[ExtractionSetup], decode: Decode, *, seconds: float) -> DecodingSample:
    """Decode videos from all over the dataset, as many at a time as the extraction, until the time is over; at least one each."""
    sample = _Sample(setups, decode)
    num_threads = min(setups[0].config.decode_workers, len(sample.pending))
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda _: sample.warm_up(), range(num_threads)))  # starting a process is not decoding
        deadline = time.perf_counter() + seconds
        list(pool.map(lambda _: sample.decode_until(deadline), range(num_threads)))
    if not sample.busy:
        raise MeasuringError(
            f"none of {len(sample.failures)} videos of the sample can be decoded; {sample.failures[0]}. "
            "Mend the dataset, or leave the measuring out with --quick."
        )
    # Time at work, not time on the clock: at the end of so short a run threads stand idle.
    per_video, per_view = (sum(times) / num_threads / len(sample.busy) for times in zip(*sample.busy, strict=True))
    batches = zip(setups, sample.clips, strict=True)
    clips = tuple(tuple(clips[: setup.batch_size]) for setup, clips in batches)
    return DecodingSample(per_video, per_view, clips, len(sample.busy), len(sample.failures))


class _Sample:
    """Videos in a random order, taken by several threads, and what came of them."""

    def __init__(self, setups: Sequence[ExtractionSetup], decode: Decode) -> None:
        videos = setups[0].dataset.videos
        order = random.Random(0).sample(range(len(videos)), min(len(videos), _MOST_VIDEOS))
        self.pending = [videos[i] for i in reversed(order)]
        self.busy: list[tuple[float, float]] = []
        """Of each video that was decoded: seconds with all its views, and with one."""
        self.clips: tuple[list[PreparedClip], ...] = tuple([] for _ in setups)
        self.failures: list[str] = []
        self._setups, self._decode, self._lock = setups, decode, threading.Lock()
        self._extractors = [setup.extractor() for setup in setups]
        for extractor in self._extractors:
            extractor.allow_partial = setups[0].config.allow_partial
        self._most_clips = max(setup.batch_size for setup in setups)
        self._to_warm_up = list(self.pending)

    def warm_up(self) -> None:
        """One video whose time does not count; it stays among those to come."""
        with self._lock:
            video = self._to_warm_up.pop()
        with suppress(VideoError):  # it will be told of when its turn comes
            self._prepare(video)

    def decode_until(self, deadline: float) -> None:
        first = True
        while first or time.perf_counter() < deadline:
            first = False
            with self._lock:
                if not self.pending:
                    return
                video = self.pending.pop()
            try:
                times, clips = self._prepare(video)
            except VideoError as error:
                self.failures.append(f"{video.path}: {error}")
                continue
            self._keep(times, clips)

    def _keep(self, times: tuple[float, float], clips: Sequence[PreparedClip]) -> None:
        with self._lock:
            self.busy.append(times)
            if len(self.clips[0]) < self._most_clips:
                for kept, clip in zip(self.clips, clips, strict=True):
                    kept.append(clip)

    def _prepare(self, video: Video) -> tuple[tuple[float, float], list[PreparedClip]]:
        """Seconds with all views and with one, and the clip of view 0 for each model."""
        wanted, first = _wanted(self._setups, self._extractors, video)
        decoding = 0.0

        def decode(request: DecodeRequest) -> DecodedVideo:
            nonlocal decoding
            began = time.perf_counter()
            decoded = self._decode(request)
            decoding = time.perf_counter() - began
            return decoded

        began = time.perf_counter()
        clips = prepared_clips(wanted, video, decode).clips
        whole = time.perf_counter() - began
        one_view = decoding + (whole - decoding) * len(self._setups) / len(wanted)
        return (whole, one_view), [clips[number] for number in first]


def _wanted(
    setups: Sequence[ExtractionSetup], extractors: Sequence[ClipExtractor], video: Video
) -> tuple[list[tuple[ClipExtractor, View]], list[int]]:
    """All that the extraction makes of a video, and where in it each model's view 0 is."""
    wanted: list[tuple[ClipExtractor, View]] = []
    first = []
    for setup, extractor in zip(setups, extractors, strict=True):
        first.append(len(wanted))  # view 0 is the first that is wanted, and of every split
        wanted += [(extractor, view) for view in setup.wanted_views if view.covers(video.split)]
    return wanted, first


def measure_forward(
    extractor: ClipExtractor, clips: Sequence[PreparedClip], arrays: tuple[ArraySpec, ...], *, seconds: float
) -> float:
    """Seconds per clip from prepared clips to arrays in the store's dtype, warm and in batches of the extraction's size."""
    extractor.constants = unit_constants(arrays, extractor.backbone.device)
    began = time.perf_counter()
    extractor.start(clips[:1], arrays).wait()
    once = time.perf_counter() - began
    # Few videos fill a batch more than once; and a whole batch may take minutes on a CPU.
    most = max(1, min(extractor.batch_size, int(seconds / 2 / once)))
    batch = list(itertools.islice(itertools.cycle(clips), most))
    if len(batch) > 1:
        extractor.start(batch, arrays).wait()
    began, num_clips, running = time.perf_counter(), 0, list[EncodedBatch]()
    while not num_clips or time.perf_counter() - began < seconds:
        running.append(extractor.start(batch, arrays))
        num_clips += len(batch)
        if len(running) > 1:  # a device has the next batch before the last one is waited for
            running.pop(0).wait()
    running.pop().wait()
    return (time.perf_counter() - began) / num_clips


def measure_disk(path: Path, row_bytes: int, *, seconds: float) -> DiskRates:
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
            began_cpu = time.process_time()
            written, write_seconds = _write(file, num_bytes, seconds / 2)
            cores = (time.process_time() - began_cpu) / write_seconds / _num_cores()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            read, read_seconds = _read(file, written, min(row_bytes, written), seconds / 2)
    except OSError as error:
        raise MeasuringError(f"cannot write in {folder}: {error.strerror}. Name another place with --store.") from error
    return DiskRates(written / write_seconds, min(1.0, cores), read / read_seconds)


def _write(file: BinaryIO, num_bytes: int, seconds: float) -> tuple[int, float]:
    values = np.random.default_rng(0).standard_normal(_PIECE_BYTES // 2).astype("<f2")  # does not compress well
    piece = values.tobytes()
    began, written, synced = time.perf_counter(), 0, 0
    while not written or (written < num_bytes and time.perf_counter() - began < seconds):
        assert all_finite(values, _FLOAT16_EXPONENT)
        crc32c(piece)
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


def _num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))
