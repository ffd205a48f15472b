"""torchcodec, in its exact mode on the CPU: right on MP4, MOV, Matroska and WebM, refused on the rest.

It is off by one or two frames in AVI with B-frames, and its approximate mode is wrong on variable frame rates. It needs
FFmpeg's shared libraries on the machine, and a torch that fits. Colours are those of the ffmpeg program, also at 10 bits.
"""

from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
from jaxtyping import UInt8

from vcache.extract.decoders import DecoderError
from vcache.extract.packets import PacketTable
from vcache.extract.surveyed import SurveyedDecoder

_MIN_VERSION = (0, 11)  # applies rotation


class TorchcodecDecoder(SurveyedDecoder):
    """torchcodec's VideoDecoder with one thread."""

    name: ClassVar[str] = "torchcodec"

    def check_available(self) -> None:
        """Load torchcodec and with it torch and FFmpeg."""
        try:
            import torchcodec
            from torchcodec.decoders import VideoDecoder  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            told = str(error).strip().partition("\n")[0][:200]
            raise DecoderError(
                f"decoder 'torchcodec' cannot be loaded ({told}); install it with:  pip install torchcodec   "
                "and FFmpeg's shared libraries with your system's package manager"
            ) from error
        if tuple(int(part) for part in torchcodec.__version__.split(".")[:2]) < _MIN_VERSION:
            raise DecoderError(
                f"torchcodec {torchcodec.__version__} does not apply the rotation of a video, 0.11 does; "
                "update it with:  pip install -U torchcodec"
            )
        if getattr(torchcodec, "ffmpeg_major_version", 0) is None:  # told since 0.16, which imports without FFmpeg
            raise DecoderError(
                "torchcodec is installed and finds no FFmpeg; install FFmpeg's shared libraries (4 to 8) "
                "with your system's package manager, as in  apt-get install ffmpeg"
            )

    def versions(self) -> dict[str, str]:
        """torchcodec, the FFmpeg libraries that it found, and PyAV, which counts the frames."""
        import torchcodec
        from torchcodec._core import get_ffmpeg_library_versions

        libraries = get_ffmpeg_library_versions()
        found = {
            name: ".".join(map(str, libraries[name])) for name in ("libavcodec", "libavformat") if name in libraries
        }
        return {"decoder": "torchcodec", "torchcodec": torchcodec.__version__, **found, "av": av.__version__}

    def refusal(self, table: PacketTable) -> str | None:
        """Every container but the MP4 and Matroska families."""
        known = {"mov", "mp4", "matroska", "webm"} & table.format_names
        return None if known else f"some videos in {'/'.join(sorted(table.format_names))}"

    def open(self, path: Path) -> Any:
        """torchcodec's reader, which scans the file."""
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", seek_mode="exact")

    def read(self, reader: Any, numbers: list[int]) -> UInt8[np.ndarray, "F H W 3"]:
        """Rotation is applied by torchcodec."""
        return reader.get_frames_at(indices=numbers).data.numpy()


decoder = TorchcodecDecoder()
