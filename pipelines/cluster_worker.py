"""What a worker of a dask cluster does: the same stages as on one machine, for the shards of a task.

A task may run again elsewhere when its worker is lost, so it first looks which of its shards are committed by now. Backbone,
store and decode processes are made once for a run and kept until another run begins or an error occurs. Before a worker
writes anything it makes sure that it sees the store and the videos, and that its features would be those of the store.
"""

import hashlib
import importlib.metadata
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from distributed import get_worker

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.pipelines.decoding import new_decoder
from vcache.pipelines.extraction import new_target
from vcache.pipelines.precision import channel_constants
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import ExtractionSetup, load_setup
from vcache.pipelines.shards import ShardJob, ShardTask, Target, TargetTask
from vcache.pipelines.stages import run_jobs
from vcache.store.commits import read_shard_commits
from vcache.store.errors import StoreError, StoreExists, StoreNotFound
from vcache.store.groups import encode_manifest
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

SEE_STORE_SECONDS = 30.0
"""How long a worker looks for a store, or its newest manifest: network file systems show changes late."""

_LOOK_AGAIN_SECONDS, _TELL_SECONDS = 0.5, 1.0


class ClusterError(RuntimeError):
    """A cluster or one of its workers cannot extract; the message says which and what to do."""


class TaskCancelled(Exception):
    """The command that wanted the shards has ended."""


@dataclass(frozen=True, kw_only=True)
class StoreRequest:
    """One of the stores of a run; a worker finds out all the rest from it."""

    config: ExtractionConfig
    """`portable`, with the store named."""
    manifest: str
    """`manifest_digest` of what the workers should see."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What is the same for all tasks of a run."""

    run: str
    """A name that no other run has; also the topic of the workers' events."""
    stores: tuple[StoreRequest, ...]
    dataset: VideoDataset
    """Without its videos, which come with the tasks: workers need neither the annotation nor the time to read it."""
    probe: str | None
    """A video that is there, relative to the root; a worker that lacks it would record all videos as missing."""
    vcache: str
    """Version of the package."""
    decode_workers: int | None
    """Decode processes of a worker; None is the cores of its machine, shared among its workers."""
    workers_per_host: int


@dataclass(frozen=True, kw_only=True)
class RemoteJob:
    """A `ShardJob` without what is loaded: tasks as (index of the store in the request, task)."""

    videos: tuple[Video, ...]
    tasks: tuple[tuple[int, ShardTask], ...]


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """How far a task is. A task that was moved to another worker begins again, at the shards committed by then."""

    task: int
    progress: ExtractionProgress
    seconds: float = 0.0

    def to_event(self) -> dict[str, Any]:
        """In types that dask sends as they are."""
        return asdict(self)

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> "TaskReport":
        """Of an event that dask has added its own words to."""
        return cls(task=event["task"], progress=ExtractionProgress(**event["progress"]), seconds=event["seconds"])


def manifest_digest(manifest: Manifest) -> str:
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()


def extract_shards(request: RunRequest, task: int, jobs: tuple[RemoteJob, ...]) -> TaskReport:
    """Extract and commit what these jobs still lack; runs in a thread of a dask worker.

    Raises:
        ClusterError: this worker does not see the same files, or would compute other features; nothing is written then.
        TaskCancelled: nobody wants the shards any more.
        Whatever ends an extraction on one machine.
    """
    # A worker of several threads gets several tasks at once, but has one backbone.
    with _one_at_a_time:
        try:
            return _session_of(request).extract(task, jobs)
        except StoreExists as error:
            _end_session()
            # The shard was committed after this task had looked, by a worker that was given up for lost: the rest is left to do.
            # With a cause, it was committed with other values, which is no such thing.
            if error.__cause__ is not None:
                raise
            return _session_of(request).extract(task, jobs)
        except BaseException:
            _end_session()
            raise


