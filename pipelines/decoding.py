"""Where videos are decoded: in processes of their own, so that a video that hangs or crashes costs itself and nothing else."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from vcache.extract.decode import decode_video
from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.extract.workers import DecodePool

Decode = Callable[[DecodeRequest], DecodedVideo]
"""Raises VideoError if the video cannot be used. Called by several threads at once."""


@runtime_checkable
class Decoder(Protocol):
    """What decodes several videos at the same time."""

    def decode(self, request: DecodeRequest) -> DecodedVideo: ...

    def close(self) -> None:
        """End what is being decoded: `decode` then raises in the threads that wait for it. Again is no change."""
        ...


def new_decoder(num_workers: int, name: str = "pyav") -> Decoder:
    """A decoder of up to `num_workers` videos at a time. Its processes end when it is closed or forgotten."""
    return DecodePool(num_workers, decoder=name)


def decode_here(request: DecodeRequest) -> DecodedVideo:
    """`decode_video` in the calling thread."""
    return decode_video(request)
