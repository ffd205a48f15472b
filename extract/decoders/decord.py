"""decord 0.6 (2021), to reproduce what was made with it: not faster than PyAV, and wrong on more kinds of video.

Its frames are silently others after a seek in a video with an edit list (as a cut without decoding leaves it), in open groups
of pictures, in MPEG-TS, and in AVI with B-frames: those are refused. It knows no AV1.
"""

from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
from jaxtyping import UInt8

from vcache.extract.decoders import DecoderError
from vcache.extract.packets import PacketTable
from vcache.extract.surveyed import SurveyedDecoder


class DecordDecoder(SurveyedDecoder):
    """decord's VideoReader with one thread."""

    name: ClassVar[str] = "decord"

    def check_available(self) -> None:
        """Load decord, after PyAV: its symbols are global, and PyAV's codecs would call its older ones."""
        try:
            import decord
        except (ImportError, OSError, RuntimeError) as error:
            raise DecoderError(
                f"decoder 'decord' cannot be loaded ({error}); install it with:  pip install decord"
            ) from error
        decord.logging.set_level(decord.logging.QUIET)

    def versions(self) -> dict[str, str]:
        """decord, which brings its FFmpeg along, and PyAV, which counts the frames."""
        import decord

        return {"decoder": "decord", "decord": decord.__version__, "av": av.__version__}

    def refusal(self, table: PacketTable) -> str | None:
        """Edit lists, open groups of pictures, MPEG-TS and AVI."""
        if names := {"mpegts": "MPEG-TS", "avi": "AVI"}.keys() & table.format_names:
            return {"mpegts": "MPEG-TS", "avi": "AVI"}[names.pop()]
        if not table.shown.all():
            return "edit lists"
        return "open groups of pictures" if table.has_open_groups else None

    def open(self, path: Path) -> Any:
        """decord's reader, on the CPU."""
        import decord

        return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)

    def read(self, reader: Any, numbers: list[int]) -> UInt8[np.ndarray, "F H W 3"]:
        """Rotation is applied by decord."""
        return reader.get_batch(numbers).asnumpy()


decoder = DecordDecoder()
