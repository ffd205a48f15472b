"""Videos that readers get wrong: the frames are those that a player shows, in its order, and no others."""

from pathlib import Path

import av
import numpy as np
import pytest
from numbered_videos import FPS, HEIGHT, WIDTH, decode_all, number_of, write

from vcache.extract.decode import decode_clip
from vcache.extract.sampling import StridedSampling, TSNSampling


def test_packets_that_show_no_frame_are_not_counted(tmp_path: Path) -> None:
    """XviD writes a frame without change as an empty one, VP8 has hidden frames: the indices follow the shown frames."""
    empty_frame = bytes.fromhex("000001b6504f")  # MPEG-4 part 2: a P picture with vop_coded = 0, at 20 ticks a second
    plain, path = write(tmp_path / "plain.mp4", "mpeg4", g="15"), tmp_path / "empty_frames.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        at = 0
        for i, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            for payload in (bytes(packet), empty_frame) if i % 6 == 2 else (bytes(packet),):
                part = av.Packet(payload)
                part.stream, part.time_base, part.duration = copied, packet.time_base, packet.duration
                part.pts = part.dts = at
                part.is_keyframe = packet.is_keyframe
                target.mux(part)
                at += packet.duration
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(container.streams.video[0])) == 48 + 8
    assert decode_all(path, 48) == list(range(48))


def test_frames_cut_off_by_an_edit_list_are_not_counted(tmp_path: Path) -> None:
    """A stream-copied cut keeps the packets back to the key frame and hides them; headers still count them."""
    whole, cut = write(tmp_path / "whole.mp4", "libx264", bf="0", g="30"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        shift = int(7 / FPS / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 48
    assert decode_all(cut, 41) == list(range(7, 48))


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


@pytest.mark.parametrize("matrix, quarter_turns_left", [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_of_the_header_is_applied(
    tmp_path: Path, matrix: tuple[int, int, int, int], quarter_turns_left: int
) -> None:
    """x' = a x + c y, y' = b x + d y with y downwards: (0, 1, -1, 0) turns the picture to the right."""
    path = write(tmp_path / "turned.mp4", "libx264", numbers=[181])
    one = 0x10000
    a, b, c, d = ((value * one).to_bytes(4, "big", signed=True) for value in matrix)
    zero, perspective = bytes(4), (1 << 30).to_bytes(4, "big")
    upright = one.to_bytes(4, "big") + zero * 3 + one.to_bytes(4, "big") + zero * 3 + perspective
    data = path.read_bytes()
    at = data.index(upright, data.index(b"tkhd"))  # the first such matrix is that of the whole movie
    path.write_bytes(data[:at] + a + b + zero + c + d + zero * 3 + perspective + data[at + 36 :])

    frames = decode_clip(path, TSNSampling(num_frames=2)).frames
    assert frames.flags.c_contiguous
    upright_frame = np.rot90(frames[0], k=-quarter_turns_left)
    assert number_of(upright_frame) == 181
    assert upright_frame[8, 60, 0] > 200 > upright_frame[-8, 60, 0]


def test_colours_come_back_as_rgb(tmp_path: Path) -> None:
    (frame,) = decode_clip(write(tmp_path / "a.mp4", "libx264", numbers=[255]), TSNSampling(num_frames=1)).frames
    for row, colour in ((8, (255, 0, 0)), (36, (255, 255, 255)), (-8, (0, 0, 255))):
        np.testing.assert_allclose(frame[row, 60].astype(int), colour, atol=12)
