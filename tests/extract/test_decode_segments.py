"""A segment gives what slicing the whole video gives, and only what it needs is decoded."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_videos import (
    FPS,
    WRITERS,
    cut_by_edit_list,
    kind_of_request,
    number_of,
    write,
    write_as,
    write_with_empty_frames,
)

from vcache.extract import survey
from vcache.extract.decode import decode_video
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodedVideo, DecodeRequest, Segment, VideoError

SEEKABLE = ("h264_b_frames.mp4", "h264_open_gop.mkv", "hevc.mp4", "vp9.webm", "edit_list.mp4", "vfr.mp4")
ALL = (*WRITERS, "edit_list.mp4", "vfr.mp4", "empty_frames.mp4")
EVERY = ClipRule(sampling=StridedSampling(num_frames=48, stride_frames=1))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = {name: write_as(folder / name, name) for name in WRITERS}
    paths["edit_list.mp4"] = cut_by_edit_list(folder / "edit_list.mp4", first=17)
    paths["empty_frames.mp4"] = write_with_empty_frames(folder / "empty_frames.mp4")
    ticks = [i * 3 - i % 3 for i in range(48)]
    paths["vfr.mp4"] = write(folder / "vfr.mp4", "libx264", ticks=ticks, bf="2", g="9")
    return paths


@pytest.fixture(scope="module")
def whole(videos: dict[str, Path]) -> dict[str, DecodedVideo]:
    return {name: decode_video(DecodeRequest(path=path, clips=(EVERY,))) for name, path in videos.items()}


def test_the_cut_hides_frames_at_its_beginning(whole: dict[str, DecodedVideo]) -> None:
    assert [number_of(frame) for frame in whole["edit_list.mp4"].clip(0)[:31]] == list(range(17, 48))
    assert whole["edit_list.mp4"].num_video_frames == 31


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_segment_is_a_slice_of_the_whole(
    videos: dict[str, Path], whole: dict[str, DecodedVideo], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(ALL))
    full = whole[name]
    start = data.draw(st.integers(0, full.num_video_frames - 1))
    stop = data.draw(st.integers(start + 1, full.num_video_frames))
    rules = (
        ClipRule(sampling=TSNSampling(num_frames=3)),
        ClipRule(sampling=StridedSampling(num_frames=4, stride_frames=3)),
    )

    part = decode_video(DecodeRequest(path=videos[name], clips=rules, segment=Segment(start, stop, "frames")))

    assert (part.first_frame, part.num_video_frames) == (start, full.num_video_frames)
    assert part.clips == tuple(tuple(start + i for i in rule.indices(stop - start)) for rule in rules)
    np.testing.assert_array_equal(part.frames, full.frames[list(part.numbers)])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_seconds_are_display_times(
    videos: dict[str, Path], whole: dict[str, DecodedVideo], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(ALL))
    num_frames = whole[name].num_video_frames
    ticks = {"vfr.mp4": lambda i: i * 3 - i % 3, "empty_frames.mp4": lambda i: i + (i + 3) // 6}.get(name, int)
    times = [Fraction(ticks(i), FPS) for i in range(num_frames)]
    start = data.draw(st.fractions(0, times[-1], max_denominator=97))
    stop = start + data.draw(st.fractions(Fraction(1, 97), 2, max_denominator=97))
    inside = [i for i, time in enumerate(times) if start <= time < stop] or [
        next(i for i, time in enumerate(times) if time >= start)
    ]
    if any(0 < abs(time - edge) < Fraction(1, 500) for time in times for edge in (start, stop)):
        return  # a Matroska file keeps milliseconds

    part = decode_video(
        DecodeRequest(path=videos[name], clips=(EVERY,), segment=Segment(float(start), float(stop), "seconds"))
    )

    assert part.numbers == tuple(inside)


@pytest.mark.parametrize("name", SEEKABLE)
def test_only_the_segment_is_decoded_where_there_is_an_index(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing falls back to decoding from the first frame: not the property above, which would hold as well."""
    monkeypatch.setattr(survey, "_survey_whole", lambda *args: pytest.fail("decoded from the first frame"))
    for start in range(0, 28, 3):
        request = DecodeRequest(path=videos[name], clips=(EVERY,), segment=Segment(start, start + 3, "frames"))
        assert decode_video(request).numbers == (start, start + 1, start + 2)


