"""Every frame of the test videos carries its own number, so that the RIGHT frame is checked and not just a frame."""

import concurrent.futures
import pickle
import shutil
import subprocess
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vcache.extract.containers import missing_bytes
from vcache.extract.decode import decode_clip, decode_video, decoder_versions
from vcache.extract.decoders import pyav
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import KINDS, DecodeRequest, VideoError

CLIPS = Path(__file__).parents[2].parent / "shared" / "clips"
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not beside the checkout")

BITS, STRIPE = 8, 16
WIDTH, HEIGHT = BITS * STRIPE, 72
FPS = 20
NUMBERS = range(48)


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """The number in binary as black and white stripes, red above and blue below to tell which way is up."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    image = np.repeat(np.array(bits, dtype=np.uint8), STRIPE)[None, :, None].repeat(HEIGHT, 0).repeat(3, 2)
    image[:16], image[-16:] = (255, 0, 0), (0, 0, 255)
    return np.ascontiguousarray(np.pad(image, ((0, height - HEIGHT), (0, width - WIDTH), (0, 0)), mode="edge"))


def number_of(image: np.ndarray) -> int:
    middle = image[24:-24, : BITS * STRIPE].mean(axis=(0, 2)).reshape(BITS, STRIPE).mean(axis=1)
    return sum(int(value > 128) << bit for bit, value in enumerate(middle))


def write(
    path: Path,
    codec: str,
    *,
    numbers: Sequence[int] = NUMBERS,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pix_fmt: str = "yuv420p",
    ticks: list[int] | None = None,
    **options: str,
) -> Path:
    """A video of these pictures; `ticks` are the times of the frames in units of 1/FPS (variable frame rate)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = (i if ticks is None else ticks[i]), Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path: Path, num_frames: int) -> list[int]:
    """The numbers on all frames; the sampling takes each frame once if there are as many as expected."""
    clip = decode_clip(path, TSNSampling(num_frames=num_frames))
    assert clip.num_video_frames == num_frames
    assert clip.frame_index == tuple(range(num_frames))
    return [number_of(frame) for frame in clip.frames]


