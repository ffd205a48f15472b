"""Real clips of many kinds extract; broken ones are recorded with their reason, and none of them is cached."""

from pathlib import Path

import numpy as np
import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.store.errors import RowNotCommitted
from vcache.store.reader import FeatureStore

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
VIDEO = {".mp4", ".mkv", ".avi", ".webm", ".ts"}

pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not beside the checkout")

# What the README of the clips says was done to each, in the words of our failure kinds.
BROKEN = {
    "audio_only.mp4": {"no_video_stream"},
    "decord_corrupted.mp4": {"decode_error", "corrupt_frames"},
    "flip_0.01pct_payload.mp4": {"corrupt_frames", "decode_error"},
    "flip_moov.mp4": {"not_video", "decode_error"},
    "header_only.mp4": {"no_frames", "truncated", "decode_error"},
    "text_file.mp4": {"not_video"},
    "trunc50.mkv": {"truncated"},
    "trunc50_faststart.mp4": {"truncated", "decode_error"},
    "trunc50_nomoov.mp4": {"truncated", "not_video"},
    "zero_bytes.mp4": {"empty"},
    "zero_duration.mp4": {"no_frames", "decode_error", "frame_count"},
    "zero_frames.mp4": {"no_video_stream", "not_video"},
}


def test_every_real_clip_is_cached_and_every_broken_one_is_recorded(tiny_clip: Path, tmp_path: Path) -> None:
    files = [file for file in sorted(CLIPS.rglob("*")) if file.suffix in VIDEO]
    rows = [f"{file.relative_to(CLIPS)},{'broken' if 'broken' in file.parts else 'real'}" for file in files]
    csv = tmp_path / "clips.csv"
    csv.write_text("\n".join(["path,label", *rows]) + "\n")
    summary = run_extraction(
        ExtractionConfig(
            dataset=str(csv),
            root=CLIPS,
            val_fraction=0.0,
            layers="-1",
            frames=8,
            tsn=True,
            model=f"local-dir:{tiny_clip}",
            pretrained=None,
            store=tmp_path / "clips.zarr",
            device="cpu",
        )
    )
    kinds = {Path(failure.path).name: failure.kind for failure in summary.failures}
    assert kinds.keys() == BROKEN.keys()
    assert {name: kind for name, kind in kinds.items() if kind not in BROKEN[name]} == {}
    with FeatureStore.open(tmp_path / "clips.zarr") as store:
        paths = store.videos("train").paths
        for row, path in enumerate(paths):
            if path.startswith("broken/"):
                with pytest.raises(RowNotCommitted, match=Path(path).name):
                    store.read("train", "tokens/2", np.array([row]))
            else:
                assert np.abs(store.read("train", "tokens/2", np.array([row]))).sum() > 0