class _Session:
    """What a worker process loads once for all tasks of a run."""

    def __init__(self, request: RunRequest) -> None:
        self.request = request
        self._constants: dict[int, set[str]] = {}
        """Of each target, the int8 arrays whose constants it has."""
        self._check_version()
        self._check_videos()
        self.num_threads = max(1, _num_cores() // request.workers_per_host)
        self.num_decoders = request.decode_workers or self.num_threads
        with ExitStack() as stack:
            opened = [self._open(store, stack) for store in request.stores]
            name = opened[0][1].decoder  # of the same videos
            self.decoder = stack.enter_context(closing(new_decoder(self.num_decoders, name)))
            self.targets = [self._target(store, setup) for store, setup in opened]
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def extract(self, task: int, jobs: tuple[RemoteJob, ...]) -> TaskReport:
        # In each thread that torch is called from; dask starts its workers with OMP_NUM_THREADS=1.
        torch.set_num_threads(self.num_threads)
        self._check_videos()
        left = list(self._left(jobs))
        run = _TaskRun(self, task, sum(len(job.videos) for job in jobs) - sum(len(job.videos) for job in left))
        run.do(left)
        return run.report()

    def _left(self, jobs: tuple[RemoteJob, ...]) -> Iterator[ShardJob]:
        for job in jobs:
            tasks = [(self.targets[store], task) for store, task in job.tasks]
            missing = [TargetTask(target, lacking) for target, task in tasks if (lacking := _lacking(target, task))]
            if missing:
                self._load_constants(missing)
                yield ShardJob(job.videos, tuple(missing))

    def _load_constants(self, tasks: list[TargetTask]) -> None:
        for task in tasks:
            target = task.target
            names = {spec.name for spec in task.task.arrays if spec.dtype == "int8"}
            known = self._constants.setdefault(id(target), set())
            if names - known:
                known |= names
                device = target.extractor.backbone.device
                target.extractor.constants = channel_constants(target.store, known, device)

    def _open(self, request: StoreRequest, stack: ExitStack) -> tuple[FeatureStore, ExtractionSetup]:
        store = stack.enter_context(_open_store(request))
        config = replace(request.config, decode_workers=self.num_decoders)
        try:
            setup = load_setup(config, self.request.dataset)
            store.check_key(setup.key, setup.spec.to_dict())
        except (ValueError, OSError, StoreError) as error:
            raise ClusterError(
                f"worker {_here()} cannot do what the command asks for. Install the same packages and put the same weights "
                f"on all machines.\n{error}"
            ) from error
        return store, setup.in_store(store)

    def _target(self, store: FeatureStore, setup: ExtractionSetup) -> Target:
        target = new_target(setup, store, self.decoder.decode)
        target.extractor.allow_partial = setup.config.allow_partial
        return target

    def _check_version(self) -> None:
        if (mine := importlib.metadata.version("vcache")) != self.request.vcache:
            raise ClusterError(
                f"worker {_here()} has vcache {mine}, the command {self.request.vcache}. Install the same on all machines."
            )

    def _check_videos(self) -> None:
        root, probe = self.request.dataset.root, self.request.probe
        if probe is not None and not (root / probe).exists():
            raise ClusterError(
                f"worker {_here()} does not see the videos: {root / probe} is not there. Mount them under the same path on all "
                "machines, or stop this worker."
            )


class _TaskRun:
    """One task on its way, and what it tells of itself."""

    def __init__(self, session: _Session, task: int, num_committed: int) -> None:
        """`num_committed` videos of the task are stored already: another worker began with it."""
        self._session, self._task = session, task
        self._progress, self._committed = ExtractionProgress(), num_committed
        self._began = self._told = time.monotonic()

    def do(self, jobs: list[ShardJob]) -> None:
        _check_wanted()
        if jobs:
            run_jobs(
                jobs,
                decoder=self._session.decoder,
                num_threads=self._session.num_decoders,
                progress=self._progress,
                report=self._tell,
            )

    def report(self) -> TaskReport:
        done = replace(self._progress, videos_done=self._progress.videos_done + self._committed)
        return TaskReport(task=self._task, progress=done, seconds=time.monotonic() - self._began)

    def _tell(self) -> None:
        _check_wanted()
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            get_worker().log_event(self._session.request.run, self.report().to_event())


_sessions: dict[str, _Session] = {}
"""Of the run at hand, and of no other: a backbone for each would fill the device."""
_one_at_a_time = threading.Lock()


def _session_of(request: RunRequest) -> _Session:
    if request.run not in _sessions:
        _end_session()
        _sessions[request.run] = _Session(request)
    return _sessions[request.run]


def _end_session() -> None:
    while _sessions:
        _sessions.popitem()[1].close()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def end_run(run: str) -> None:
    """Give back memory and processes. A task that is still at it does so itself when it finds that nobody wants it."""
    # Dask calls this in the thread that keeps the worker's connections, which must not wait.
    if _one_at_a_time.acquire(blocking=False):
        try:
            if run in _sessions:
                _end_session()
        finally:
            _one_at_a_time.release()


def _lacking(target: Target, task: ShardTask) -> ShardTask | None:
    """The task without the arrays that are committed by now, as the disk says; None if nothing is left."""
    records = read_shard_commits(target.store.path, task.part, task.view, task.shard)
    stored = {name for record in records for name in record.arrays}
    arrays = tuple(spec for spec in task.arrays if spec.name not in stored)
    return replace(task, arrays=arrays) if arrays else None


def _open_store(request: StoreRequest) -> FeatureStore:
    path, deadline = request.config.store, time.monotonic() + SEE_STORE_SECONDS
    assert path is not None, "a worker's request names the store"
    while True:
        try:
            store = FeatureStore.open(path)
            if manifest_digest(store.manifest) == request.manifest:
                return store
            store.close()
            seen = "sees another one there"
        except StoreNotFound:
            seen = "sees nothing there"
        except StoreError as error:
            raise ClusterError(f"worker {_here()} cannot open the store {path}: {error}") from error
        if time.monotonic() > deadline:
            raise ClusterError(
                f"worker {_here()} does not see the store {path} that the command writes; it {seen}. Give --store a folder that "
                "all machines share under one path, or s3://BUCKET/PATH."
            )
        time.sleep(_LOOK_AGAIN_SECONDS)


def _check_wanted() -> None:
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is None or task.state == "cancelled":
        raise TaskCancelled("the command has ended, or gave the shards to another worker")


def _here() -> str:
    return f"{get_worker().address} on {socket.gethostname()}"


def _num_cores() -> int:
    """Cores that this process may use: batch systems give a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
