"""`vcache ls`, `rm` and `gc` as a user meets them, on a real store and a real run."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Vcache = Callable[..., tuple[int, str, str]]
Make = Callable[..., Path]


def test_from_a_training_to_the_last_store(
    vcache: Vcache, tmp_path: Path, float32_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = shutil.copytree(float32_store, tmp_path / "stores" / "a.zarr")
    run = tmp_path / "far" / "away" / "run"
    status, _, err = vcache(f"train-head linear --epochs 1 --store {store} --out {run} --device cpu")
    assert status == 0, err
    monkeypatch.chdir(tmp_path / "stores")  # nothing below it is a run
    (row,) = json.loads(vcache("ls . --json")[1])
    assert row["used_by"] == [{"run": str(run), "status": "complete", "by": "path"}]
    assert (row["complete"], row["failed"], len(row["key"])) == ({"train": 12, "val": 6}, {"train": 0, "val": 0}, 16)
    out = vcache("ls .", columns=80)[1]
    assert "used by 1 run: " in out and "key " + row["key"][:8] in out
    (listed,) = json.loads(vcache("ls --runs --json")[1])
    assert (listed["path"], listed["head"], listed["metric"], listed["epochs"]) == (str(run), "linear", "top-1", 1)
    assert listed["store_is_there"]

    status, out, err = vcache("rm a.zarr --yes")
    assert (status, store.exists()) == (1, True)
    assert f"{run}  (linear, complete)" in err and "--force" in err
    moved = run.rename(tmp_path / "stores" / "moved")
    assert vcache(f"eval {moved} --no-save")[0] == 0  # which notes where it is now
    monkeypatch.chdir(tmp_path / "far")
    (row,) = json.loads(vcache("ls ../stores --json")[1])
    assert [use["run"] for use in row["used_by"]] == [str(moved)]
    assert vcache(f"rm {moved}")[0] == 1  # nobody to ask
    status, out, err = vcache(f"rm {moved} {store} --yes", columns=80)
    assert (status, moved.exists(), store.exists()) == (0, False, False), err
    assert "removed" in out


def test_gc_changes_nothing_before_the_command_that_it_prints(
    vcache: Vcache, tmp_path: Path, store_at: Make, snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    folder = tmp_path / "my stores"
    store = store_at(folder / "a.zarr")
    (folder / ".b.zarr.0123456789ab.tmp").write_bytes(b"12345")
    before = snapshot(tmp_path)
    status, out, _ = vcache(f"gc {shlex.quote(str(folder))}")
    assert (status, snapshot(tmp_path)) == (0, before)
    assert "5 B would go, in 1 place" in out
    assert "kept: 1 store that no known run refers to" in out
    line = out.strip().splitlines()[-1].partition("with:  vcache ")[2]
    assert vcache(line)[0] == 0
    assert set(before) - set(snapshot(tmp_path)) == {"my stores/.b.zarr.0123456789ab.tmp"}
    status, out, _ = vcache(f"gc {shlex.quote(str(folder))} --unused-stores --json")
    (item,) = json.loads(out)["garbage"]
    assert (item["kind"], item["path"], item["removed"]) == ("store", str(store), False)
    assert vcache(f"gc {shlex.quote(str(folder))} --unused-stores --older-than 1d --yes")[0] == 0
    assert store.exists()
    assert vcache(f"gc {shlex.quote(str(folder))} --unused-stores --yes")[0] == 0
    assert not store.exists()


@pytest.mark.parametrize("line", ["gc nowhere", "gc s3://bucket/stores", "gc --older-than soon", "gc --older-than 5y"])
def test_gc_refuses_what_it_cannot_mean(line: str, vcache: Vcache) -> None:
    assert vcache(line)[0] == 2
