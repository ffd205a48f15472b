"""`vcache extract --workers` and `--scheduler`: real schedulers and workers, one of them killed in the middle of a shard."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vcache.pipelines import setup
from vcache.pipelines.cluster_worker import ClusterError
from vcache.pipelines.console import limited_by, where_and_why
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.progress import ExtractionProgress
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]
RunCommand = Callable[[str], tuple[int, str, str]]

# What workers load when they start: tests tell them by files how to behave.
PRELOAD = """
import errno, os, time
from pathlib import Path
from vcache.store.writer import ShardWriter
here = Path(os.environ["VCACHE_TEST_FOLDER"])
write = getattr(ShardWriter.write, "original", ShardWriter.write)  # dask loads this file twice

def write_as_told(self, row, arrays, *, partial=None):
    if (here / "slow").exists():
        time.sleep(0.3)
    if (here / "full").exists() and self.shard == 2:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.store.path))
    write(self, row, arrays, partial=partial)

write_as_told.original = write
ShardWriter.write = write_as_told
"""


class DaskProcesses:
    """A scheduler and workers without nannies, as processes that can be killed one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, list[subprocess.Popen[bytes]]()
        (folder / "preload.py").write_text(PRELOAD)
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_until((folder / "scheduler.json").exists)
        self.address: str = json.loads((folder / "scheduler.json").read_text())["address"]

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        # Its own session: a Ctrl-C of a person does not end them before the tests do.
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *words, "--scheduler-file", str(self.folder / "scheduler.json")],
                env={**os.environ, "VCACHE_TEST_FOLDER": str(self.folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ensure(self, num_workers: int) -> None:
        """Have so many workers, whatever became of those before."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        words = ("worker", "--no-nanny", "--nthreads", "1", "--memory-limit", "0", "--no-dashboard")
        while len(self.workers) < num_workers:
            self.workers.append(self._start(*words, "--preload", str(self.folder / "preload.py")))

    def tell(self, word: str, on: bool = True) -> None:
        (self.folder / word).touch() if on else (self.folder / word).unlink(missing_ok=True)

    def writing(self, store: Path) -> list[subprocess.Popen[bytes]]:
        """The workers that have a temporary file of the store open."""
        return [worker for worker in self.workers if any(f"{store}/" in path for path in temporary_files(worker.pid))]

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


def temporary_files(pid: int) -> list[str]:
    paths = []
    with suppress(OSError):  # the process may end meanwhile, or close a file
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                paths.append(str(link.readlink()))
    return [path for path in paths if path.endswith(".tmp")]


def wait_until(true: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskProcesses]:
    processes = DaskProcesses(tmp_path_factory.mktemp("dask"))
    try:
        yield processes
    finally:
        processes.close()


@pytest.fixture
def dask(processes: DaskProcesses) -> Iterator[DaskProcesses]:
    yield processes
    for word in ("slow", "full"):
        processes.tell(word, on=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    """12 train and 6 val videos, one of them cut short."""
    folder = tmp_path_factory.mktemp("broken") / "videos"
    shutil.copytree(video_folder, folder)
    broken = folder / "train" / "jump" / "j2.mp4"
    broken.write_bytes(broken.read_bytes()[:700])
    return folder


@pytest.fixture
def shards(config: MakeConfig, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """The extraction in shards of three videos; `name` is that of the store."""
    monkeypatch.setattr(setup, "MAX_ROWS_PER_SHARD", 3)

    def make(name: str, **fields: object) -> ExtractionConfig:
        return config(dataset=str(videos), store=tmp_path / name, layers="-1:", cross_frame="none", **fields)

    return make


@pytest.fixture(scope="module")
def alone(tiny_extraction: MakeConfig, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The tree that one process makes."""
    store = tmp_path_factory.mktemp("alone") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "MAX_ROWS_PER_SHARD", 3)
        run_extraction(
            tiny_extraction(dataset=str(videos), store=store, batch_size=3, layers="-1:", cross_frame="none")
        )
    return tree(store)


def tree(store: object) -> dict[str, object]:
    """Every file, temporary ones too; the manifest without the time of creation and the checksum that covers it."""
    path = Path(str(store))
    files: dict[str, object] = {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }
    manifest = json.loads((path / "zarr.json").read_bytes())["attributes"]["vcache"]
    return files | {"zarr.json": {name: manifest[name] for name in manifest if name not in ("created", "crc32c")}}


def test_local_workers_make_the_tree_of_one_process(
    shards: MakeConfig, alone: dict[str, object], decode_processes: None
) -> None:
    seen: list[ExtractionProgress] = []
    summary = run_extraction(
        shards("local", workers=2, cluster_decode_workers=1), lambda progress: seen.append(progress)
    )
    assert tree(summary.store) == alone
    assert (summary.progress.videos_total, summary.progress.videos_done) == (18, 18)
    assert (summary.progress.failures, summary.progress.frames_done) == (1, 17 * 5)
    assert [failure.video_id for failure in summary.failures] == ["train/jump/j2.mp4"]
    assert sum(summary.progress.limits.values()) == pytest.approx(1)


def test_a_worker_killed_in_the_middle_of_a_shard_costs_nothing(
    dask: DaskProcesses, shards: MakeConfig, alone: dict[str, object]
) -> None:
    dask.ensure(2)
    dask.tell("slow")
    made, killed = shards("killed", scheduler=dask.address), list[int]()

    def kill_one(progress: ExtractionProgress) -> None:
        if not killed and progress.videos_done:
            wait_until(lambda: dask.writing(Path(str(made.store))))
            worker = dask.writing(Path(str(made.store)))[0]
            worker.send_signal(signal.SIGKILL)
            killed.append(worker.wait())
            assert len(list(Path(str(made.store)).rglob("*.tmp"))) > 0
            dask.tell("slow", on=False)

    summary = run_extraction(made, kill_one)
    assert killed == [-signal.SIGKILL]
    assert tree(made.store) == alone
    assert summary.progress.videos_done == 18
    assert [failure.video_id for failure in summary.failures] == ["train/jump/j2.mp4"]


def test_an_error_of_a_worker_ends_the_run_and_the_same_command_goes_on(
    dask: DaskProcesses, shards: MakeConfig, alone: dict[str, object]
) -> None:
    dask.ensure(1)
    dask.tell("full")
    made = shards("full", scheduler=dask.address)
    with pytest.raises(OSError, match="No space left on device"):
        run_extraction(made)
    with FeatureStore.open(made.store) as store:
        kept = sum(store.committed_rows("train", ["embed"]))
    assert 0 < kept < 11
    dask.tell("full", on=False)
    again = run_extraction(made)
    assert again.progress.videos_skipped > 0
    assert tree(made.store) == alone


def test_ctrl_c_stops_the_workers_and_the_same_command_goes_on(
    dask: DaskProcesses, shards: MakeConfig, alone: dict[str, object]
) -> None:
    dask.ensure(1)
    dask.tell("slow")
    made = shards("stopped", scheduler=dask.address)

    def stop(progress: ExtractionProgress) -> None:
        if progress.videos_done:
            wait_until(lambda: dask.writing(Path(str(made.store))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_extraction(made, stop)
    time.sleep(2)  # a shard that is computed is committed, which takes a slow worker a second
    stored = tree(made.store)
    time.sleep(1.5)
    assert tree(made.store) == stored
    assert not [name for name in stored if name.endswith(".tmp")]
    assert len(stored) < len(alone)
    dask.tell("slow", on=False)
    run_extraction(made)
    assert tree(made.store) == alone


def test_a_scheduler_that_dies_is_said_and_another_goes_on(
    dask: DaskProcesses, shards: MakeConfig, alone: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.pipelines.cluster._CONNECT_SECONDS", 3)  # and of trying again
    dask.ensure(1)
    dask.tell("slow")
    made = shards("orphaned", scheduler=dask.address)

    def kill_scheduler(progress: ExtractionProgress) -> None:
        if progress.videos_done and dask.scheduler.poll() is None:
            dask.scheduler.kill()
            dask.scheduler.wait()

    with pytest.raises(ClusterError, match=f"the scheduler {dask.address} is gone. What is committed is kept"):
        run_extraction(made, kill_scheduler)
    run_extraction(shards("orphaned"))
    assert tree(made.store) == alone


def test_nobody_at_the_address_is_said_before_anything_is_loaded(
    vcache: RunCommand, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.pipelines.cluster._CONNECT_SECONDS", 0.5)
    status, out, err = vcache(f"extract {videos} --scheduler tcp://127.0.0.1:9 --store {tmp_path / 'none.zarr'}")
    assert (status, out) == (1, "")
    assert "no dask scheduler answers at tcp://127.0.0.1:9" in err
    assert "--scheduler tcp://HOST:8786" in err
    assert not (tmp_path / "none.zarr").exists()


def test_options_that_contradict_each_other_are_refused(config: MakeConfig) -> None:
    with pytest.raises(ExtractionError, match="--workers starts a cluster here, --scheduler uses one that is there"):
        config(workers=2, scheduler="tcp://127.0.0.1:8786")
    with pytest.raises(ExtractionError, match="--device cuda:1: with --workers each gets a GPU of its own"):
        config(workers=2, device="cuda:1")
    with pytest.raises(ExtractionError, match="--part shares the work out without a scheduler: leave out --workers"):
        config(workers=2, part=(1, 3))
    with pytest.raises(ExtractionError, match="--workers -1"):
        config(workers=-1)


def test_the_line_below_the_bar_counts_the_workers() -> None:
    assert where_and_why(ExtractionProgress(workers=0)) == "[yellow]waiting for workers[/yellow]"
    assert where_and_why(ExtractionProgress(workers=1)) == "1 worker"
    shares = {"decode": 0.7, "device": 0.2, "disk": 0.1}
    assert where_and_why(ExtractionProgress(workers=3, recent_limits=shares)) == f"3 workers, {limited_by(shares)}"
    assert where_and_why(ExtractionProgress(recent_limits=shares)) == limited_by(shares)


def test_one_worker_for_each_gpu_needs_a_gpu(shards: MakeConfig) -> None:
    with pytest.raises(ClusterError, match="--workers 0 is one for each GPU, and torch sees none here"):
        run_extraction(shards("none", workers=0))
