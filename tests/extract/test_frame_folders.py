"""A folder of numbered images is a video: in the order of the numbers, whole, and opened only where it is wanted."""

from pathlib import Path

import numpy as np
import pytest
from numbered_videos import number_of, picture
from PIL import Image

from vcache.extract.decode import decode_clip, decode_video, decoder_of, decoder_versions
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import DecodedVideo, DecodeRequest, Segment, VideoError


def write_frames(folder: Path, numbers: range, name: str = "img_{:05d}.jpg", first: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for i, number in enumerate(numbers, first):
        Image.fromarray(picture(number)).save(folder / name.format(i), quality=90)
    return folder


def decode(
    folder: Path, num_frames: int, *, allow_partial: bool = False, segment: Segment | None = None
) -> DecodedVideo:
    rule = ClipRule(sampling=StridedSampling(num_frames=num_frames, stride_frames=1))
    return decode_video(DecodeRequest(path=folder, clips=(rule,), allow_partial=allow_partial, segment=segment))


def refusal(folder: Path, num_frames: int = 12, segment: Segment | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        decode(folder, num_frames, segment=segment)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, first",
    [("img_{:05d}.jpg", 1), ("frame_{:010d}.jpg", 0), ("image_{}.JPEG", 7), ("{:03d}.png", 1), ("v1_{}.jpg", 95)],
)
def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path, name: str, first: int) -> None:
    """Also where the names have no leading zeros: 100 follows 99 and not 10."""
    video = decode(write_frames(tmp_path / "v", range(20, 32), name, first), 12)
    assert [number_of(frame) for frame in video.frames] == list(range(20, 32))
    assert (video.num_video_frames, video.fps, video.damage) == (12, None, None)
    assert video.frames.flags.c_contiguous


def test_colours_are_those_of_the_file(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", range(3), "{}.png")
    np.testing.assert_array_equal(decode_clip(tmp_path / "v", TSNSampling(num_frames=3)).frames[2], picture(2))
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "v" / "1.png")  # grey becomes RGB
    assert decode(tmp_path / "v", 3).frames.shape[-1] == 3


def test_a_folder_is_read_by_images_whatever_decoder_is_asked_for(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", range(4))
    assert decoder_of(folder, "decord") == "images" and decoder_of(tmp_path / "v.mp4", "decord") == "decord"
    video = decode_video(
        DecodeRequest(path=folder, clips=(ClipRule(sampling=TSNSampling(num_frames=4)),), decoder="decord")
    )
    assert [number_of(frame) for frame in video.frames] == [0, 1, 2, 3]
    assert set(decoder_versions("images")) == {"decoder", "pillow", "libjpeg"}


def test_only_wanted_images_are_opened(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", range(12))
    for number in (1, 2, 11, 12):
        (folder / f"img_{number:05d}.jpg").write_bytes(b"no image")
    assert [number_of(frame) for frame in decode(folder, 4).frames] == [4, 5, 6, 7]


def test_flow_and_other_files_beside_the_frames_are_left_alone(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", range(6))
    write_frames(folder, range(100, 106), "flow_x_{:05d}.jpg")
    (folder / "audio.wav").touch()
    assert [number_of(frame) for frame in decode(folder, 6).frames] == list(range(6))


def test_segment_of_frames_is_a_slice(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", range(12))
    video = decode(folder, 3, segment=Segment(4, 9, "frames"))
    assert [number_of(frame) for frame in video.frames] == list(video.numbers) == [5, 6, 7]
    assert (video.first_frame, video.num_video_frames) == (4, 12)


def test_what_is_wrong_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "no_frames: the folder holds no numbered images, as img_00001.jpg"

    gap = write_frames(tmp_path / "gap", range(12))
    (gap / "img_00005.jpg").unlink()
    assert refusal(gap) == "frame_count: frame 5 is missing: there are 11 frames from 1 to 12"

    short = write_frames(tmp_path / "short", range(9))
    listed = Segment(0, 12, "frames")
    assert refusal(short, segment=listed) == "frame_count: the segment ends at frame 12, and the video has 9 frames"
    assert "no times" in refusal(short, segment=Segment(0, 1, "seconds"))

    twice = write_frames(write_frames(tmp_path / "twice", range(3)), range(3), "img_{}.png")
    assert refusal(twice) == "frame_count: frame 1 is there twice"

    several = write_frames(write_frames(tmp_path / "several", range(3), "a{}.jpg"), range(3), "b{}.jpg")
    assert refusal(several) == "not_video: the folder holds images of 2 names: a*, b*"

    sizes = write_frames(tmp_path / "sizes", range(3))
    Image.fromarray(picture(1, width=150)).save(sizes / "img_00002.jpg")
    assert refusal(sizes) == "decode_error: the frames differ in size: 72x128 and 72x150"

    with pytest.raises(VideoError, match="not_video: decoder 'images' reads folders"):
        decode_clip(sizes / "img_00001.jpg", TSNSampling(), decoder="images")
    with pytest.raises(VideoError, match="missing: the folder cannot be read"):
        decode_clip(tmp_path / "absent", TSNSampling(), decoder="images")


@pytest.mark.parametrize(
    "content, told",
    [
        (lambda data: data[: len(data) * 9 // 10], "truncated: img_00004.jpg: image file is truncated"),
        (lambda data: data[: len(data) // 3], "truncated: img_00004.jpg: Truncated File Read"),
        (lambda data: b"", "truncated: img_00004.jpg has no bytes"),
        (lambda data: b"<html>" + data[:50], "decode_error: img_00004.jpg is no image that Pillow knows"),
    ],
)
def test_image_that_cannot_be_read_is_named_or_left_out(tmp_path: Path, content, told: str) -> None:
    folder = write_frames(tmp_path / "v", range(12))
    (folder / "img_00004.jpg").write_bytes(content((folder / "img_00004.jpg").read_bytes()))
    assert refusal(folder).startswith(told)

    video = decode(folder, 11, allow_partial=True)
    assert [number_of(frame) for frame in video.frames] == [i for i in range(12) if i != 3]
    assert video.num_video_frames == 11
    assert video.damage is not None and str(video.damage).startswith(told)


def test_gap_is_closed_where_parts_are_allowed_and_no_image_at_all_is_refused(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", range(5))
    (folder / "img_00002.jpg").unlink()
    video = decode(folder, 4, allow_partial=True)
    assert [number_of(frame) for frame in video.frames] == [0, 2, 3, 4]
    assert video.damage is not None and video.damage.kind == "frame_count"
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(VideoError, match="frame_count: frame 2 is missing"):
        decode(folder, 4, allow_partial=True)


@pytest.mark.parametrize("lost", ["gap", "unreadable"])
def test_a_damaged_folder_gives_what_is_left_of_the_frames_that_are_listed(tmp_path: Path, lost: str) -> None:
    folder, listed = write_frames(tmp_path / "v", range(7)), Segment(0, 7, "frames")
    if lost == "gap":
        (folder / "img_00003.jpg").unlink()
    else:
        (folder / "img_00003.jpg").write_bytes(b"")
    refusal(folder, segment=listed)
    video = decode(folder, 6, allow_partial=True, segment=listed)
    assert [number_of(frame) for frame in video.frames] == [0, 1, 3, 4, 5, 6]
    assert video.damage is not None


def test_image_that_claims_to_be_enormous_is_a_broken_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_frames(tmp_path / "v", range(3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 72 * 128 // 2 - 1)  # twice that is an error to Pillow
    assert refusal(folder).startswith("decode_error: img_00001.jpg: Image size (9216 pixels) exceeds limit")
