"""Where videos are decoded: in the calling thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vcache.extract.decode import decode_video
from vcache.extract.video import DecodedVideo, DecodeRequest

Decode = Callable[[DecodeRequest], DecodedVideo]
"""Raises VideoError if the video cannot be used. Called by several threads at once."""


@contextmanager
def open_decoder(num_workers: int) -> Iterator[Decode]:
    """What decodes up to `num_workers` videos at the same time, one in each thread that calls it."""
    yield decode_here


def decode_here(request: DecodeRequest) -> DecodedVideo:
    """`decode_video`, looked up at every call."""
    return decode_video(request)
