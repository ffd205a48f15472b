"""Shards as tasks of a dask cluster: processes of this machine (`--workers N`), or whatever a scheduler has (`--scheduler`).

The command lists the videos, makes and calibrates the store and holds its lock, as on one machine: it needs the backbone for the
key anyway, and a request that cannot be met ends before any worker has begun. Workers get shards with their videos, look the rest
up themselves (cluster_worker.py) and write to the store directly; only counts come back. A few tasks for each worker are with the
scheduler at any time, so that a lost worker takes little with it, and later workers get their share.
"""

import importlib.metadata
import itertools
import logging
import os
import queue
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from distributed import Client, Future, Nanny, Scheduler, SpecCluster
from distributed.scheduler import KilledWorker

from vcache.pipelines.cluster_task import pack, run_packed
from vcache.pipelines.cluster_worker import (
    ClusterError,
    RemoteJob,
    RunRequest,
    StoreRequest,
    TaskReport,
    end_run,
    extract_shards,
    manifest_digest,
)
from vcache.pipelines.extraction import RunElsewhere
from vcache.pipelines.progress import STAGES, ExtractionProgress
from vcache.pipelines.request import ExtractionConfig, portable
from vcache.pipelines.setup import ExtractionSetup
from vcache.pipelines.shards import ShardJob, Target
from vcache.store.writer import clean_temporary

_CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_TASKS_PER_WORKER = 2  # one at work and one that is there when it is done
_MAX_SHARDS_PER_TASK = 8
_TIMES_LOST = 3  # dask gives a task up after four workers; so often it is given to dask


