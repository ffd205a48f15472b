"""PyAV, the default decoder: FFmpeg, whose wheel brings it along.

In display order from the first frame: of eight ways to read a video it is the one that gave the right frame on every clip
tried (edit lists, open GOPs, B-frames in AVI, variable frame rates). `survey.py` says what is decoded and what is refused.
"""

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from vcache.extract.decoders import Decoder
from vcache.extract.survey import quarter_turns_left, survey_video
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError


class PyAVDecoder(Decoder):
    """Every frame in display order, or a VideoError that says why not."""

    def check_available(self) -> None:
        """Nothing to do: PyAV is a dependency of the package, and imported above."""

    def versions(self) -> dict[str, str]:
        """PyAV and the FFmpeg libraries in it."""
        libraries = {
            name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libavformat", "libswscale")
        }
        return {"decoder": "pyav", "av": av.__version__, **libraries}

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        """Decode the frames of all clips in one pass."""
        survey = survey_video(request, convert=_Upright())
        return survey.answer(_stack(survey.frames, survey.numbers))


decoder = PyAVDecoder()


class _Upright:
    """A frame as RGB with its rotation applied."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        # threads=1: swscale would otherwise start one thread per core for every video that is being decoded.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.rot90(rgb, k=quarter_turns_left(frame))


def _stack(frames: dict[int, np.ndarray], wanted: tuple[int, ...]) -> UInt8[np.ndarray, "F H W 3"]:
    if len(sizes := {frame.shape for frame in frames.values()}) > 1:
        raise VideoError("decode_error", f"the picture changes its size within the video: {sorted(sizes)}")
    # A turned frame is a view in Fortran order, which np.stack would keep.
    return np.ascontiguousarray(np.stack([frames[i] for i in wanted]))
