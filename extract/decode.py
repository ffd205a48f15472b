"""Path + clips -> uint8 frames, or a VideoError that says why not: the door to the decoders."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vcache.extract.decoders import get_decoder
from vcache.extract.sampling import ClipRule, Sampling
from vcache.extract.video import DecodedVideo, DecodeRequest


@dataclass(frozen=True)
class DecodedClip:
    """The frames of one clip, upright."""

    frames: UInt8[np.ndarray, "T H W 3"]
    """RGB, C-contiguous, rotation applied; pixel aspect ratio is ignored, as is usual for Kinetics."""
    frame_index: tuple[int, ...]
    """The index of each frame in display order, 0-based."""
    num_video_frames: int
    """Frames that the whole video shows; those hidden by an edit list are not counted."""
    fps: float | None
    """Frames per second on average by the header; None if it does not say."""


def decode_video(request: DecodeRequest) -> DecodedVideo:
    """Decode the frames of all clips with the decoder of the request. One thread; safe in several threads at once.

    Raises:
        VideoError: what is wrong with the video, and nothing else, whatever the file.
        DecoderError: there is no such decoder, or it is not installed.
    """
    return get_decoder(decoder_of(request.path, request.decoder)).decode(request)


def decoder_of(path: Path, name: str = "pyav") -> str:
    """Which decoder reads this path, if `name` is the one for videos: a folder is one of frames, and read by "images"."""
    return "images" if path.is_dir() else name


def decode_clip(path: Path, sampling: Sampling, *, decoder: str = "pyav") -> DecodedClip:
    """The one clip that the evaluation rule of `sampling` picks; `decode_video` says more."""
    video = decode_video(DecodeRequest(path=path, clips=(ClipRule(sampling=sampling),), decoder=decoder))
    return DecodedClip(video.clip(0), video.clips[0], video.num_video_frames, video.fps)


def decoder_versions(name: str = "pyav") -> dict[str, str]:
    """The decoder and the libraries that decide the pixels. They are part of a cache's key.

    Raises:
        DecoderError: there is no such decoder, or it is not installed.
    """
    return get_decoder(name).versions()