class Cluster:
    """Where the shards of a run are extracted."""

    def __init__(self, config: ExtractionConfig, connect: Callable[[], AbstractContextManager[Client]]) -> None:
        self._config, self._connect = config, connect

    def run(
        self,
        jobs: Sequence[ShardJob],
        setups: Mapping[Target, ExtractionSetup],
        progress: ExtractionProgress,
        report: Callable[[], None],
    ) -> None:
        """Extract and commit the jobs; `report` is called about once a second, in the calling thread.

        Args:
            setups: of each target of the jobs, what makes it elsewhere.

        Raises:
            ClusterError: a worker cannot take part, or the cluster is gone.
            Whatever ends an extraction on one machine. What was committed by then is kept.
        """
        with self._connect() as client:
            hosts = [worker["host"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
            request = _request(self._config, setups, max(map(hosts.count, hosts), default=1))
            numbers = {target: number for number, target in enumerate(setups)}
            remote = [
                RemoteJob(videos=job.videos, tasks=tuple((numbers[one.target], one.task) for one in job.tasks))
                for job in jobs
            ]
            _Run(client, request, _grouped(remote, len(hosts)), progress, report).finish()
        for target in setups:
            clean_temporary(target.store)  # of lost workers


@contextmanager
def open_cluster(config: ExtractionConfig, on_stage: Callable[[str], None]) -> Iterator[RunElsewhere]:
    """The cluster that the request names. A scheduler is connected to at once, local workers are started when there is work.

    Raises:
        ClusterError: nobody answers at the address; there is no GPU for `--workers 0`.
    """
    if config.scheduler is None:
        num_workers, gpus = _local_workers(config)
        yield Cluster(config, lambda: _local_client(num_workers, gpus)).run
        return
    on_stage(f"connecting to {config.scheduler}")
    with _client(config.scheduler) as client:
        yield Cluster(config, lambda: nullcontext(client)).run


class _Run:
    """The tasks of one run, from the first to the last."""

    def __init__(
        self,
        client: Client,
        request: RunRequest,
        tasks: Sequence[tuple[RemoteJob, ...]],
        progress: ExtractionProgress,
        report: Callable[[], None],
    ) -> None:
        self._client, self._request, self._tasks = client, request, tasks
        self._waiting = [(number, 1) for number in reversed(range(len(tasks)))]
        """Tasks to be submitted, from the end, with how often that will have been."""
        self._running: dict[Future, tuple[int, int]] = {}
        self._submissions = itertools.count()
        self._heard = queue.SimpleQueue[Future | dict[str, Any]]()
        """Finished tasks and events of workers."""
        self._totals = _Totals(progress, report)
        self._address = client.scheduler_info(n_workers=0)["address"]

    def finish(self) -> None:
        self._client.subscribe_topic(self._request.run, self._on_event)
        try:
            while self._waiting or self._running:
                self._look()
                self._next()
        finally:
            with suppress(OSError, RuntimeError):  # without a scheduler nobody listens
                # Of a run that ends early: their workers find out, and leave the shards at hand.
                self._client.cancel(list(self._running), force=True)
                self._client.unsubscribe_topic(self._request.run)
                self._client.run(end_run, self._request.run, on_error="ignore")
        self._totals.tell()

    def _on_event(self, event: tuple[float, Any]) -> None:
        # In the thread of dask's connections, which an exception would end.
        self._heard.put(event[1])

    def _look(self) -> None:
        """Submit what is to be with the scheduler now."""
        try:
            num_workers = len(self._client.nthreads())
        except OSError as error:
            raise self._gone() from error
        self._totals.num_workers = num_workers
        while self._waiting and len(self._running) < _TASKS_PER_WORKER * max(num_workers, 1):
            number, times = self._waiting.pop()
            key = f"{self._request.run}-{number}-{next(self._submissions)}"
            packed = pack(extract_shards, self._request, number, self._tasks[number])
            future = self._client.submit(run_packed, packed, key=key)
            self._running[future] = number, times
            future.add_done_callback(self._heard.put)

    def _next(self) -> None:
        """Wait for news, and take all that there is."""
        try:
            news = self._heard.get(timeout=_LOOK_SECONDS)
            while True:
                self._take(news)
                news = self._heard.get_nowait()
        except queue.Empty:
            self._totals.tell()

    def _take(self, news: Future | dict[str, Any]) -> None:
        if isinstance(news, dict):
            self._totals.take(TaskReport.from_event(news))
            return
        number, times = self._running.pop(news)
        if news.status == "finished":
            self._totals.take(news.result(), done=True)
            return
        if news.status == "lost":  # done, and its worker died before the result was here
            self._waiting.append((number, times))
            return
        if news.status != "error":
            raise self._gone()
        error = news.exception()
        if not isinstance(error, KilledWorker):
            raise error
        if times == _TIMES_LOST:
            raise ClusterError(
                f"all workers that took shards {self._named(number)} were lost, the last was {error.last_worker.address}. Look "
                "for the reason in its log: often memory ran out."
            ) from error
        self._waiting.append((number, times + 1))

    def _gone(self) -> ClusterError:
        return ClusterError(
            f"the scheduler {self._address} is gone. What is committed is kept: start it and its workers again, and give "
            "the same command."
        )

    def _named(self, number: int) -> str:
        tasks = [task for job in self._tasks[number] for _, task in job.tasks]
        return ", ".join(dict.fromkeys(f"{task.part}/{task.shard}" for task in tasks))


class _Totals:
    """The progress of all tasks as that of one run."""

    def __init__(self, progress: ExtractionProgress, report: Callable[[], None]) -> None:
        self._progress, self._report = progress, report
        self._done, self._seconds = ExtractionProgress(), dict.fromkeys(STAGES, 0.0)
        self._open: dict[int, TaskReport] = {}
        self._finished: set[int] = set()
        self.num_workers = 0

    def take(self, report: TaskReport, *, done: bool = False) -> None:
        if report.task in self._finished:
            return  # news of a worker that was too late
        self._open[report.task] = report
        if done:
            self._finished.add(report.task)
            self._add(self._done, self._open.pop(report.task), self._seconds)

    def tell(self) -> None:
        """Write the sums into the progress of the run."""
        total, seconds = replace(self._done), dict(self._seconds)
        for report in self._open.values():
            self._add(total, report, seconds)
        for name in ("videos_done", "failures", "frames_done", "bytes_written"):
            setattr(self._progress, name, getattr(total, name))
        self._progress.limits = _shares(seconds)
        recent = [report.progress.recent_limits for report in self._open.values()]
        now = _shares({stage: sum((limits.get(stage, 0.0) for limits in recent), 0.0) for stage in STAGES})
        self._progress.recent_limits = now or self._progress.limits
        self._progress.workers = self.num_workers
        self._report()

    @staticmethod
    def _add(total: ExtractionProgress, report: TaskReport, seconds: dict[str, float]) -> None:
        for name in ("videos_done", "failures", "frames_done", "bytes_written"):
            setattr(total, name, getattr(total, name) + getattr(report.progress, name))
        for stage, share in report.progress.limits.items():
            seconds[stage] += share * report.seconds


def _shares(amounts: Mapping[str, float]) -> dict[str, float]:
    total = sum(amounts.values())
    return {name: amount / total for name, amount in amounts.items()} if total else {}


def _request(config: ExtractionConfig, setups: Mapping[Target, ExtractionSetup], workers_per_host: int) -> RunRequest:
    stores = tuple(
        StoreRequest(
            config=portable(replace(setup.config, store=setup.path)), manifest=manifest_digest(target.store.manifest)
        )
        for target, setup in setups.items()
    )
    dataset = next(iter(setups.values())).dataset
    root = dataset.root.absolute()
    return RunRequest(
        run=f"vcache-{uuid.uuid4().hex}",
        stores=stores,
        dataset=replace(dataset, root=root, videos=(), class_names=(), label_names={}, unused=()),
        probe=next((video.path for video in dataset.videos if (root / video.path).exists()), None),
        vcache=importlib.metadata.version("vcache"),
        decode_workers=config.cluster_decode_workers,
        workers_per_host=workers_per_host,
    )


def _grouped(jobs: Sequence[RemoteJob], num_workers: int) -> list[tuple[RemoteJob, ...]]:
    """The jobs of each task: the commit of a shard and the start of the next overlap only within one, and the last tasks of a
    run should be short."""
    size = min(_MAX_SHARDS_PER_TASK, max(1, len(jobs) // (16 * max(num_workers, 1))))
    return [tuple(jobs[first : first + size]) for first in range(0, len(jobs), size)]


@contextmanager
def _client(address: str | SpecCluster) -> Iterator[Client]:
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False, name="vcache")
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {address} ({error}). Start one with  dask scheduler  and give the address that it "
            "prints, as in  --scheduler tcp://HOST:8786"
        ) from error
    with client:
        yield client


@contextmanager
def _local_client(num_workers: int, gpus: Sequence[str]) -> Iterator[Client]:
    """A cluster of processes of this machine, which are started again if they die, and end with this one."""
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                # What a worker holds is bounded by the stages; dask would kill it at its share of the machine.
                "memory_limit": 0,
                "host": "127.0.0.1",
                "dashboard": False,
                "silence_logs": logging.CRITICAL,
                "env": {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {},
            },
        }
        for number in range(num_workers)
    }
    # Port 0 is a free one: another cluster may be on this machine.
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": options}
    with (
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        _client(cluster) as client,
    ):
        yield client


def _local_workers(config: ExtractionConfig) -> tuple[int, list[str]]:
    """How many processes, and the GPUs that are dealt out to them."""
    gpus: list[str] = []
    if config.device in ("auto", "cuda") and (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if not config.workers and not gpus:
        raise ClusterError("--workers 0 is one for each GPU, and torch sees none here. Say how many: --workers N.")
    return config.workers or len(gpus), gpus
