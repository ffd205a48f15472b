"""vcache extract: what it stores, how it resumes and extends, what it refuses, what it records."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from vcache.extract.backbone import load_backbone
from vcache.extract.decode import decode_clip
from vcache.extract.preprocess import from_open_clip_config
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.growth import DatasetChanged
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.store.errors import StoreBusy, StoreKeyMismatch
from vcache.store.reader import FeatureStore
from vcache.store.writer import sole_writer

MakeConfig = Callable[..., ExtractionConfig]
DieAfter = Callable[[pytest.MonkeyPatch, int], None]


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file below `path`."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def contents(path: Path) -> dict[str, bytes]:
    """Content alone, without the manifest's time of creation."""
    return {name: content for name, (_, content) in tree(path).items() if name != "zarr.json"}


def test_stored_rows_equal_the_backbone_run_on_the_same_frames(config: MakeConfig, video_folder: Path) -> None:
    made = config()
    run_extraction(made)
    backbone = load_backbone(made.model, None)
    prepare = from_open_clip_config(backbone.preprocess_config, mode="fast")
    with FeatureStore.open(made.store) as store:
        for row in (0, 5, 11):
            clip = decode_clip(video_folder / store.videos("train").paths[row], made.sampling)
            taps = backbone(prepare(clip.frames), tokens=[1, 2], qk=[1, 2])
            expected = {"embed": taps.embed, "frame_index": torch.tensor(clip.frame_index, dtype=torch.int32)}
            for layer in (1, 2):
                expected |= {f"tokens/{layer}": taps.tokens[layer], f"cls/{layer}": taps.tokens[layer][:, 0]}
                expected |= {f"q/{layer}": taps.q[layer], f"k/{layer}": taps.k[layer]}
            for name, value in expected.items():
                stored = torch.from_numpy(store.read("train", name, np.array([row])))[0]
                torch.testing.assert_close(stored, value, rtol=1e-5, atol=1e-5, msg=f"{name} of row {row}")


def test_the_store_is_plain_zarr_with_names(config: MakeConfig) -> None:
    made = config(dtype="float16")
    run_extraction(made)
    group = zarr.open_group(made.store, mode="r")
    tokens = group["val/view-0/tokens/2"]
    assert tokens.shape == (6, 5, 17, 48)
    assert tokens.dtype == np.float16
    assert tokens.metadata.dimension_names == ("video", "frame", "token", "channel")
    with FeatureStore.open(made.store) as store:
        np.testing.assert_array_equal(tokens[:], store.read("val", "tokens/2", np.arange(6)))
        assert list(group["val/label"][:]) == list(store.videos("val").labels) == [0, 0, 1, 1, 2, 2]


def test_the_same_command_again_does_nothing_and_says_what_it_skipped(config: MakeConfig) -> None:
    first = run_extraction(config())
    before = tree(Path(first.store))
    second = run_extraction(config())
    assert (first.progress.videos_done, first.progress.videos_skipped) == (18, 0)
    assert (second.progress.videos_done, second.progress.videos_skipped) == (0, 18)
    assert tree(Path(first.store)) == before


