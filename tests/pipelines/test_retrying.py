"""vcache extract --retry-failed, --failures and --part over real videos and a real backbone."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.store.errors import StoreBusy, StoreKeyMismatch
from vcache.store.locks import set_up_turn, shared_writer, sole_writer
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MakeConfig = Callable[..., ExtractionConfig]
Run = Callable[[str], tuple[int, str, str]]

BROKEN = ("train/jump/j1.mp4", "train/wave/w0.mp4", "val/jump/j0.mp4")  # rows 5, 8 and 2: in shards of four


@pytest.fixture
def videos(video_folder: Path, tmp_path: Path) -> Path:
    """A copy of the videos in which some are empty."""
    shutil.copytree(video_folder, tmp_path / "videos")
    for name in BROKEN:
        (tmp_path / "videos" / name).write_bytes(b"")
    return tmp_path / "videos"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)


def tree(path: Path) -> dict[str, bytes]:
    """Every file; the manifest without the time of creation and what depends on it and on where the videos lie."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    manifest = json.loads(files.pop("zarr.json"))["attributes"]["vcache"]
    same = {name: manifest[name] for name in ("key", "spec", "splits", "constants", "rows_per_shard")}
    return files | {"manifest": json.dumps(same).encode()}


def mend(videos: Path, whole: Path, *names: str) -> None:
    for name in names:
        shutil.copy(whole / name, videos / name)


def listed(path: Path) -> list[tuple[str, int, str, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["split"], line["row"], line["path"], line["kind"]) for line in lines]


def test_mended_videos_are_filled_in_and_the_store_is_the_one_of_videos_that_never_broke(
    config: MakeConfig, videos: Path, video_folder: Path, tmp_path: Path
) -> None:
    for layers in ("-1", "-2:"):  # two passes
        made = config(dataset=str(videos), layers=layers)
        assert len(run_extraction(made).failures) == 3
        run_extraction(config(layers=layers, store=tmp_path / "whole.zarr"))
    file = tmp_path / "store.zarr.failures.jsonl"
    assert listed(file) == [
        ("train", 5, BROKEN[0], "empty"),
        ("train", 8, BROKEN[1], "empty"),
        ("val", 2, BROKEN[2], "empty"),
    ]
    mend(videos, video_folder, *BROKEN[1:])
    (videos / BROKEN[0]).write_text("404 not found")
    summary = run_extraction(config(dataset=str(videos), retry_failed=True))
    assert summary.retried is not None
    assert (summary.retried.tried, summary.retried.stored) == (3, 2)
    assert [(failure.row, failure.kind) for failure in summary.retried.failed] == [(5, "not_video")]
    assert listed(file) == [("train", 5, BROKEN[0], "not_video")]
    assert summary.failures_file == str(file)
    mend(videos, video_folder, BROKEN[0])
    summary = run_extraction(config(dataset=str(videos), retry_failed=True))
    assert (summary.failures, summary.failures_file, file.exists()) == ((), None, False)
    assert tree(tmp_path / "store.zarr") == tree(tmp_path / "whole.zarr")
    with FeatureStore.open(tmp_path / "store.zarr") as store:
        assert verify_store(store).findings == ()


def test_nothing_is_retried_unless_asked_and_a_retry_comes_with_the_rest_of_the_run(
    config: MakeConfig, videos: Path, video_folder: Path, tmp_path: Path
) -> None:
    run_extraction(config(dataset=str(videos), layers="-1"))
    mend(videos, video_folder, *BROKEN)
    again = run_extraction(config(dataset=str(videos), layers="-1"))
    assert (len(again.failures), again.retried, again.progress.videos_done) == (3, None, 0)
    more = run_extraction(config(dataset=str(videos), retry_failed=True))
    assert more.retried is not None
    assert (more.retried.stored, more.progress.videos_done, more.failures) == (3, 18, ())


