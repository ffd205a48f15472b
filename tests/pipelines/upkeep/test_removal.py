"""`vcache rm`: only stores and runs, only what was listed, nothing that is used or in use, and no half store that looks whole."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.pipelines.training.run_lock import held_alone
from vcache.pipelines.upkeep.found_runs import find_runs
from vcache.pipelines.upkeep.garbage import collect, find_garbage
from vcache.pipelines.upkeep.register import note_run, notes_beside
from vcache.pipelines.upkeep.removal import check_allowed, examine, remove
from vcache.pipelines.upkeep.trees import RemovalError, list_tree, remove_tree
from vcache.store.errors import StoreBusy, StoreError
from vcache.store.locks import shared_writer
from vcache.store.reader import FeatureStore

Make = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes]]


def test_a_used_store_is_refused_with_its_runs_unless_forced_or_removed_with_them(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    store, run = store_at(tmp_path / "a.zarr"), tmp_path / "runs" / "one"
    run_at_path(run, store)
    (item,) = examine([store], find_runs([tmp_path]))
    with pytest.raises(RemovalError, match=r"1 run refers to it[^$]*runs/one  \(linear, complete\)[^$]*--force"):
        check_allowed([item], force=False)
    both = examine([store, run], find_runs([tmp_path]))
    assert [item.kind for item in both] == ["run", "store"]  # the other way round a kill leaves a run without its store
    for item in both:
        remove(item, force=False)
    assert not store.exists() and not run.exists()


def test_what_lies_beside_a_store_goes_with_it_and_a_neighbour_stays(
    tmp_path: Path, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    folder = tmp_path / "stores"
    store, neighbour = store_at(folder / "a.zarr"), store_at(folder / "a.zarr.zarr")
    run = run_at_path(tmp_path / "run", store)
    note_run(run, json.loads((run / "config.json").read_text()))
    (folder / "a.zarr.failures.jsonl").write_text("{}\n")
    (item,) = examine([store], find_runs([]))
    assert item.size_bytes == sum(
        map(len, (data for name, data in snapshot(folder).items() if not name.startswith("a.zarr.zarr")))
    )
    remove(item, force=True)
    assert {path.name for path in folder.iterdir()} == {neighbour.name, f".{store.name}.setup"}
    assert not notes_beside(store).exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "neither a store nor a run"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: None, "is not there. There is"),
        (lambda path: path.symlink_to(path.with_name("true.zarr")), "symbolic link"),
        (lambda path: (path.mkdir(), (path / "zarr.json").write_text('{"attributes": {}}')), "neither"),
        (lambda path: (path.mkdir(), (path / "zarr.json").write_text("not JSON")), "neither"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"head": "linear"}')), "neither"),
    ],
)
def test_whatever_is_not_of_vcache_is_left_alone(
    make: Callable[[Path], object], said: str, tmp_path: Path, store_at: Make, snapshot: Snapshot
) -> None:
    store_at(tmp_path / "true.zarr")
    make(tmp_path / "tru.zarr")
    before = snapshot(tmp_path)
    with pytest.raises(RemovalError, match=said):
        examine([tmp_path / "tru.zarr"], find_runs([]))
    assert snapshot(tmp_path) == before


def test_a_store_with_a_run_in_it_and_a_run_with_a_store_in_it_are_left_alone(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    store = store_at(tmp_path / "a.zarr")
    run_at_path(store / "run", None)
    with pytest.raises(RemovalError, match=r"holds a run, .*a\.zarr/run"):
        examine([store], find_runs([]))
    run = run_at_path(tmp_path / "run", None)
    store_at(run / "predictions" / "b.zarr")
    with pytest.raises(RemovalError, match=r"holds a store, .*b\.zarr"):
        examine([run], find_runs([]))


def test_what_a_process_writes_or_trains_is_refused_even_with_force(
    tmp_path: Path, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    store = store_at(tmp_path / "a.zarr")
    run = run_at_path(tmp_path / "run", store, complete=False)
    before = snapshot(tmp_path)
    of_store, of_run = (examine([path], find_runs([tmp_path]))[0] for path in (store, run))
    with shared_writer(store), pytest.raises(StoreBusy):
        remove(of_store, force=True)
    with held_alone(run / "config.json"):
        for item in (of_store, of_run):
            with pytest.raises(RemovalError, match="a process trains"):
                remove(item, force=True)
    assert {name: data for name, data in snapshot(tmp_path).items() if not name.endswith(".setup")} == before


def test_a_training_that_begins_after_the_question_keeps_the_store(
    tmp_path: Path, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    store = store_at(tmp_path / "a.zarr")
    (item,) = examine([store], find_runs([]))
    before = snapshot(store)
    run = run_at_path(tmp_path / "run", store)
    note_run(run, json.loads((run / "config.json").read_text()))
    with pytest.raises(RemovalError, match="1 run refers to it"):
        remove(item, force=False)
    assert snapshot(store) == before


def test_a_file_that_was_not_listed_is_never_removed(tmp_path: Path, store_at: Make, snapshot: Snapshot) -> None:
    tree = list_tree(store_at(tmp_path / "a.zarr"))
    (tree.path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(RemovalError, match=r"as notes\.txt, changed since it was listed"):
        remove_tree(tree)
    assert snapshot(tmp_path) == before


def test_links_go_and_what_they_point_to_stays(tmp_path: Path, run_at_path: Make) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "video.mp4").write_bytes(b"video")
    run = run_at_path(tmp_path / "run", None)
    (run / "folder").symlink_to(outside)
    (run / "file").symlink_to(outside / "video.mp4")
    (item,) = examine([run], find_runs([]))
    assert set(item.others) == {"folder", "file"}
    with pytest.raises(RemovalError, match="file, folder in it were not written by vcache"):
        remove(item, force=False)
    remove(item, force=True)
    assert not run.exists()
    assert (outside / "video.mp4").read_bytes() == b"video"


KILLED = """
import os, signal, sys
from pathlib import Path
from vcache.pipelines.upkeep.found_runs import find_runs
from vcache.pipelines.upkeep.removal import examine, remove
unlink, left = Path.unlink, iter(range(int(sys.argv[2])))
def dies(self, *arguments, **options):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    unlink(self, *arguments, **options)
(item,) = examine([Path(sys.argv[1])], find_runs([]))
Path.unlink = dies
remove(item, force=False)
"""


@pytest.mark.parametrize("num_removed", [0, 1, 4])
def test_a_killed_removal_leaves_nothing_that_opens_and_gc_finds_it(
    num_removed: int, tmp_path: Path, float32_store: Path
) -> None:
    folder = tmp_path / "stores"
    store = shutil.copytree(float32_store, folder / "a.zarr")
    line = [sys.executable, "-c", KILLED, str(store), str(num_removed)]
    assert subprocess.run(line, timeout=60, check=False).returncode == -signal.SIGKILL
    assert not store.exists()
    with pytest.raises(StoreError):
        FeatureStore.open(store)
    (left,) = (path for path in folder.iterdir() if path.suffix == ".tmp")
    if num_removed:  # before the first, all of it is there, under a name that no command looks for
        with pytest.raises(StoreError):
            FeatureStore.open(left)
    (item,) = find_garbage([folder], find_runs([])).garbage
    assert (item.path, item.kind) == (left, "leftover")
    collect(item)
    assert [path.name for path in folder.iterdir()] == [".a.zarr.setup"]


def test_a_store_in_a_bucket_goes_whole_and_its_neighbour_stays(
    bucket: str, vcache: Callable[..., tuple[int, str, str]], float32_store: Path, s3: object
) -> None:
    def upload(name: str) -> None:
        for file in (path for path in float32_store.rglob("*") if path.is_file()):
            s3.put_object(Bucket=bucket, Key=f"{name}/{file.relative_to(float32_store)}", Body=file.read_bytes())  # type: ignore[attr-defined]

    def names() -> set[str]:
        return {entry["Key"].split("/")[0] for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", [])}  # type: ignore[attr-defined]

    upload("a.zarr")
    upload("a.zarr-2.zarr")
    s3.delete_object(Bucket=bucket, Key="a.zarr/zarr.json")  # type: ignore[attr-defined]  # what a kill leaves
    status, _, err = vcache(f"rm s3://{bucket}/a.zarr --yes")
    assert (status, names()) == (0, {"a.zarr-2.zarr"}), err
    status, _, err = vcache(f"rm s3://{bucket}/a.zarr --yes")
    assert (status, "there is nothing at" in err) == (1, True)
    status, _, err = vcache(f"rm s3://{bucket} --yes")
    assert (status, "whole bucket" in err) == (1, True)
    assert vcache(f"rm s3://{bucket}/a.zarr-2.zarr --yes")[0] == 0
    assert names() == set()
