"""Does it fit? The predicted bytes are the bytes of the finished store, and what does not fit is refused before it starts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vcache.pipelines.extending import bytes_left, videos_to_add
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import CROSS_FRAME, ExtractionConfig
from vcache.pipelines.room import NotEnoughSpace, free_bytes, nearest_folder, with_reserve
from vcache.pipelines.setup import prepare_extraction
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


def predicted_bytes(config: ExtractionConfig) -> int:
    """What the command will write, by the arithmetic of the check."""
    setup = prepare_extraction(config)
    if not setup.path.exists():
        return bytes_left(setup, None, videos_to_add(setup, None))
    with FeatureStore.open(setup.path) as store:
        return bytes_left(setup, store, videos_to_add(setup, store))


def stored_bytes(path: Path) -> int:
    """Bytes of the files that Zarr calls chunks, video tables aside, and of the constants."""
    with FeatureStore.open(path) as store:
        constants = sum(store.constant(name).nbytes for name in store.manifest.constants)
    return constants + sum(file.stat().st_size for file in path.glob("*/view-*/**/c/**/*") if file.is_file())


def limit_free_space(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    usage = SimpleNamespace(total=10**15, used=10**15 - num_bytes, free=num_bytes)
    monkeypatch.setattr("vcache.pipelines.room.shutil.disk_usage", lambda path: usage)


@pytest.mark.parametrize("cross_frame", CROSS_FRAME)
@pytest.mark.parametrize(("dtype", "rows_per_shard"), [("float16", 64), ("float32", 5)])
def test_the_predicted_bytes_are_those_of_the_finished_store(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, cross_frame: str, dtype: str, rows_per_shard: int
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", rows_per_shard)
    asked = config(cross_frame=cross_frame, dtype=dtype)
    predicted = predicted_bytes(asked)
    run_extraction(asked)
    assert predicted == stored_bytes(asked.store)
    assert predicted_bytes(asked) == 0


def test_only_what_is_missing_counts(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split, a layer, Q/K, and what derived Q/K need are added; each time the prediction is what the store grows by."""
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    stored = 0
    for asked in (
        config(layers="-1", cross_frame="none", split=("val",)),
        config(layers="-1", cross_frame="none"),
        config(layers="-2:", cross_frame="none"),
        config(layers="-2:", cross_frame="qk"),
        config(layers="-2:", cross_frame="derive"),
    ):
        predicted = predicted_bytes(asked)
        run_extraction(asked)
        assert stored_bytes(asked.store) - stored == predicted > 0
        stored += predicted


def test_videos_that_the_store_does_not_know_count(
    config: MakeConfig, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos and a layer are added at once: the new rows are a part of their own, the old ones lack the layer."""
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    run_extraction(config(dataset=str(copy), layers="-1"))
    stored = stored_bytes(config().store)
    for name in ("new1.mp4", "new2.mp4"):
        shutil.copy(copy / "train" / "wave" / "w1.mp4", copy / "train" / "wave" / name)
    asked = config(dataset=str(copy), layers="-2:")
    predicted = predicted_bytes(asked)
    assert run_extraction(asked).added == {"train": 2}
    assert stored_bytes(asked.store) - stored == predicted


def test_a_failed_video_takes_no_room(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    (copy / "train" / "jump" / "j1.mp4").write_bytes(b"")
    asked = config(dataset=str(copy))
    predicted = predicted_bytes(asked)
    run_extraction(asked)
    assert stored_bytes(asked.store) < predicted


def test_what_cannot_fit_is_refused_before_anything_is_written(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(store=tmp_path / "new" / "store.zarr")
    needed = with_reserve(predicted_bytes(asked))
    limit_free_space(monkeypatch, needed - 1)
    with pytest.raises(NotEnoughSpace, match=r"will write .* MB, and .* are free in .*--ignore-free-space") as caught:
        run_extraction(asked)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "new").exists()
    limit_free_space(monkeypatch, needed)
    assert run_extraction(asked).progress.videos_done == 18


def test_a_store_is_left_as_it_is_where_its_extension_cannot_fit(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extraction(config(layers="-1"))
    before = sorted(config().store.rglob("*"))
    limit_free_space(monkeypatch, 1000)
    assert run_extraction(config(layers="-1")).progress.videos_skipped == 18  # nothing is missing, nothing is needed
    with pytest.raises(NotEnoughSpace):
        run_extraction(config(layers="all"))
    assert sorted(config().store.rglob("*")) == before
    assert run_extraction(config(layers="all", ignore_free_space=True)).progress.videos_done == 18


def test_the_free_space_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b.zarr") == tmp_path
    assert nearest_folder(tmp_path) == tmp_path
    assert abs(free_bytes(tmp_path / "a") - shutil.disk_usage(tmp_path).free) < 2**30
