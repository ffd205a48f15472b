"""What a dataset says of a video is what the store's table says of it, and any change of it is refused."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.video import Segment
from vcache.pipelines.growth import DatasetChanged, check_classes, label_facts, new_videos, video_table, videos_of
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import add_videos, create_store

CLASSES = ("cut", "pour", "stir")
times = st.floats(0, 1e6)
actions = st.tuples(st.integers(0, 2), times, times)


UNITS = st.sampled_from(["frames", "seconds"])
KINDS = ("noun", "tool", "verb")
NAMES = tuple(map(str, range(100)))


@st.composite
def annotations(draw):
    """Up to five videos with any of what an annotation can say, as plain values: beartype draws random numbers."""
    kinds = tuple(kind for kind in KINDS if draw(st.booleans()))
    multi_label = draw(st.booleans())
    rows = st.fixed_dictionaries(
        {
            "label": st.integers(-1, 2),
            "segment": st.none() | st.tuples(times, st.floats(0.01, 1e6), UNITS),
            "labels": st.tuples(*(st.tuples(st.just(kind), st.integers(0, 99)) for kind in kinds)),
            "classes": st.sets(st.integers(0, 2)).map(sorted).map(tuple) if multi_label else st.just(()),
            "actions": st.lists(actions, max_size=3).map(tuple) if multi_label else st.just(()),
        }
    )
    return draw(st.lists(rows, min_size=1, max_size=5)), kinds, multi_label


def dataset_of(annotation, root=Path("/")):
    rows, kinds, multi_label = annotation
    videos = []
    for number, row in enumerate(rows):
        start, length, unit = row["segment"] or (0.0, 0.0, None)
        segment = Segment(start, start + length, unit) if unit else None
        videos.append(Video(video_id=f"v{number}", path="sub dir/ü.mp4", split="train", **{**row, "segment": segment}))
    return VideoDataset("toy", root, CLASSES, tuple(videos), dict.fromkeys(kinds, NAMES), multi_label)


def make_store(path: Path, dataset: VideoDataset, num_rows: int | None = None) -> FeatureStore:
    """A store of the first videos, without features."""
    table = video_table(dataset.videos[:num_rows], dataset)
    manifest = Manifest(
        key="0" * 16,
        spec={},
        dataset="toy",
        class_names=dataset.class_names,
        rows_per_shard=2,
        splits={"train": len(table)},
        facts=label_facts(dataset),
    )
    create_store(path, manifest, {"train": table})
    return FeatureStore.open(path)


@settings(max_examples=150, deadline=None)
@given(annotation=annotations())
def test_videos_become_a_table_and_the_table_the_same_videos(annotation):
    dataset = dataset_of(annotation)
    table = video_table(dataset.videos, dataset)
    assert videos_of(table, "train") == dataset.videos
    last_first = list(range(len(table)))[::-1]
    assert videos_of(table, "train", last_first) == dataset.videos[::-1]


@settings(max_examples=15, deadline=None)
@given(annotation=annotations(), data=st.data())
def test_a_grown_store_gives_back_the_videos_and_finds_nothing_changed(annotation, data):
    num_old = data.draw(st.integers(1, len(annotation[0])))
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(annotation, Path(folder))
        (dataset.root / "sub dir").mkdir()
        (dataset.root / "sub dir" / "ü.mp4").touch()
        with make_store(Path(folder, "s.zarr"), dataset, num_old) as store:
            check_classes(store, dataset)
            new = new_videos(store, dataset, "train")
            assert new == dataset.videos[num_old:]
            if new:
                add_videos(store, "train", video_table(new, dataset))
            assert videos_of(store.videos("train"), "train") == dataset.videos
            assert new_videos(store, dataset, "train") == ()
            assert verify_store(store).ok


VIDEOS = (
    Video("a", "1.mp4", 1, "train", Segment(0.0, 4.0, "frames"), (("noun", 2), ("verb", 0))),
    Video("b", "1.mp4", 0, "train", Segment(3.0, 9.0, "frames"), (("noun", 0), ("verb", 1))),
)
TWO_KINDS = VideoDataset("toy", Path("/"), CLASSES, VIDEOS, {"verb": ("to", "fro"), "noun": ("x", "y", "z")})
SEVERAL = VideoDataset(
    "toy",
    Path("/"),
    CLASSES,
    (
        Video("a", "1.mp4", 2, "train", classes=(0, 2), actions=((2, 0.5, 1.25), (0, 1.0, 7.0))),
        Video("b", "2.mp4", -1, "train"),
    ),
    multi_label=True,
)


def test_the_columns_are_plain_numbers_for_any_zarr_reader(tmp_path):
    make_store(tmp_path / "s.zarr", TWO_KINDS)
    group = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")["train"]
    columns = {
        name: group[name][:].tolist() for name in group.array_keys() if name not in ("video_id", "path", "label")
    }
    assert columns == {"start_frame": [0, 3], "stop_frame": [4, 9], "verb": [0, 1], "noun": [2, 0]}
    make_store(tmp_path / "t.zarr", SEVERAL)
    group = zarr.open_group(str(tmp_path / "t.zarr"), mode="r")["train"]
    assert group["multi_hot"][:].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert group["actions"][:].tolist() == ["2 0.5 1.25;0 1.0 7.0", ""]
    assert group["label"][:].tolist() == [2, -1]


def test_the_manifest_names_the_classes_of_every_kind_of_label():
    assert label_facts(TWO_KINDS) == {"label_names": {"noun": ["x", "y", "z"], "verb": ["to", "fro"]}}
    assert label_facts(SEVERAL) == {"multi_label": True}
    assert label_facts(replace(SEVERAL, multi_label=False)) == {}


def test_a_list_of_whole_videos_has_no_columns():
    plain = VideoDataset("toy", Path("/"), CLASSES, (Video("a", "1.mp4", 1, "train"),))
    assert video_table(plain.videos, plain).columns == {}


def changed(dataset, number, **fields):
    videos = list(dataset.videos)
    videos[number] = replace(videos[number], **fields)
    return replace(dataset, videos=tuple(videos))


@pytest.mark.parametrize(
    ("made_with", "now", "words"),
    [
        (
            TWO_KINDS,
            changed(TWO_KINDS, 1, segment=Segment(4.0, 9.0, "frames")),
            r"1 videos of s.zarr another start_frame: 'b' was 3.0, is 4.0\. Restore",
        ),
        (
            TWO_KINDS,
            changed(TWO_KINDS, 0, labels=(("noun", 1), ("verb", 0))),
            "another noun: 'a' was 2, is 1",
        ),
        (TWO_KINDS, changed(TWO_KINDS, 0, segment=None), "another start_frame: 'a' was 0.0, is nan"),
        (
            TWO_KINDS,
            changed(TWO_KINDS, 0, segment=Segment(0.0, 4.0, "seconds")),
            "says noun, start_frame, start_seconds, .* of each video, s.zarr was made with noun, start_frame, stop_frame, verb",
        ),
        (SEVERAL, changed(SEVERAL, 1, classes=(1,)), "another multi_hot: 'b'"),
        (SEVERAL, changed(SEVERAL, 0, actions=((2, 0.5, 1.5), (0, 1.0, 7.0))), "another actions: 'a' was 2 0.5 1.25;"),
        (SEVERAL, changed(SEVERAL, 1, label=0), "another label: 'b' was no class, is cut"),
    ],
)
def test_a_stored_video_with_another_annotation_is_refused(tmp_path, made_with, now, words):
    with make_store(tmp_path / "s.zarr", made_with) as store:
        assert new_videos(store, made_with, "train") == ()
        with pytest.raises(DatasetChanged, match=words):
            new_videos(store, now, "train")


@pytest.mark.parametrize(
    "now",
    [
        replace(TWO_KINDS, label_names={"verb": ("to", "fro"), "noun": ("x", "y", "w")}),
        replace(TWO_KINDS, label_names={"verb": ("to", "fro")}),
        replace(TWO_KINDS, multi_label=True),
    ],
)
def test_other_names_of_labels_are_refused(tmp_path, now):
    with (
        make_store(tmp_path / "s.zarr", TWO_KINDS) as store,
        pytest.raises(
            DatasetChanged, match="s.zarr was made with one label per video and 3 noun names and 2 verb names"
        ),
    ):
        check_classes(store, now)


def test_columns_do_not_depend_on_which_videos_of_the_split_are_new():
    dataset = changed(TWO_KINDS, 1, segment=None)
    table = video_table(dataset.videos[1:], dataset)
    assert np.isnan(table.columns["start_frame"]).all()
    assert set(table.columns) == set(video_table(dataset.videos, dataset).columns)
