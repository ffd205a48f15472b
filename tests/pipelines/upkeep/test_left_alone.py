"""What `vcache rm` and `gc` must not touch: other folders than the one named, a person's files, mounts, what is in use."""

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.pipelines.upkeep import trees
from vcache.pipelines.upkeep.found_runs import find_runs, run_at
from vcache.pipelines.upkeep.garbage import collect, find_garbage
from vcache.pipelines.upkeep.mounts import mount_points
from vcache.pipelines.upkeep.register import note_run, notes_beside, read_notes, register_folder
from vcache.pipelines.upkeep.removal import check_allowed, examine, remove
from vcache.pipelines.upkeep.trees import RemovalError, list_tree, remove_tree

Make = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes]]


def test_two_dots_after_a_link_are_beside_what_it_points_to(
    tmp_path: Path, store_at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = store_at(tmp_path / "here" / "a.zarr"), store_at(tmp_path / "there" / "a.zarr")
    (tmp_path / "there" / "below").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "below")
    monkeypatch.chdir(tmp_path / "here")
    (item,) = examine([Path("link/../a.zarr")], find_runs([]))
    remove(item, force=False)
    assert here.exists() and not there.exists()


def test_one_folder_named_in_several_ways_goes_once(tmp_path: Path, store_at: Make, run_at_path: Make) -> None:
    store = store_at(tmp_path / "stores" / "a.zarr")
    (tmp_path / "link").symlink_to(tmp_path / "stores")
    (item,) = examine([store, tmp_path / "link" / "a.zarr", store / "train" / ".."], find_runs([]))
    assert item.path == store
    sweep = tmp_path / "sweep"
    run = run_at_path(sweep / "one", None)
    (sweep / "sweep.json").write_text('{"members": []}')
    (item,) = examine([run, sweep], find_runs([]))
    assert item.path == sweep


@pytest.mark.parametrize("kind", ["store", "run", "sweep", "member"])
def test_what_a_person_put_into_a_folder_is_named_and_needs_force(
    kind: str, tmp_path: Path, store_at: Make, run_at_path: Make, snapshot: Snapshot
) -> None:
    folder = tmp_path / "x"
    if kind == "store":
        store_at(folder)
    else:
        run_at_path(folder if kind == "run" else folder / "one", None)
    if kind in ("sweep", "member"):
        (folder / "sweep.json").write_text('{"members": []}')
        (folder / "results.csv").write_text("")
    own = folder / ("one" if kind == "member" else "") / "thesis" / "text.md"
    check_allowed(examine([folder], find_runs([])), force=False)
    own.parent.mkdir()
    own.write_text("mine")
    before = snapshot(tmp_path)
    (item,) = examine([folder], find_runs([]))
    assert item.others == ("one/thesis" if kind == "member" else "thesis",)
    with pytest.raises(RemovalError, match="thesis in it was not written by vcache"):
        remove(item, force=False)
    assert snapshot(tmp_path) == before
    if kind == "store":
        assert find_garbage([tmp_path], find_runs([]), unused_stores=True).garbage == ()


