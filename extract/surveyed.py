"""Decoders that tell neither damage nor the true frame count: PyAV looks first, and the library reads the frames.

The same files are refused as with PyAV, and those besides that the library is known to read wrong. It costs about twice the
time: everything is decoded by both. These decoders are there to reproduce features that were made with them.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from vcache.extract.decoders import Decoder
from vcache.extract.packets import PacketTable
from vcache.extract.survey import Survey, survey_video
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError


class SurveyedDecoder(Decoder):
    """A library that opens a video, counts its frames and reads some of them, right or wrong."""

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, table: PacketTable) -> str | None:
        """What this library is known to read wrong in such a video, as the end of "NAME gives wrong frames for ..."."""

    @abstractmethod
    def open(self, path: Path) -> Any:
        """The library's reader of this file, for one thread."""

    @abstractmethod
    def read(self, reader: Any, numbers: list[int]) -> UInt8[np.ndarray, "F H W 3"]:
        """These frames as RGB, ascending, upright."""

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        """Survey the video with PyAV, then read the wanted frames."""
        survey = survey_video(request, convert=None)
        if reason := self.refusal(survey.table):
            raise self._refused("decode_error", f"{self.name} gives wrong frames for {reason}")
        try:
            return survey.answer(self._read(request.path, survey))
        except VideoError:
            raise
        except Exception as error:
            raise self._refused("decode_error", f"{self.name} says {_first_line(error)}") from error

    def _read(self, path: Path, survey: Survey) -> UInt8[np.ndarray, "F H W 3"]:
        reader = self.open(path)
        if (count := len(reader)) != survey.num_video_frames:
            told = f"{self.name} counts {count} frames, and the video shows {survey.num_video_frames}"
            raise self._refused("frame_count", told)
        frames = np.ascontiguousarray(self.read(reader, list(survey.numbers)))
        if frames.shape[1:3] != survey.size:
            sizes = " and ".join(f"{height}x{width}" for height, width in (frames.shape[1:3], survey.size))
            raise self._refused(
                "decode_error", f"{self.name} and PyAV do not agree on the size of the picture: {sizes}"
            )
        return frames

    @staticmethod
    def _refused(kind: str, reason: str) -> VideoError:
        return VideoError(kind, f"{reason}; use --decoder pyav")


def _first_line(error: Exception) -> str:
    # Short, for what to do comes after it; decord's messages go on with a stack trace and bytes of the file.
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