WRITERS = {
    "h264_b_frames.mp4": ("libx264", {"bf": "3", "g": "12", "b_strategy": "0"}),
    "h264_open_gop.mkv": ("libx264", {"bf": "2", "g": "10", "x264-params": "open-gop=1:b-adapt=0"}),
    "h264_b_frames.ts": ("libx264", {"bf": "2", "g": "12", "b_strategy": "0"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:frame-threads=1:keyint=16:bframes=3"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "10"}),
    "xvid_b_frames.avi": ("mpeg4", {"bf": "2", "g": "15", "qscale": "4", "flags": "qscale"}),
    "mjpeg.avi": ("mjpeg", {"qscale": "4", "flags": "qscale"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_frame_comes_back_in_its_place(tmp_path: Path, name: str) -> None:
    codec, options = WRITERS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / name, codec, pix_fmt=pix_fmt, **options)
    assert decode_all(path, 48) == list(range(48))


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


def test_several_threads_decode_different_files_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.mp4", "libx264", numbers=range(i, i + 20), bf="2") for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda path: decode_all(path, 20), paths))
    assert numbers == [list(range(i, i + 20)) for i in range(6)]


def kind_of(path: Path, **sampling: int) -> str:
    with pytest.raises(VideoError) as caught:
        decode_clip(path, StridedSampling(**sampling))
    error = caught.value
    assert error.kind in KINDS
    assert error.reason and len(error.reason) <= 200 and "\n" not in error.reason
    return error.kind


def test_absent_and_empty_files_and_text_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("<html>404 Not Found</html>\n" * 100)
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert kind_of(tmp_path / "absent.mp4") == "missing"
    assert kind_of(tmp_path) == "missing"
    assert kind_of(tmp_path / "empty.mp4") == "empty"
    assert kind_of(tmp_path / "text.mp4") == "not_video"
    assert kind_of(tmp_path / "random.mp4") == "not_video"


def test_playlist_does_not_open_the_network(tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    assert kind_of(tmp_path / "list.mp4") in ("not_video", "no_video_stream")


def test_sound_without_picture_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert kind_of(tmp_path / "sound.wav") == "no_video_stream"
    assert kind_of(tmp_path / "sound.mp4") == "no_video_stream"


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(".ts")])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_file_cut_anywhere_is_truncated(tmp_path: Path, name: str, share: float) -> None:
    codec, options = WRITERS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = write(tmp_path / name, codec, pix_fmt=pix_fmt, **options).read_bytes()
    assert missing_bytes(tmp_path / name) == 0
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    assert missing_bytes(tmp_path / name) > 0
    # Small windows as well: a file is refused whether or not the frames wanted are before the cut.
    assert kind_of(tmp_path / name, num_frames=1) == "truncated"


def test_cut_video_with_its_index_in_front_is_truncated(tmp_path: Path) -> None:
    """The kind that plays: everything needed to decode the first half is there."""
    with av.open(str(write(tmp_path / "whole.mp4", "libx264", bf="2", g="12"))) as source:
        stream = source.streams.video[0]
        front = tmp_path / "front.mp4"
        with av.open(str(front), "w", options={"movflags": "faststart"}) as target:
            copied = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = copied
                    target.mux(packet)
    data = front.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    front.write_bytes(data[: len(data) - 200])
    assert kind_of(front, num_frames=2, stride_frames=2) == "truncated"


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_noticed_outside_the_window_too(tmp_path: Path, seed: int) -> None:
    """The window is two frames in the middle, the damage is in the last third."""
    path = write(tmp_path / "flipped.mp4", "libx264", bf="2", g="48", crf="10")
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 8
    end = data.index(b"moov")
    rng = np.random.default_rng(seed)
    for at in rng.integers(begin + 2 * (end - begin) // 3, end - 8, 12):
        data[at] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    assert kind_of(path, num_frames=2, stride_frames=1) in ("corrupt_frames", "decode_error", "frame_count")


def test_stream_of_unknown_length_is_not_called_truncated(tmp_path: Path) -> None:
    """A WebM written live has neither a duration nor a length."""
    source, live = (
        write(tmp_path / "vp9.webm", "libvpx-vp9", deadline="realtime", numbers=range(12)),
        tmp_path / "l.webm",
    )
    with av.open(str(source)) as reader, av.open(str(live), "w", options={"live": "1"}) as writer:
        stream = reader.streams.video[0]
        copied = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copied
                writer.mux(packet)
    assert missing_bytes(live) == 0
    assert decode_all(live, 12) == list(range(12))


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(VideoError("truncated", "first line\nsecond")))
    assert (error.kind, error.reason, str(error)) == ("truncated", "first line", "truncated: first line")
    assert len(VideoError("empty", "x" * 500).reason) == 200


def test_versions_name_what_decides_the_pixels() -> None:
    assert set(decoder_versions()) == {"decoder", "av", "libavcodec", "libavformat", "libswscale"}


REAL = {
    "an_v_GGSY1Qvo990.mp4": (355, 320, 240),
    "fw_bbb_180_10s.webm": (300, 320, 180),
    "iio_realshort.mp4": (36, 320, 240),
    "k_demo.mp4": (280, 340, 256),
    "k_flipping_a_pancake.mkv": (310, 426, 240),
    "mm_test.avi": (164, 320, 240),
    "mm_test.mp4": (300, 340, 256),
    "moz_rotation_90.mp4": (1, 60, 100),
    "moz_tiny_av1.mp4": (1, 64, 64),
    "mpy_failing_audio.mp4": (280, 640, 360),
    "mpy_no_duration.webm": (74, 1280, 720),
    "small_webm.webm": (1, 8, 8),
    "tc_h264_10bits.mp4": (30, 200, 200),
    "derived/d_1frame.mp4": (1, 340, 256),
    "derived/d_3frames.mp4": (3, 340, 256),
    "derived/d_copycut_editlist.mp4": (114, 340, 256),
    "derived/d_hevc_openGOP.mp4": (280, 340, 256),
    "derived/d_mpegts.ts": (112, 340, 256),
    "derived/d_odd341x257_444.mp4": (280, 341, 257),
    "derived/d_rot90_340x256.mp4": (58, 256, 340),
    "derived/d_vfr.mp4": (158, 340, 256),
    "derived/d_xvid_bf2.avi": (140, 340, 256),
}
BROKEN = {
    "audio_only.mp4": "no_video_stream",
    "decord_corrupted.mp4": "decode_error",
    "flip_0.01pct_payload.mp4": "corrupt_frames",
    "flip_moov.mp4": "decode_error",
    "header_only.mp4": "truncated",
    "text_file.mp4": "not_video",
    "trunc50.mkv": "truncated",
    "trunc50_faststart.mp4": "truncated",
    "trunc50_nomoov.mp4": "truncated",
    "zero_bytes.mp4": "empty",
    "zero_duration.mp4": "no_frames",
    "zero_frames.mp4": "no_video_stream",
}


@needs_clips
def test_lists_of_shared_clips_are_complete() -> None:
    videos = {p.relative_to(CLIPS).as_posix() for p in CLIPS.rglob("*.*") if p.suffix != ".md"}
    assert videos == set(REAL) | {f"broken/{name}" for name in BROKEN}


@needs_clips
@pytest.mark.parametrize("name", REAL)
def test_real_clip_has_the_frames_it_should(name: str) -> None:
    num_frames, width, height = REAL[name]
    clip = decode_clip(CLIPS / name, StridedSampling(num_frames=2, stride_frames=5))
    assert clip.num_video_frames == num_frames
    assert clip.frames.shape == (2, height, width, 3)


@needs_clips
@pytest.mark.parametrize("name", BROKEN)
def test_broken_clip_is_refused_with_its_kind(name: str) -> None:
    assert kind_of(CLIPS / "broken" / name) == BROKEN[name]
    assert kind_of(CLIPS / "broken" / name, num_frames=1) == BROKEN[name]


@needs_clips
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program, used as an oracle, is not installed")
@pytest.mark.parametrize(
    "name",
    ["iio_realshort.mp4", "mm_test.avi", *(f"derived/d_{n}" for n in ("copycut_editlist.mp4", "rot90_340x256.mp4"))],
)
def test_frames_equal_those_of_the_ffmpeg_program(name: str) -> None:
    num_frames, width, height = REAL[name]
    clip = decode_clip(CLIPS / name, TSNSampling(num_frames=9))
    command = ["ffmpeg", "-v", "error", "-i", str(CLIPS / name), "-fps_mode", "passthrough", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE, check=True).stdout
    truth = np.frombuffer(raw, dtype=np.uint8).reshape(num_frames, height, width, 3)
    difference = np.abs(truth[list(clip.frame_index)].astype(int) - clip.frames)
    assert difference.max() <= 2


def test_all_clips_come_from_one_pass_and_each_is_what_it_is_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", "libx264")
    rules = (
        ClipRule(sampling=StridedSampling(num_frames=3, stride_frames=5), view=2, num_views=3),
        ClipRule(sampling=TSNSampling(num_frames=5)),
        ClipRule(sampling=StridedSampling(num_frames=4, stride_frames=2), seed=7),
    )
    alone = [decode_video(DecodeRequest(path=path, clips=(rule,))).clip(0) for rule in rules]
    passes = []
    original = pyav._decode
    monkeypatch.setattr(pyav, "_decode", lambda *args: passes.append(args) or original(*args))

    video = decode_video(DecodeRequest(path=path, clips=rules))

    assert len(passes) == 1
    assert video.clips == tuple(rule.indices(len(NUMBERS)) for rule in rules)
    assert video.numbers == tuple(sorted(set().union(*video.clips)))
    for number, frames in enumerate(alone):
        np.testing.assert_array_equal(video.clip(number), frames)
        assert [number_of(frame) for frame in frames] == list(video.clips[number])
