"""What a worker makes sure of before it writes, and what it leaves alone: in this process, with a stand-in for dask's worker."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vcache.pipelines import cluster_worker, setup
from vcache.pipelines.cluster import _request
from vcache.pipelines.cluster_worker import (
    ClusterError,
    RemoteJob,
    RunRequest,
    TaskCancelled,
    end_run,
    extract_shards,
)
from vcache.pipelines.extraction import new_target, run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.pipelines.shards import ShardTask
from vcache.store.commits import CommitRecord
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


@pytest.fixture(autouse=True)
def task_state(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of the task at hand, as dask's worker has it."""
    task = SimpleNamespace(state="executing")
    worker = SimpleNamespace(
        address="tcp://there:1", state=SimpleNamespace(tasks={"task": task}), get_current_task=lambda: "task"
    )
    monkeypatch.setattr(cluster_worker, "get_worker", lambda: worker)
    monkeypatch.setattr(cluster_worker, "SEE_STORE_SECONDS", 0.0)
    return task


@pytest.fixture
def stored(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> ExtractionConfig:
    """An extraction that is done, in shards of four and three videos."""
    monkeypatch.setattr(setup, "MAX_ROWS_PER_SHARD", 4)
    made = config(layers="-1:", cross_frame="none", batch_size=4)
    run_extraction(made)
    return made


@pytest.fixture
def request_and_jobs(stored: ExtractionConfig) -> Iterator[tuple[RunRequest, tuple[RemoteJob, ...]]]:
    """All shards of the train split, as a client asks for them that does not know that they are there."""
    prepared = prepare_extraction(stored)
    with FeatureStore.open(stored.store) as store:
        target = new_target(prepared, store, lambda request: pytest.fail("decoded by the client"))
        request = _request(stored, {target: prepared}, 2)
        videos = prepared.dataset.split("train")
        tasks = [
            ShardTask("train", shard, store.shard_rows("train", shard), prepared.arrays)
            for shard in range(store.num_shards("train"))
        ]
    jobs = tuple(RemoteJob(videos=videos[task.rows.start : task.rows.stop], tasks=((0, task),)) for task in tasks)
    assert len(jobs) == 3
    yield request, jobs
    end_run(request.run)


def files(store: Any) -> dict[str, tuple[int, bytes]]:
    paths = sorted(path for path in Path(store).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_shards_that_another_worker_has_committed_are_done(
    stored: ExtractionConfig, request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]]
) -> None:
    before = files(stored.store)
    report = extract_shards(request_and_jobs[0], 5, request_and_jobs[1])
    assert (report.task, report.progress.videos_done, report.progress.frames_done) == (5, 12, 0)
    assert files(stored.store) == before


def test_a_shard_committed_by_a_worker_given_up_for_lost_is_left_as_it_is(
    stored: ExtractionConfig,
    request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, looked = cluster_worker.read_shard_commits, []

    def first_not_yet(*place: Any) -> tuple[CommitRecord, ...] | list[CommitRecord]:
        looked.append(place)
        return [] if len(looked) == 1 else read(*place)

    monkeypatch.setattr(cluster_worker, "read_shard_commits", first_not_yet)
    before = files(stored.store)
    assert extract_shards(*request_and_jobs[:1], 0, request_and_jobs[1]).progress.videos_done == 12
    assert files(stored.store) == before
    assert len(looked) == 6


def test_a_worker_that_would_make_other_features_is_refused_with_the_difference(
    request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "decoder_versions", lambda name: {"name": name, "av": "17.0.0"})
    with pytest.raises(
        ClusterError, match=r"worker tcp://there:1 on .* cannot do what the command asks for"
    ) as refused:
        extract_shards(request_and_jobs[0], 0, request_and_jobs[1])
    assert "decoder.av: stored" in str(refused.value)
    assert "asked for '17.0.0'" in str(refused.value)


def test_a_worker_without_the_weights_is_refused(request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]]) -> None:
    request, jobs = request_and_jobs
    store = replace(request.stores[0], config=replace(request.stores[0].config, model="local-dir:/nowhere"))
    with pytest.raises(ClusterError, match=r"put the same weights on all machines[\s\S]*/nowhere"):
        extract_shards(replace(request, stores=(store,)), 0, jobs)


def test_a_worker_that_sees_other_files_is_refused(
    request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]], tmp_path: Path
) -> None:
    request, jobs = request_and_jobs
    elsewhere = replace(request.stores[0], config=replace(request.stores[0].config, store=tmp_path / "none.zarr"))
    with pytest.raises(
        ClusterError, match=r"does not see the store .*none\.zarr that the command writes; it sees nothing"
    ):
        extract_shards(replace(request, stores=(elsewhere,)), 0, jobs)
    with pytest.raises(ClusterError, match="it sees another one there"):
        extract_shards(replace(request, stores=(replace(request.stores[0], manifest="0" * 64),)), 0, jobs)
    with pytest.raises(ClusterError, match="does not see the videos: .*/train/.* is not there"):
        extract_shards(replace(request, dataset=replace(request.dataset, root=tmp_path)), 0, jobs)
    with pytest.raises(ClusterError, match=r"has vcache .*, the command 0\.0\.7\. Install the same"):
        extract_shards(replace(request, vcache="0.0.7"), 0, jobs)


def test_a_task_that_nobody_waits_for_is_not_begun(
    request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]], task_state: SimpleNamespace
) -> None:
    task_state.state = "cancelled"
    with pytest.raises(TaskCancelled):
        extract_shards(request_and_jobs[0], 0, request_and_jobs[1])


def test_the_workers_of_a_machine_share_its_cores(
    request_and_jobs: tuple[RunRequest, tuple[RemoteJob, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_worker, "_num_cores", lambda: 7)
    request, _ = request_and_jobs
    session = cluster_worker._session_of(replace(request, run="shared"))
    assert (session.num_threads, session.num_decoders) == (3, 3)
    session = cluster_worker._session_of(replace(request, run="told", decode_workers=5))
    assert (session.num_threads, session.num_decoders) == (3, 5)
    end_run("told")
