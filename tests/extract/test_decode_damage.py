"""Damaged files are refused with their kind, or taken for what is left of them where that was asked for."""

import itertools
import pickle
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numbered_videos import WRITERS, decode_all, kind_of, number_of, write, write_as

from vcache.extract import survey
from vcache.extract.containers import missing_bytes
from vcache.extract.decode import decode_video
from vcache.extract.sampling import ClipRule, StridedSampling
from vcache.extract.video import KINDS, DecodedVideo, DecodeRequest, Segment, VideoError


def test_absent_and_empty_files_and_text_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("<html>404 Not Found</html>\n" * 100)
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert kind_of(tmp_path / "absent.mp4") == "missing"
    assert kind_of(tmp_path) == "no_frames"
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
    data = write_as(tmp_path / name, name).read_bytes()
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


def flip_bits(path: Path, seed: int = 0) -> Path:
    """Twelve bits in the last third of the pictures of an MP4."""
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 8
    end = data.index(b"moov")
    rng = np.random.default_rng(seed)
    for at in rng.integers(begin + 2 * (end - begin) // 3, end - 8, 12):
        data[at] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_noticed_outside_the_window_too(tmp_path: Path, seed: int) -> None:
    """The window is two frames in the middle, the damage is in the last third."""
    path = flip_bits(write(tmp_path / "flipped.mp4", "libx264", bf="2", g="48", crf="10"), seed)
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


def partial(path: Path, *, num_frames: int = 200) -> DecodedVideo:
    """Every frame that is left, each once as far as there are as many."""
    rule = ClipRule(sampling=StridedSampling(num_frames=num_frames, stride_frames=1))
    return decode_video(DecodeRequest(path=path, clips=(rule,), allow_partial=True))


@pytest.mark.parametrize("name", ["h264_open_gop.mkv", "vp9.webm", "mjpeg.avi", "xvid_b_frames.avi"])
@pytest.mark.parametrize("share", [0.75, 0.97])
def test_what_is_left_of_a_cut_file_is_used_on_request(tmp_path: Path, name: str, share: float) -> None:
    data = write_as(tmp_path / name, name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])

    video = partial(tmp_path / name)

    assert video.damage is not None and video.damage.kind == "truncated"
    numbers = [number_of(frame) for frame in video.frames]
    # The last one may be torn; B-frames that were to come before it are lacking.
    assert numbers[: len(numbers) - 4] == list(range(48))[: len(numbers) - 4]
    assert 8 < len(numbers) == video.num_video_frames < 48 or share == 0.97


def test_damage_is_told_with_the_frames_and_survives_pickling(tmp_path: Path) -> None:
    """The answer crosses from a decode process to its parent."""
    path = flip_bits(write(tmp_path / "flipped.mp4", "libx264", bf="2", g="48", crf="10"))
    kind = kind_of(path)
    video = pickle.loads(pickle.dumps(partial(path)))
    assert video.damage.kind == kind and kind in ("corrupt_frames", "decode_error")
    assert [number_of(frame) for frame in video.frames[:16]] == list(range(16))
    assert video.frames.flags.c_contiguous


def test_packets_that_cannot_be_decoded_are_skipped(tmp_path: Path) -> None:
    """Each picture of a motion JPEG stands alone: all but the damaged one come back."""
    path = write_as(tmp_path / "a.avi", "mjpeg.avi")
    data = bytearray(path.read_bytes())
    at = [i for i in range(len(data) - 1) if data[i : i + 3] == b"\xff\xd8\xff"][20]
    data[at : at + 500] = bytes(500)
    path.write_bytes(data)
    assert kind_of(path) == "decode_error"
    video = partial(path)
    assert video.damage is not None and video.damage.kind == "decode_error"
    assert video.num_video_frames == 47
    assert [number_of(frame) for frame in video.frames[:47]] == [i for i in range(48) if i != 20]


def test_a_sound_video_is_the_same_whether_parts_are_allowed_or_not(tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.mp4", "h264_b_frames.mp4")
    video = partial(path, num_frames=48)
    assert video.damage is None
    assert [number_of(frame) for frame in video.frames] == list(range(48))


def test_a_file_without_a_frame_is_refused_even_so(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("<html>404 Not Found</html>\n" * 100)
    data = write_as(tmp_path / "a.mkv", "h264_open_gop.mkv").read_bytes()
    (tmp_path / "header.mkv").write_bytes(data[: data.index(bytes.fromhex("1f43b675"))])  # up to the first cluster
    kinds = {"absent.mp4": "missing", "empty.mp4": "empty", "text.mp4": "not_video", "header.mkv": "truncated"}
    for name, kind in kinds.items():
        with pytest.raises(VideoError) as caught:
            partial(tmp_path / name)
        assert caught.value.kind == kind


def test_a_count_that_nothing_explains_is_refused_even_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(tmp_path / "a.mp4", "h264_b_frames.mp4")
    original = survey._frames
    monkeypatch.setattr(survey, "_frames", lambda *args: itertools.islice(original(*args), 20))
    with pytest.raises(VideoError, match="frame_count: 48 packets gave 20 frames"):
        partial(path)


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    return {name: write_as(folder / name, name).read_bytes() for name in WRITERS}


def spoil(content: bytes, seed: int) -> bytes:
    """Up to six places overwritten, cut out or cut off."""
    rng, spoilt = np.random.default_rng(seed), bytearray(content)
    for _ in range(rng.integers(1, 7)):
        at, length = int(rng.integers(len(spoilt))), int(rng.choice((1, 1, 4, 60, 2000)))
        kind = rng.choice(("overwrite", "overwrite", "cut out", "cut off"))
        if kind == "overwrite":
            spoilt[at : at + length] = rng.bytes(length)
        elif kind == "cut out":
            del spoilt[at : at + length]
        else:
            del spoilt[at + 1 :]
        spoilt = spoilt or bytearray(b"x")
    return bytes(spoilt)


SEGMENTS = (None, Segment(9, 30, "frames"), Segment(0.4, 1.7, "seconds"))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(tuple(WRITERS)),
    seed=st.integers(0, 2**32),
    segment=st.sampled_from(SEGMENTS),
    allow_partial=st.booleans(),
)
def test_any_damage_is_an_answer_or_a_video_error(
    tmp_path: Path, sound_files: dict[str, bytes], name: str, seed: int, segment: Segment | None, allow_partial: bool
) -> None:
    """In the header too: no other exception, and what comes is what was asked for."""
    path = tmp_path / name
    path.write_bytes(spoil(sound_files[name], seed))
    rule = ClipRule(sampling=StridedSampling(num_frames=5, stride_frames=3))
    request = DecodeRequest(path=path, clips=(rule,), allow_partial=allow_partial, segment=segment)
    try:
        video = decode_video(request)
    except VideoError as error:
        assert error.kind in KINDS and error.reason
    else:
        assert video.frames.shape[0] == len(video.numbers) and max(video.numbers) < video.num_video_frames
        assert request.allow_partial or video.damage is None
