"""--allow-partial: what a cut video gives is stored with a note, checked, mended, listed, and replaced once it is whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.listing import describe_store
from vcache.pipelines.repairing import repair
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.verification import verify
from vcache.store.errors import RowNotCommitted
from vcache.store.layout import CRC_BYTES
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]
Run = Callable[[str], tuple[int, str, str]]

CUT, ROW, NUM_FRAMES = "train/jump/j9.mkv", 8, 90


@pytest.fixture(scope="session")
def whole_video(write_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("whole") / "j9.mkv", seed=77, num_frames=NUM_FRAMES)


@pytest.fixture
def videos(video_folder: Path, whole_video: Path, tmp_path: Path) -> Path:
    """The videos and one more, of which half is there."""
    shutil.copytree(video_folder, tmp_path / "videos")
    data = whole_video.read_bytes()
    (tmp_path / "videos" / CUT).write_bytes(data[: len(data) // 2])
    return tmp_path / "videos"


@pytest.fixture
def made(config: MakeConfig, videos: Path) -> MakeConfig:
    """Extractions of these videos."""

    def make(**fields: object) -> ExtractionConfig:
        return config(**{"dataset": str(videos), "layers": "-1", **fields})

    return make


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "zarr.json"
    }


def test_a_cut_video_is_a_failure_unless_it_is_allowed_and_is_then_stored_with_a_note(
    made: MakeConfig, tmp_path: Path
) -> None:
    strict = run_extraction(made())
    assert [(failure.row, failure.path, failure.kind) for failure in strict.failures] == [(ROW, CUT, "truncated")]
    with FeatureStore.open(tmp_path / "store.zarr") as store, pytest.raises(RowNotCommitted, match="truncated"):
        store.read("train", "embed", [ROW])
    allowed = run_extraction(made(store=tmp_path / "allowed.zarr", allow_partial=True))
    assert allowed.failures == ()
    assert [(row.row, row.video_id, row.kind) for row in allowed.partial] == [
        (ROW, strict.failures[0].video_id, "truncated")
    ]
    with FeatureStore.open(tmp_path / "allowed.zarr") as store:
        frames = store.read("train", "frame_index", [ROW])[0]
        assert frames.max() < NUM_FRAMES * 0.7
        assert np.isfinite(store.read("train", "embed", [ROW])).all()
    (line,) = (json.loads(line) for line in (tmp_path / "allowed.zarr.failures.jsonl").read_text().splitlines())
    assert (line["row"], line["stored"], line["kind"]) == (ROW, True, "truncated")


def test_a_retry_stores_it_where_that_is_allowed_now_as_a_first_run_would_have(
    made: MakeConfig, tmp_path: Path
) -> None:
    run_extraction(made())
    run_extraction(made(store=tmp_path / "allowed.zarr", allow_partial=True))
    assert run_extraction(made(retry_failed=True)).partial == ()
    summary = run_extraction(made(retry_failed=True, allow_partial=True))
    assert ([row.row for row in summary.partial], summary.failures) == ([ROW], ())
    assert files(tmp_path / "store.zarr") == files(tmp_path / "allowed.zarr")


def test_a_partial_row_is_as_checked_and_as_mendable_as_any_other(made: MakeConfig, tmp_path: Path) -> None:
    run_extraction(made(allow_partial=True))
    path = tmp_path / "store.zarr"
    before = files(path)
    checked = verify(path, deep=100)
    assert (checked["ok"], checked["partial_rows"], checked["deep"]["equal_rows"]) == (True, 1, 19)
    with FeatureStore.open(path) as store:
        spec = store.arrays("train")["embed"]
    damaged = path / "train" / "view-0" / spec.shard_path(0)
    data = bytearray(damaged.read_bytes())
    data[(spec.chunk_bytes + CRC_BYTES) * ROW + 7] ^= 1  # one chunk a row
    damaged.write_bytes(data)
    (finding,) = verify(path)["findings"]
    assert (finding["kind"], finding["rows"]) == ("chunk", (ROW,))
    assert repair(path)["ok"]
    assert files(path) == before


def test_it_stays_until_its_video_is_whole_and_is_tried_again(
    made: MakeConfig, videos: Path, whole_video: Path, tmp_path: Path
) -> None:
    run_extraction(made(allow_partial=True))
    path = tmp_path / "store.zarr"
    before = files(path)
    shutil.copy(whole_video, videos / CUT)
    run_extraction(made())
    assert len(run_extraction(made(retry_failed=True)).partial) == 1
    assert files(path) == before
    summary = run_extraction(made(retry_failed=True, allow_partial=True))
    assert (summary.partial, summary.failures, summary.failures_file) == ((), (), None)
    run_extraction(made(store=tmp_path / "whole.zarr"))
    assert files(path) == files(tmp_path / "whole.zarr")


def test_what_a_user_sees_of_it(vcache: Run, made: MakeConfig, tmp_path: Path) -> None:
    config = made()
    words = (
        f"extract {config.dataset} --layers -1 --frames 5 --stride 3 --model {config.model} --device cpu --batch-size 3"
    )
    status, out, err = vcache(f"{words} --store {config.store} --allow-partial")
    assert status == 0, err
    assert "1 row stored from damaged videos" in out
    assert "failures.jsonl" in out
    assert "train: 1 stored from damaged videos, truncated" in vcache(f"info {config.store}")[1]
    assert [row["row"] for row in describe_store(tmp_path / "store.zarr")["splits"]["train"]["partial"]] == [ROW]
    assert "(0 failed, 1 partial)" in vcache(f"verify {config.store}")[1]


def test_what_int8_is_made_with_comes_from_whole_videos(made: MakeConfig, tmp_path: Path) -> None:
    constants = []
    for name, allow_partial in (("strict.zarr", False), ("allowed.zarr", True)):
        for layers in ("-1", "-2:"):  # of a new store, and of a layer that is added
            fields = {"layers": layers, "cross_frame": "none", "dtype": "int8", "max_error": 1.0}
            run_extraction(made(store=tmp_path / name, allow_partial=allow_partial, **fields))
        with FeatureStore.open(tmp_path / name) as store:
            constants.append({constant: store.constant(constant).tobytes() for constant in store.manifest.constants})
    assert constants[0] == constants[1]
    assert len(constants[0]) == 4
