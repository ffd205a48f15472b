"""Videos that readers get wrong: the frames are those that a player shows, in its order, and no others."""

from pathlib import Path

import av
import numpy as np
import pytest
from numbered_videos import FPS, HEIGHT, WIDTH, cut_by_edit_list, decode_all, number_of, write, write_with_empty_frames

from vcache.extract.decode import decode_clip
from vcache.extract.sampling import StridedSampling, TSNSampling


def test_packets_that_show_no_frame_are_not_counted(tmp_path: Path) -> None:
    """The indices follow the frames that are shown."""
    path = write_with_empty_frames(tmp_path / "empty_frames.mp4")
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(container.streams.video[0])) == 48 + 8
    assert decode_all(path, 48) == list(range(48))


@pytest.mark.parametrize("first", [7, 17, 24])
def test_frames_cut_off_by_an_edit_list_are_not_counted(tmp_path: Path, first: int) -> None:
    """Of the groups of pictures before the one in which the cut is, FFmpeg gives no packets."""
    cut = cut_by_edit_list(tmp_path / "cut.mp4", first=first)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 48
    assert decode_all(cut, 48 - first) == list(range(first, 48))


def test_variable_frame_rate_is_indexed_by_frame_and_not_by_time(tmp_path: Path) -> None:
    ticks = [i * 3 - i % 3 for i in range(40)]
    path = write(tmp_path / "vfr.mp4", "libx264", numbers=range(40), ticks=ticks, bf="2")
    assert decode_all(path, 40) == list(range(40))


def test_odd_sizes_keep_every_column_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.mp4", "libx264", size=(WIDTH + 13, HEIGHT + 9), pix_fmt="yuv444p", numbers=range(9))
    clip = decode_clip(path, StridedSampling(num_frames=3, stride_frames=4))
    assert clip.frames.shape == (3, HEIGHT + 9, WIDTH + 13, 3)
    assert [number_of(frame[:HEIGHT]) for frame in clip.frames] == [0, 4, 8]


def test_single_frame_is_a_video(tmp_path: Path) -> None:
    clip = decode_clip(write(tmp_path / "one.mp4", "libx264", numbers=[77]), StridedSampling(num_frames=5))
    assert (clip.num_video_frames, clip.frame_index, clip.fps) == (1, (0,) * 5, FPS)
    assert [number_of(frame) for frame in clip.frames] == [77] * 5


def test_colours_come_back_as_rgb(tmp_path: Path) -> None:
    (frame,) = decode_clip(write(tmp_path / "a.mp4", "libx264", numbers=[255]), TSNSampling(num_frames=1)).frames
    for row, colour in ((8, (255, 0, 0)), (36, (255, 255, 255)), (-8, (0, 0, 255))):
        np.testing.assert_allclose(frame[row, 60].astype(int), colour, atol=12)
