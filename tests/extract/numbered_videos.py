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
    "h264_open_gop.mkv": ("libx264", {"bf": "2", "g": "12", "x264-params": "open-gop=1:b-adapt=0"}),
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


def write_with_empty_frames(path: Path) -> Path:
    """XviD writes a frame without change as an empty one: after every sixth of these 48 there is a packet that shows nothing."""
    empty_frame = bytes.fromhex("000001b6504f")  # MPEG-4 part 2: a P picture with vop_coded = 0, at 20 ticks a second
    plain = write(path.with_name(f"plain-{path.name}"), "mpeg4", g="15")
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
    return path


def cut_by_edit_list(path: Path, *, first: int) -> Path:
    """A stream-copied cut: the packets back to a key frame are kept and hidden, and headers still count them."""
    whole = write(path.with_name(f"whole-{path.name}"), "libx264", bf="2", g="12", b_strategy="0")
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        shift = int(first / FPS / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
                target.mux(packet)
    return path


def turn(path: Path, quarter_turns_left: int) -> Path:
    """Write the rotation into the header of an MP4.

    x' = a x + c y, y' = b x + d y with y downwards: (0, 1, -1, 0) turns the picture to the right.
    """
    matrix = {0: (1, 0, 0, 1), 1: (0, -1, 1, 0), 2: (-1, 0, 0, -1), 3: (0, 1, -1, 0)}[quarter_turns_left]
    one = 0x10000
    a, b, c, d = ((value * one).to_bytes(4, "big", signed=True) for value in matrix)
    zero, perspective = bytes(4), (1 << 30).to_bytes(4, "big")
    upright = one.to_bytes(4, "big") + zero * 3 + one.to_bytes(4, "big") + zero * 3 + perspective
    data = path.read_bytes()
    at = data.index(upright, data.index(b"tkhd"))  # the first such matrix is that of the whole movie
    path.write_bytes(data[:at] + a + b + zero + c + d + zero * 3 + perspective + data[at + 36 :])
    return path


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
