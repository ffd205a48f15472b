"""Notes of runs: left by whoever makes or reads one, by many at once, where nothing can be written, and of what is gone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vcache.pipelines.upkeep import register
from vcache.pipelines.upkeep.found_runs import find_runs
from vcache.pipelines.upkeep.register import note_run, notes_beside, read_notes, register_folder

Make = Callable[..., Path]


def config_of(run: Path) -> dict[str, object]:
    return json.loads((run / "config.json").read_text())


def test_a_note_lies_in_the_home_and_beside_the_store(tmp_path: Path, store_at: Make, run_at_path: Make) -> None:
    store = store_at(tmp_path / "a.zarr")
    run = run_at_path(tmp_path / "runs" / "one", store)
    note_run(run, config_of(run))
    for folder in (register_folder(), notes_beside(store)):
        (note,) = read_notes([folder]).values()
        assert (note.run, note.store, note.is_gone) == (str(run), str(store), False)
    before = {file: file.stat().st_mtime_ns for file in register_folder().iterdir()}
    note_run(run, config_of(run))
    assert {file: file.stat().st_mtime_ns for file in register_folder().iterdir()} == before  # nothing new to say


def test_processes_that_note_at_once_lose_no_note(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vcache.pipelines.upkeep.register import note_run\n"
        "config = {'head': 'linear', 'store': None, 'store_key': None}\n"
        "for number in [*range(30)] * 2: note_run(Path(sys.argv[1]) / str(number % 20 + int(sys.argv[2])), config)"
    )
    arguments = [[sys.executable, "-c", code, str(tmp_path / "runs"), start] for start in ("0", "10")]
    processes = [subprocess.Popen(line) for line in arguments]  # of the runs 10 to 19 both write notes
    assert [process.wait(60) for process in processes] == [0, 0]
    noted = {Path(note.run).name for note in read_notes([register_folder()]).values()}
    assert noted == {str(number) for number in range(30)}
    assert all(file.suffix == ".json" and not file.name.startswith(".") for file in register_folder().iterdir())


def test_a_home_that_cannot_be_written_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_at: Make, run_at_path: Make
) -> None:
    home = tmp_path / "home"
    home.write_text("a file: nothing can be written below it, not even by root")
    monkeypatch.setenv("VCACHE_HOME", str(home))
    store = store_at(tmp_path / "a.zarr")
    run = run_at_path(tmp_path / "run", store)
    note_run(run, config_of(run))
    assert len(read_notes([notes_beside(store)])) == 1  # what can be written is
    assert [found.path for found in find_runs([], [store]).runs] == [run]


def test_a_run_that_is_deleted_is_gone_and_one_elsewhere_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_at: Make, run_at_path: Make
) -> None:
    store = store_at(tmp_path / "a.zarr")
    run = run_at_path(tmp_path / "runs" / "one", store)
    note_run(run, config_of(run))
    shutil.rmtree(run)
    found = find_runs([], [store])
    assert (found.runs, {note.run for note in found.missing}) == ((), {str(run)})
    (file, note), *_ = read_notes([register_folder()]).items()
    assert not replace(note, mount=str(tmp_path / "a-disk-that-is-away")).is_gone
    assert not replace(note, host="another").is_gone
    monkeypatch.setattr(register.socket, "gethostname", lambda: "this-one")
    found = find_runs([], [store])
    (unseen,) = found.runs
    assert (unseen.status, unseen.host) == ("unseen", note.host)
    assert found.referring_to(store, None, None) == {unseen: "path"}
    assert file.exists()


def test_a_moved_run_is_found_below_the_folder_and_beside_those_that_are_noted(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    store = store_at(tmp_path / "a.zarr")
    stays, moves = (run_at_path(tmp_path / "runs" / name, store) for name in ("stays", "moves"))
    for run in (stays, moves):
        note_run(run, config_of(run))
    moved = moves.rename(tmp_path / "runs" / "renamed")
    assert [run.path for run in find_runs([]).runs] == [moved, stays]
    away = moved.rename(tmp_path / "elsewhere")
    assert [run.path for run in find_runs([]).runs] == [stays]
    assert [run.path for run in find_runs([tmp_path]).runs] == [away, stays]


def test_a_store_that_was_moved_is_known_by_its_key_and_dataset(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    store, twin = store_at(tmp_path / "a.zarr"), store_at(tmp_path / "twin.zarr")
    other = store_at(tmp_path / "other.zarr", dataset="another")
    run_at_path(tmp_path / "run", store)

    def ways() -> list[list[str]]:
        found = find_runs([tmp_path])
        named = ((moved if moved.exists() else store, "tiny"), (twin, "tiny"), (other, "another"))
        return [list(found.referring_to(path, "k" * 16, dataset).values()) for path, dataset in named]

    moved = tmp_path / "moved.zarr"
    assert ways() == [["path"], [], []]  # a twin is not needed while the store is there
    store.rename(moved)
    assert ways() == [["key"], ["key"], []]


def test_an_unfinished_sweep_refers_to_the_stores_of_members_that_are_not_begun(
    tmp_path: Path, store_at: Make, run_at_path: Make
) -> None:
    first, second = store_at(tmp_path / "first.zarr"), store_at(tmp_path / "second.zarr")
    sweep = tmp_path / "sweep"
    run_at_path(sweep / "done", first)
    members = [
        {"folder": folder, "config": {"head": "linear", "store": str(store)}}
        for folder, store in (("done", first), ("to-come", second))
    ]
    (sweep / "sweep.json").write_text(json.dumps({"members": members}))
    note_run(sweep / "done", config_of(sweep / "done"))
    found = find_runs([])
    assert {(run.kind, run.path.name) for run in found.referring_to(first, None, None)} == {("run", "done")}
    assert {(run.kind, run.path.name) for run in found.referring_to(second, None, None)} == {("sweep", "sweep")}