def test_a_run_that_dies_between_shards_resumes_to_the_same_tree(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: DieAfter
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    run_extraction(config(store=tmp_path / "whole.zarr"))
    with monkeypatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_extraction(config(store=tmp_path / "killed.zarr"))
    resumed = run_extraction(config(store=tmp_path / "killed.zarr"))
    assert resumed.progress.videos_skipped == 4
    assert contents(tmp_path / "killed.zarr") == contents(tmp_path / "whole.zarr")


def test_more_layers_are_added_and_nothing_stored_is_rewritten(config: MakeConfig) -> None:
    run_extraction(config(layers="-1", cross_frame="none"))
    before = tree(config().store)
    summary = run_extraction(config(layers="all"))
    after = tree(config().store)
    assert summary.progress.videos_done == 18
    assert {name: after[name] for name in before} == before
    with FeatureStore.open(config().store) as store:
        assert {"tokens/0", "tokens/1", "tokens/2", "q/0", "k/2"} <= store.arrays("train").keys()
        assert store.committed_rows("train", ["tokens/0", "tokens/2", "q/2"]).all()


def test_another_preprocessing_is_refused_with_the_difference(config: MakeConfig) -> None:
    run_extraction(config())
    with pytest.raises(StoreKeyMismatch, match=r"preprocessing\.mode") as caught:
        run_extraction(config(preprocess="exact"))
    assert "fast" in str(caught.value)
    assert "exact" in str(caught.value)


def test_without_a_path_two_ways_of_extracting_get_two_stores(config: MakeConfig) -> None:
    stores = {run_extraction(config(store=None, frames=frames, split=("val",))).store for frames in (4, 5)}
    assert len(stores) == 2


def test_a_changed_list_of_videos_is_refused(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    run_extraction(config(dataset=str(copy)))
    (copy / "val" / "wave" / "w1.mp4").unlink()
    with pytest.raises(
        DatasetChanged, match="no longer lists 1 of the 6 videos .* 'val/wave/w1.mp4'. Restore the list"
    ):
        run_extraction(config(dataset=str(copy)))


def test_broken_videos_are_recorded_with_a_reason_and_the_run_goes_on(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    (copy / "train" / "jump" / "j1.mp4").write_bytes(b"")
    (copy / "train" / "wave" / "w3.mp4").write_text("this is no video")
    summary = run_extraction(config(dataset=str(copy)))
    kinds = {failure.path: failure.kind for failure in summary.failures}
    assert kinds == {"train/jump/j1.mp4": "empty", "train/wave/w3.mp4": "not_video"}
    assert all(failure.reason for failure in summary.failures)
    assert summary.too_many_failures(0.01)
    assert not summary.too_many_failures(0.2)
    again = run_extraction(config(dataset=str(copy)))
    assert again.failures == summary.failures
    assert again.progress.videos_done == 0


def test_nothing_but_failures_is_too_many_whatever_is_allowed(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "a" / "x.mp4").write_bytes(b"")
    assert run_extraction(config(dataset=str(tmp_path / "one"))).too_many_failures(1.0)


def test_the_number_of_decode_threads_does_not_change_a_byte(config: MakeConfig, tmp_path: Path) -> None:
    for workers in (1, 4):
        run_extraction(config(store=tmp_path / f"{workers}.zarr", decode_workers=workers))
    assert contents(tmp_path / "1.zarr") == contents(tmp_path / "4.zarr")


@pytest.mark.parametrize(
    "fields",
    [
        {"cross_frame": "qkv"},
        {"cross_frame": "maps", "frames": 1},
        {"frames": 0},
        {"decode_workers": 0},
        {"max_failures": 5.0},
        {"tsn": True, "stride": 3},
    ],
)
def test_impossible_requests_are_refused(config: MakeConfig, fields: dict[str, object]) -> None:
    with pytest.raises(ExtractionError, match="--"):
        replace(config(), **fields)


def test_a_dataset_none_of_whose_videos_is_there_makes_no_store(config: MakeConfig, tmp_path: Path) -> None:
    """Recorded, they would be failures for good, and the run with the right root would skip them."""
    listing = tmp_path / "list.csv"
    listing.write_text("path,label\na.mp4,jump\nb.mp4,wave\n")
    with pytest.raises(ExtractionError, match="none of the 2 videos that list lists is in .*--root FOLDER"):
        run_extraction(config(dataset=str(listing)))
    assert not config().store.exists()


def test_a_split_is_not_added_to_a_store_with_other_classes(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    run_extraction(config(dataset=str(copy), split=("train",)))
    before = tree(config().store)
    shutil.copytree(copy / "val" / "jump", copy / "val" / "crawl")
    with pytest.raises(DatasetChanged, match="has 4 classes, .* made with 3: crawl is new. .* a new store"):
        run_extraction(config(dataset=str(copy), split=("val",)))
    assert tree(config().store) == before
    shutil.rmtree(copy / "val" / "crawl")
    assert run_extraction(config(dataset=str(copy), split=("val",))).splits == {"val": 6}


def test_another_folder_of_the_same_name_is_not_taken_for_the_one_extracted(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "a" / "videos", tmp_path / "b" / "videos"
    shutil.copytree(video_folder, first)
    shutil.copytree(video_folder, second)
    made = run_extraction(config(dataset=str(first), store=None, split=("val",)))
    with pytest.raises(ExtractionError, match="was made from the videos in .*/a/videos, these are in .*/b/videos"):
        run_extraction(config(dataset=str(second), store=None, split=("val",)))
    again = run_extraction(config(dataset=str(second), store=Path(made.store), split=("val",)))
    assert again.progress.videos_skipped == 6


def test_a_split_that_no_store_can_name_is_refused_in_words(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text("path,label,split\ntrain/jump/j1.mp4,jump,my train\n")
    with pytest.raises(ExtractionError, match="split name 'my train' must start with .* Rename"):
        run_extraction(config(dataset=str(tmp_path / "list.csv"), root=video_folder))


def test_the_request_is_recorded_so_that_it_holds_from_any_folder(
    config: MakeConfig, video_folder: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder has the name of a registered dataset, which wins."""
    k400 = tmp_path / "k400"
    (k400 / "val").mkdir(parents=True)
    shutil.copy(video_folder / "val" / "jump" / "j1.mp4", k400 / "val" / "abc_000001_000002.mp4")
    (k400 / "val.csv").write_text("label,youtube_id,time_start,time_end,split\njump,abc,1,2,val\n")
    (tmp_path / "clip").symlink_to(tiny_clip)
    monkeypatch.chdir(tmp_path)
    run_extraction(config(dataset="k400", root=Path("k400"), model="local-dir:clip"))
    with FeatureStore.open(config().store) as store:
        request = store.manifest.facts["request"]
    assert (request["dataset"], request["root"]) == ("k400", str(k400))
    assert request["model"] == f"local-dir:{tiny_clip}"


def test_a_second_extraction_into_the_same_store_says_so_and_readers_go_on(config: MakeConfig) -> None:
    run_extraction(config(layers="-1"))
    with sole_writer(config().store):
        with pytest.raises(StoreBusy, match="another process is extracting into"):
            run_extraction(config(layers="all"))
        with FeatureStore.open(config().store) as store:
            assert store.read("train", "tokens/2", np.array([3])).shape == (1, 5, 17, 48)
    assert run_extraction(config(layers="all")).progress.videos_done == 18