def test_frames_before_the_key_frame_and_after_the_segment_are_left_alone(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    original = survey.frames_of_segment

    def counted(container, stream, table, segment) -> Iterator:
        first, last = table.packets_of(segment)
        given.append(last - first + 1)
        return original(container, stream, table, segment)

    monkeypatch.setattr(survey, "frames_of_segment", counted)
    decode_video(DecodeRequest(path=videos["h264_b_frames.mp4"], clips=(EVERY,), segment=Segment(38, 41, "frames")))
    assert given[0] <= 9  # the key frame is 36, and up to three B-frames wait for the next P-frame


def test_packets_are_read_once_for_all_segments_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(tmp_path / "a.mp4", "h264_b_frames.mp4")
    reads = []
    original = survey.read_table
    monkeypatch.setattr("vcache.extract.packets.read_table", lambda *args: reads.append(args) or original(*args))
    for start in (30, 4, 30):
        decode_video(DecodeRequest(path=path, clips=(EVERY,), segment=Segment(start, start + 2, "frames")))
    assert len(reads) == 1
    write(path, "libx264", numbers=range(20, 33), bf="2")  # another file under the same name
    video = decode_video(DecodeRequest(path=path, clips=(EVERY,), segment=Segment(2, 4, "frames")))
    assert [number_of(frame) for frame in video.frames] == [22, 23]
    assert len(reads) == 2


@pytest.mark.parametrize("name", ("h264_b_frames.mp4", "xvid_b_frames.avi"))
@pytest.mark.parametrize(
    "segment, reason",
    [
        (Segment(40, 49, "frames"), "the segment ends at frame 49, and the video has 48 frames"),
        (Segment(7.5, 9, "seconds"), "the segment begins at 7.500 s, and the last of 48 frames ends at 2.400 s"),
    ],
)
def test_segment_beyond_the_end_is_refused(videos: dict[str, Path], name: str, segment: Segment, reason: str) -> None:
    with pytest.raises(VideoError) as caught:
        decode_video(DecodeRequest(path=videos[name], clips=(EVERY,), segment=segment))
    assert (caught.value.kind, caught.value.reason) == ("frame_count", reason)


def test_segment_in_seconds_may_end_after_the_video(videos: dict[str, Path]) -> None:
    for start, numbers in ((2.0, tuple(range(40, 48))), (2.38, (47,))):
        request = DecodeRequest(path=videos["h264_b_frames.mp4"], clips=(EVERY,), segment=Segment(start, 60, "seconds"))
        assert decode_video(request).numbers == numbers


def test_key_frames_that_are_none_are_seen_through(tmp_path: Path) -> None:
    """x264's intra refresh marks frames as key frames from which the picture only builds up."""
    options = {"g": "8", "bf": "0", "x264-params": "intra-refresh=1"}
    path = write(tmp_path / "refresh.mp4", "libx264", **options)
    full = decode_video(DecodeRequest(path=path, clips=(EVERY,)))
    for start in range(0, 44, 5):
        part = decode_video(DecodeRequest(path=path, clips=(EVERY,), segment=Segment(start, start + 4, "frames")))
        np.testing.assert_array_equal(part.frames, full.frames[list(part.numbers)])


def test_damage_outside_the_segment_is_not_looked_for_and_damage_inside_is(tmp_path: Path) -> None:
    path = write(tmp_path / "flipped.mp4", "libx264", bf="0", g="12", crf="10")
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + 8, data.index(b"moov")
    for at in np.random.default_rng(1).integers(end - (end - begin) // 6, end - 8, 12):
        data[at] ^= 0x55
    path.write_bytes(data)
    early = DecodeRequest(path=path, clips=(EVERY,), segment=Segment(3, 20, "frames"))
    assert [number_of(frame) for frame in decode_video(early).frames] == list(range(3, 20))
    late = DecodeRequest(path=path, clips=(EVERY,), segment=Segment(40, 48, "frames"))
    assert kind_of_request(late) in ("corrupt_frames", "decode_error", "frame_count")


def test_no_segment_of_a_cut_file_is_served_unless_parts_are_allowed(tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.mkv", "h264_open_gop.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for allow_partial, start, served in ((False, 2, False), (True, 2, True), (True, 44, False)):
        request = DecodeRequest(
            path=path, clips=(EVERY,), segment=Segment(start, start + 3, "frames"), allow_partial=allow_partial
        )
        if served:
            video = decode_video(request)
            assert [number_of(frame) for frame in video.frames] == [start, start + 1, start + 2]
            assert video.damage is not None and video.damage.kind == "truncated"
        else:
            assert kind_of_request(request) == "truncated"
