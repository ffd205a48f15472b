"""Videos that readers get wrong: the frames are those that a player shows, in its order, and no others."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.stream import VideoStream
from numbered_videos import (
    FPS,
    HEIGHT,
    WIDTH,
    cut_by_edit_list,
    decode_all,
    kind_of,
    number_of,
    picture,
    write,
    write_with_empty_frames,
)

from vcache.extract.decode import decode_clip, decode_video
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodeRequest, Segment


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


# codec, pixel format, options; what readers stumble over in each is in the name.
ODD = {
    "h264_10_bit.mp4": ("libx264", "yuv420p10le", {"bf": "2"}),
    "hevc_10_bit.mkv": ("libx265", "yuv420p10le", {"x265-params": "log-level=none:pools=1:frame-threads=1:keyint=16"}),
    "full_range.mp4": ("libx264", "yuvj420p", {"bf": "2"}),
    "interlaced.mp4": ("libx264", "yuv420p", {"flags": "+ildct+ilme", "bf": "2"}),
    "interlaced.ts": ("libx264", "yuv420p", {"x264-params": "tff=1:bframes=2"}),
    "av1.mkv": ("libsvtav1", "yuv420p", {"preset": "8", "crf": "1", "svtav1-params": "lp=1:keyint=16"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "8", "crf": "1", "svtav1-params": "lp=1:keyint=16"}),
    "alpha.webm": ("libvpx-vp9", "yuva420p", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}),
    "hidden_frames.webm": ("libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "fields_and_b_frames.mpg": (
        "mpeg2video",
        "yuv420p",
        {"bf": "2", "g": "12", "qscale": "3", "flags": "qscale+ildct"},
    ),
    "mpeg4_b_frames.mkv": ("mpeg4", "yuv420p", {"bf": "2", "g": "15", "qscale": "3", "flags": "qscale"}),
    "lossless.mkv": ("ffv1", "yuv444p", {}),
}


@pytest.fixture(scope="module")
def odd_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odd")
    return {name: write(folder / name, codec, pix_fmt=fmt, **options) for name, (codec, fmt, options) in ODD.items()}


@pytest.mark.parametrize("name", ODD)
def test_every_frame_of_an_odd_video_is_in_its_place(odd_videos: dict[str, Path], name: str) -> None:
    assert decode_all(odd_videos[name], 48) == list(range(48))


@pytest.mark.parametrize("name", ODD)
def test_colours_of_an_odd_video_are_those_that_were_drawn(odd_videos: dict[str, Path], name: str) -> None:
    """Ten bits, full range and alpha end as eight bits of RGB; an oracle that does not know what swscale does."""
    frames = decode_clip(odd_videos[name], TSNSampling(num_frames=3)).frames
    drawn = np.stack([picture(i) for i in (8, 24, 40)])
    assert np.abs(frames.astype(int) - drawn)[:, 4:12].mean() < 12  # red
    assert np.abs(frames.astype(int) - drawn)[:, -12:-4].mean() < 12  # blue


@pytest.mark.parametrize("name", ["vfr.webm", "vfr.mkv", "vfr.ts"])
def test_variable_frame_rate_of_other_containers(tmp_path: Path, name: str) -> None:
    codec, options = ("libvpx-vp9", {"deadline": "realtime"}) if name.endswith("webm") else ("libx264", {"bf": "2"})
    path = write(tmp_path / name, codec, numbers=range(30), ticks=[i * 3 - i % 3 for i in range(30)], **options)
    assert decode_all(path, 30) == list(range(30))


def remux(source_path: Path, path: Path, *, drop: int = 0, sound_seconds: float = 0) -> Path:
    """The same packets but for the first `drop` in another container, with a silent track."""
    with av.open(str(source_path)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        sound = target.add_stream("aac", rate=16000, layout="mono") if sound_seconds else None
        for i, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if i >= drop:
                packet.stream = copied
                target.mux(packet)
        if sound is not None:
            for i in range(int(sound_seconds * 16000 / 1024)):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, 1024 * i
                target.mux(sound.encode(frame))
            target.mux(sound.encode())
    return path


@pytest.mark.parametrize("name", ["long_sound.mp4", "long_sound.mkv", "long_sound.ts"])
def test_sound_that_outlasts_the_picture_is_no_truncation(tmp_path: Path, name: str) -> None:
    plain = write(tmp_path / "plain.mp4", "libx264", numbers=range(20), bf="2")
    assert decode_all(remux(plain, tmp_path / name, sound_seconds=8), 20) == list(range(20))


def test_recording_that_begins_within_a_group_of_pictures(tmp_path: Path) -> None:
    """As recorded television does. The frames before the first key frame cannot be shown, and are not counted."""
    plain = write(tmp_path / "plain.ts", "libx264", bf="0", g="12")
    path = remux(plain, tmp_path / "late.ts", drop=5)
    with av.open(str(path)) as container:
        shown = [number_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown[-36:] == list(range(12, 48))
    assert decode_all(path, len(shown)) == shown


def test_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    for name, numbers, expected in (("song.mp4", None, "no_video_stream"), ("film.mp4", range(12), "")):
        with av.open(str(tmp_path / name), "w") as container:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            film = container.add_stream("libx264", rate=FPS) if numbers else container.add_stream("aac", rate=16000)
            if isinstance(film, VideoStream):
                film.width, film.height, film.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            still = av.VideoFrame.from_ndarray(picture(99, 640, 480), format="rgb24")
            container.mux(cover.encode(still.reformat(format="yuvj420p")))
            container.mux(cover.encode())
            for number in numbers or ():
                container.mux(film.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
            container.mux(film.encode() if numbers else [])
        if expected:
            assert kind_of(tmp_path / name) == expected
        else:
            assert decode_all(tmp_path / name, 12) == list(range(12))


def test_of_several_video_streams_the_default_one_is_taken(tmp_path: Path) -> None:
    """The first is a preview."""
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=FPS) for _ in range(2)]
        sizes = ((WIDTH, HEIGHT), (WIDTH + 16, HEIGHT + 24))
        for stream, (width, height) in zip(streams, sizes, strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        streams[1].disposition = Disposition.default
        for number in range(15):
            for stream, size, offset in zip(streams, sizes, (100, 0), strict=True):
                frame = av.VideoFrame.from_ndarray(picture(number + offset, *size), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    clip = decode_clip(tmp_path / "two.mkv", TSNSampling(num_frames=15))
    assert clip.frames.shape[1:3] == (HEIGHT + 24, WIDTH + 16)
    assert [number_of(frame[:HEIGHT]) for frame in clip.frames] == list(range(15))


def test_container_that_begins_late_has_its_segments_from_its_first_frame(tmp_path: Path) -> None:
    """Clips cut by time keep the clock of the film."""
    path = write(tmp_path / "late.mkv", "libx264", ticks=[100 + i for i in range(48)], bf="2", g="12")
    assert decode_all(path, 48) == list(range(48))
    rule = ClipRule(sampling=StridedSampling(num_frames=2, stride_frames=1))
    video = decode_video(DecodeRequest(path=path, clips=(rule,), segment=Segment(1.5, 1.6, "seconds")))
    assert [number_of(frame) for frame in video.frames] == list(video.numbers) == [30, 31]
