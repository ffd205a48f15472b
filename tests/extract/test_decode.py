"""The right frames come back, of all clips in one pass."""

import concurrent.futures
from pathlib import Path

import numpy as np
import pytest
from numbered_videos import NUMBERS, WRITERS, decode_all, number_of, write, write_as

from vcache.extract import survey
from vcache.extract.decode import decode_video, decoder_versions
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodeRequest


@pytest.mark.parametrize("name", WRITERS)
def test_every_frame_comes_back_in_its_place(tmp_path: Path, name: str) -> None:
    assert decode_all(write_as(tmp_path / name, name), 48) == list(range(48))


def test_several_threads_decode_different_files_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.mp4", "libx264", numbers=range(i, i + 20), bf="2") for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda path: decode_all(path, 20), paths))
    assert numbers == [list(range(i, i + 20)) for i in range(6)]


def test_versions_name_what_decides_the_pixels() -> None:
    assert set(decoder_versions()) == {"decoder", "av", "libavcodec", "libavformat", "libswscale"}


def test_all_clips_come_from_one_pass_and_each_is_what_it_is_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", "libx264")
    rules = (
        ClipRule(sampling=StridedSampling(num_frames=3, stride_frames=5), view=2, num_views=3),
        ClipRule(sampling=TSNSampling(num_frames=5)),
        ClipRule(sampling=StridedSampling(num_frames=4, stride_frames=2), seed=7),
    )
    alone = [decode_video(DecodeRequest(path=path, clips=(rule,))).clip(0) for rule in rules]
    passes = []
    original = survey._decode
    monkeypatch.setattr(survey, "_decode", lambda *args: passes.append(args) or original(*args))

    video = decode_video(DecodeRequest(path=path, clips=rules))

    assert len(passes) == 1
    assert video.clips == tuple(rule.indices(len(NUMBERS)) for rule in rules)
    assert video.numbers == tuple(sorted(set().union(*video.clips)))
    for number, frames in enumerate(alone):
        np.testing.assert_array_equal(video.clip(number), frames)
        assert [number_of(frame) for frame in frames] == list(video.clips[number])
