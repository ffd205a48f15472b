"""Segments of a long video and folders of frames give the features of their frames and of no others."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vcache.extract.backbone import load_backbone
from vcache.extract.preprocess import from_open_clip_config
from vcache.extract.sampling import StridedSampling
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.repairing import repair
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.verification import verify
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]

SEGMENTS = {"P01_01_0": (1, 6), "P01_01_1": (5, 20), "P01_01_2": (12, 40), "P01_01_3": (33, 41)}
"""First and last frame, counted from 1; the video has 40."""


@pytest.fixture
def kitchen(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    root = tmp_path / "kitchen"
    write_video(root / "P01" / "videos" / "P01_01.MP4", num_frames=40)
    columns = "narration_id,participant_id,video_id,start_frame,stop_frame,verb_class,noun_class"
    rows = [f"{name},P01,P01_01,{start},{stop},0,{start % 2}" for name, (start, stop) in SEGMENTS.items()]
    (root / "EPIC_100_train.csv").write_text("\n".join([columns, *rows]) + "\n")
    (root / "EPIC_100_validation.csv").write_text(f"{columns}\nP01_01_9,P01,P01_01,10,14,1,1\n")
    (root / "EPIC_100_verb_classes.csv").write_text("id,key\n0,take\n1,put\n")
    (root / "EPIC_100_noun_classes.csv").write_text("id,key\n0,tap\n1,pan\n")
    return root


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_features_of_a_segment_are_those_of_its_frames(kitchen: Path, config: MakeConfig, tiny_clip: Path) -> None:
    made = config(
        dataset="epic-kitchens-100", root=kitchen, layers="-1", cross_frame="none", max_failures=1.0, batch_size=1
    )
    summary = run_extraction(made)
    assert [(failure.video_id, failure.kind) for failure in summary.failures] == [("P01_01_3", "frame_count")]
    frames = decode_all(kitchen / "P01" / "videos" / "P01_01.MP4")
    backbone = load_backbone(f"local-dir:{tiny_clip}", None, device=torch.device("cpu"))
    preprocess = from_open_clip_config(backbone.preprocess_config)
    with FeatureStore.open(made.store) as store:
        table = store.videos("train")
        assert table.ids == tuple(SEGMENTS)
        for row, (start, stop) in list(enumerate(SEGMENTS.values()))[:3]:
            segment = frames[start - 1 : stop]
            chosen = StridedSampling(num_frames=5, stride_frames=3).indices(len(segment))
            assert store.read("train", "frame_index", [row])[0].tolist() == [start - 1 + index for index in chosen]
            taps = backbone(preprocess(segment[list(chosen)]), tokens=[2])
            np.testing.assert_allclose(
                store.read("train", "tokens/2", [row])[0], taps.tokens[2].numpy(), rtol=1e-5, atol=1e-5
            )


def test_damaged_rows_of_segments_are_made_again_from_the_table(kitchen: Path, config: MakeConfig) -> None:
    made = config(dataset="epic-kitchens-100", root=kitchen, layers="-1", cross_frame="none", max_failures=1.0)
    run_extraction(made)
    shard = made.store / "train" / "view-0" / "tokens" / "2" / "c" / "0" / "0" / "0" / "0"
    before = shard.read_bytes()
    shard.write_bytes(b"\0" + before[1:])
    assert repair(made.store)["ok"]
    assert shard.read_bytes() == before
    deep = verify(made.store, deep=100)
    assert (deep["ok"], deep["deep"]["rows"], deep["deep"]["equal_rows"]) == (True, 4, 4)


def test_features_of_a_folder_of_frames_are_those_of_its_listed_images(
    tmp_path: Path, kitchen: Path, config: MakeConfig, tiny_clip: Path
) -> None:
    frames = decode_all(kitchen / "P01" / "videos" / "P01_01.MP4")
    counts = {"wave/ä 7": 9, "jump/b": 20, "jump/short": 4}
    for folder, count in counts.items():
        (tmp_path / "raw" / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(frames[number + count]).save(tmp_path / "raw" / folder / f"img_{number + 1:05d}.png")
    listing = tmp_path / "raw" / "val.txt"
    listing.write_text("wave/ä 7 9 1\njump/b 17 0\njump/short 5 0\n")
    made = config(dataset=str(listing), layers="-1", cross_frame="none", max_failures=1.0, batch_size=1)
    summary = run_extraction(made)
    assert [(failure.path, failure.kind) for failure in summary.failures] == [("jump/short", "frame_count")]
    backbone = load_backbone(f"local-dir:{tiny_clip}", None, device=torch.device("cpu"))
    preprocess = from_open_clip_config(backbone.preprocess_config)
    with FeatureStore.open(made.store) as store:
        assert store.manifest.spec["decoder"]["decoder"] == "images"
        ids = store.videos("val").ids
        for folder, listed in (("wave/ä 7", 9), ("jump/b", 17)):
            chosen = StridedSampling(num_frames=5, stride_frames=3).indices(listed)
            shown = frames[[counts[folder] + index for index in chosen]]
            stored = store.read("val", "tokens/2", [ids.index(folder)])[0]
            np.testing.assert_allclose(
                stored, backbone(preprocess(shown), tokens=[2]).tokens[2].numpy(), rtol=1e-5, atol=1e-5
            )
    deep = verify(made.store, deep=100)
    assert (deep["ok"], deep["deep"]["rows"], deep["deep"]["equal_rows"]) == (True, 2, 2)