def test_a_missing_video_is_retried_where_the_dataset_lists_it_now(
    config: MakeConfig, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    root, names = tmp_path / "charades", ("0A8CF", "46GP8", "YSKX3")
    (root / "videos").mkdir(parents=True)
    (root / "Charades_v1_classes.txt").write_text("c000 Holding clothes\n")
    annotation = root / "Charades_v1_test.csv"
    annotation.write_text("id,actions\n" + "".join(f"{name},c000 0.0 1.0\n" for name in names))
    for seed, name in enumerate(names[:2]):
        write_video(root / "videos" / f"{name}.mp4", seed=seed)
    made = config(dataset="charades", root=root, layers="-1")
    (failure,) = run_extraction(made).failures
    assert failure.path == "Charades_v1_480/YSKX3.mp4"  # where it is looked for first
    write_video(root / "videos" / "YSKX3.mp4", seed=2)
    write_video(root / "videos" / "ZZZZ8.mp4", seed=3)
    annotation.write_text(annotation.read_text() + "ZZZZ8,c000 0.0 1.0\nZZZZ9,c000 0.0 1.0\n")
    assert len(run_extraction(made).failures) == 2  # one of them in a part of its own
    write_video(root / "Charades_v1" / "ZZZZ9.mp4", seed=4)
    summary = run_extraction(replace(made, retry_failed=True))
    assert summary.retried is not None
    assert (summary.retried.stored, summary.failures) == (2, ())


def test_a_store_made_with_another_decoder_is_not_retried(
    config: MakeConfig, videos: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(dataset=str(videos))
    run_extraction(made)
    mend(videos, video_folder, *BROKEN)
    before = tree(tmp_path / "store.zarr")
    versions = {"decoder": "pyav", "av": "99.0", "libavcodec": "1", "libavformat": "1", "libswscale": "1"}
    monkeypatch.setattr("vcache.pipelines.setup.decoder_versions", lambda name: versions)
    with pytest.raises(StoreKeyMismatch, match=r"decoder\.av: stored .*, asked for '99.0'"):
        run_extraction(config(dataset=str(videos), retry_failed=True))
    assert tree(tmp_path / "store.zarr") == before


def test_parts_one_after_the_other_make_the_store_of_one_run(
    config: MakeConfig, videos: Path, video_folder: Path, tmp_path: Path
) -> None:
    whole = config(dataset=str(videos), store=tmp_path / "whole.zarr")
    run_extraction(whole)
    done = []
    for part in (2, 3, 1):  # the second one makes the store
        summary = run_extraction(config(dataset=str(videos), part=(part, 3)))
        done.append((summary.progress.videos_total, summary.progress.videos_skipped))
    assert done == [(6, 0), (4, 6), (8, 10)]
    assert tree(tmp_path / "store.zarr") == tree(tmp_path / "whole.zarr")
    assert listed(tmp_path / "store.zarr.failures.jsonl") == listed(tmp_path / "whole.zarr.failures.jsonl")


def test_parts_and_a_run_of_its_own_refuse_each_other(config: MakeConfig, tmp_path: Path) -> None:
    run_extraction(config(part=(1, 2)))
    path = tmp_path / "store.zarr"
    with shared_writer(path):
        for options in ({}, {"retry_failed": True}):
            with pytest.raises(StoreBusy, match="processes with --part are extracting into"):
                run_extraction(config(**options))
        run_extraction(config(part=(2, 2)))
    with sole_writer(path), pytest.raises(StoreBusy, match="without --part"):
        run_extraction(config(part=(1, 2)))
    with set_up_turn(path):
        run_extraction(config())  # needs none


SMALL_SHARDS = """
import torch
import vcache.pipelines.setup as setup
from vcache.pipelines.cli import main
torch.set_num_threads(1)
setup.MAX_ROWS_PER_SHARD = 4
main()
"""


@pytest.mark.slow
def test_four_commands_at_the_same_time_make_the_store_of_one(config: MakeConfig, videos: Path, tmp_path: Path) -> None:
    made = config(dataset=str(videos))
    run_extraction(config(dataset=str(videos), store=tmp_path / "whole.zarr"))
    words = ["extract", str(videos), "--layers", "-2:", "--frames", "5", "--stride", "3", "--model", made.model]
    words += ["--dtype", "float32", "--batch-size", "3", "--device", "cpu", "--store", str(made.store)]
    commands = [
        [sys.executable, "-c", SMALL_SHARDS, *words, "--max-failures", "1", "--part", f"{i}/4"] for i in (1, 2, 3, 4)
    ]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert [process.wait() for process in started] == [0] * 4
    assert tree(tmp_path / "store.zarr") == tree(tmp_path / "whole.zarr")
    assert listed(tmp_path / "store.zarr.failures.jsonl") == listed(tmp_path / "whole.zarr.failures.jsonl")


def test_the_commands_of_a_user(
    vcache: Run, config: MakeConfig, videos: Path, video_folder: Path, tmp_path: Path
) -> None:
    made = config(dataset=str(videos))
    words = (
        f"extract {shlex.quote(str(videos))} --layers -1 --frames 5 --stride 3 --model {shlex.quote(made.model)} "
        f"--store {shlex.quote(str(made.store))} --device cpu --batch-size 3"
    )
    chosen = tmp_path / "lost.jsonl"
    for number in (1, 2):
        status, out, err = vcache(f"{words} --part {number}/2 --failures {chosen} --max-failures 1")
        assert status == 0, err
    assert f"listed in {chosen}" in out
    assert len(listed(chosen)) == 3
    status, out, err = vcache(words)
    assert status == 1
    assert "run the command again with --retry-failed" in err
    mend(videos, video_folder, *BROKEN[:2])
    status, out, err = vcache(f"{words} --retry-failed")
    assert status == 0, err
    assert "3 failed rows extracted again: 2 stored now, 1 failed" in out
    assert listed(tmp_path / "store.zarr.failures.jsonl") == [("val", 2, BROKEN[2], "empty")]
    for option, message in (("--part 3/2", "parts are counted from 1/2 to 2/2"), ("--part x", "must be I/N")):
        status, out, err = vcache(f"{words} {option}")
        assert (status, message in err) == (1, True)
