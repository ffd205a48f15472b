"""Videos with a number drawn into every frame, so that the RIGHT frame is checked and not just a frame."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vcache.extract.decode import decode_clip, decode_video
from vcache.extract.sampling import ClipRule, StridedSampling, TSNSampling
from vcache.extract.video import KINDS, DecodeRequest, VideoError

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


WRITERS = {
    "h264_b_frames.mp4": ("libx264", {"bf": "3", "g": "12", "b_strategy": "0"}),
    "h264_open_gop.mkv": ("libx264", {"bf": "2", "g": "10", "x264-params": "open-gop=1:b-adapt=0"}),
    "h264_b_frames.ts": ("libx264", {"bf": "2", "g": "12", "b_strategy": "0"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:frame-threads=1:keyint=16:bframes=3"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "10"}),
    "xvid_b_frames.avi": ("mpeg4", {"bf": "2", "g": "15", "qscale": "4", "flags": "qscale"}),
    "mjpeg.avi": ("mjpeg", {"qscale": "4", "flags": "qscale"}),
}


def write_as(path: Path, name: str) -> Path:
    """A video in the manner of WRITERS[name]."""
    codec, options = WRITERS[name]
    return write(path, codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p", **options)


def decode_all(path: Path, num_frames: int, *, decoder: str = "pyav") -> list[int]:
    """The numbers on all frames; the sampling takes each frame once if there are as many as expected."""
    clip = decode_clip(path, TSNSampling(num_frames=num_frames), decoder=decoder)
    assert clip.num_video_frames == num_frames
    assert clip.frame_index == tuple(range(num_frames))
    return [number_of(frame) for frame in clip.frames]


def kind_of(path: Path, **sampling: int) -> str:
    """What is wrong with this video, for a window of these frames."""
    return kind_of_request(DecodeRequest(path=path, clips=(ClipRule(sampling=StridedSampling(**sampling)),)))


def kind_of_request(request: DecodeRequest) -> str:
    """What is wrong with the video of this request, which has to be refused."""
    with pytest.raises(VideoError) as caught:
        decode_video(request)
    error = caught.value
    assert error.kind in KINDS
    assert error.reason and len(error.reason) <= 200 and "\n" not in error.reason
    return error.kind