def test_what_is_mounted_in_a_folder_is_left_alone(
    tmp_path: Path, run_at_path: Make, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    run = run_at_path(tmp_path / "my run", None)
    (run / "predictions").mkdir()
    (run / "predictions" / "video.mp4").write_bytes(b"of another disk")
    (item,) = examine([run], find_runs([]))
    before = snapshot(tmp_path)
    line = f"36 35 0:41 /data {run}/predictions rw shared:1 - ext4 /dev/sdb rw".replace("my run", "my\\040run")
    monkeypatch.setattr(trees, "mount_points", lambda: mount_points(line))
    with pytest.raises(RemovalError, match="something is mounted at .*my run/predictions"):
        examine([run], find_runs([]))
    with pytest.raises(RemovalError, match="something is mounted"):
        remove_tree(item.tree)
    assert snapshot(tmp_path) == before


def test_a_file_that_was_written_anew_since_is_kept(tmp_path: Path, store_at: Make) -> None:
    """Also one of the same size, and one that is removed by itself."""
    file = tmp_path / "a.jsonl"
    file.write_text("1")
    trees_listed = [list_tree(store_at(tmp_path / "a.zarr")), list_tree(file)]
    later = time.time() + 10
    for path in (tmp_path / "a.zarr" / "zarr.json", file):
        os.utime(path, (later, later))
    for tree in trees_listed:
        with pytest.raises(RemovalError, match="changed since it was listed"):
            remove_tree(tree)
        assert tree.path.exists()


def test_garbage_among_notes_and_runs_ends_no_search(
    tmp_path: Path, store_at: Make, run_at_path: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_at(tmp_path / "a.zarr")
    run = run_at_path(tmp_path / "run", store)
    note_run(run, json.loads((run / "config.json").read_text()))
    good = json.loads(next(register_folder().iterdir()).read_text())
    wrong = [b"", b"\xff", b"[]", b"{", *(json.dumps(good | change).encode() for change in (
        {"run": 5}, {"run": "relative"}, {"store": ["x"]}, {"mount": None}, {"dataset": {}}
    ))]  # fmt: skip
    for number, data in enumerate(wrong):
        (register_folder() / f"wrong-{number}.json").write_bytes(data)
    (register_folder() / "long.json").write_text(json.dumps(good | {"run": f"/{'x' * 400}"}))
    (register_folder() / "folder.json").mkdir()
    for number, store_told in enumerate((5, ["x"], {})):
        bad = run_at_path(tmp_path / f"bad-{number}", None)
        told = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(told | {"store": store_told}))
        assert run_at(bad) is None
    assert len(read_notes([register_folder()])) == 2
    found = find_runs([tmp_path])
    # Of a path that cannot even be asked for it is not known that it is gone.
    assert [use.status for use in found.referring_to(store, None, None)] == ["complete", "unseen"]
    find_garbage([tmp_path], found, unused_stores=True)


def test_a_store_whose_run_was_moved_to_where_nobody_looks_says_so(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    store = store_at(tmp_path / "stores" / "a.zarr")
    run = run_at_path(tmp_path / "runs" / "one", store)
    note_run(run, json.loads((run / "config.json").read_text()))
    run.rename(tmp_path / "elsewhere")
    for file in register_folder().iterdir():
        file.unlink()  # the note beside the store is enough
    (item,) = find_garbage([store.parent], find_runs([]), unused_stores=True).garbage
    assert (item.path, item.reason) == (store, f"no run refers to it; gone or moved: {run}")
    assert notes_beside(store).is_dir()


def test_a_run_follows_a_store_that_was_moved_by_its_key(tmp_path: Path, store_at: Make, run_at_path: Make) -> None:
    store = store_at(tmp_path / "a.zarr")
    run_at_path(tmp_path / "run", store)
    other = store_at(tmp_path / "other.zarr", key="o" * 16)
    moved = store.rename(tmp_path / "b.zarr")
    (item,) = examine([moved], find_runs([tmp_path]))
    with pytest.raises(RemovalError, match="1 run refers"):
        remove(item, force=False)
    check_allowed(examine([other], find_runs([tmp_path])), force=False)


def test_leftovers_in_a_run_go_unless_it_is_trained(tmp_path: Path, run_at_path: Make) -> None:
    run = run_at_path(tmp_path / "run", None)
    note_run(run, json.loads((run / "config.json").read_text()))
    left = run / ".checkpoint.0123456789ab.tmp"  # of a gc that was killed
    left.mkdir()
    (left / "1.json").write_text("{}")
    (run / "checkpoint").mkdir()
    items = find_garbage([], find_runs([])).garbage
    assert {item.path for item in items} == {left, run / "checkpoint"}
    with (run / "config.json").open("r+b") as file:  # a training that began after the list
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_garbage([], find_runs([])).garbage == ()
        for item in items:
            with pytest.raises(RemovalError, match="a process trains"):
                collect(item)
    assert (left / "1.json").exists() and (run / "checkpoint").is_dir()
    for item in items:
        collect(item)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "head.safetensors", "metrics.jsonl"]


def test_an_import_of_another_machine_is_no_leftover(tmp_path: Path) -> None:
    folder = tmp_path / ".head.part-999999999"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert (
        find_garbage([tmp_path], find_runs([])).garbage == ()
    )  # its process may be one of a machine that shares the disk
    then = time.time() - 2 * 86400
    os.utime(folder / "config.json", (then, then))
    assert [item.path for item in find_garbage([tmp_path], find_runs([])).garbage] == [folder]
    (folder / "film.mp4").write_bytes(b"of some other program")
    os.utime(folder / "film.mp4", (then, then))
    assert find_garbage([tmp_path], find_runs([])).garbage == ()
