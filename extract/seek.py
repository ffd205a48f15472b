"""The frames of a segment without those before it: from the last key frame at or before it, to its end."""

from collections.abc import Iterator

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vcache.extract.packets import PacketTable


class SeekError(Exception):
    """What came out is not exactly what the packets promise. Decoding from the first frame says why."""


def frames_of_segment(
    container: InputContainer, stream: VideoStream, table: PacketTable, segment: range
) -> Iterator[tuple[int, VideoFrame]]:
    """Each frame of the segment with its number in the whole video, in display order; the table must be `seekable`.

    Raises:
        SeekError: a frame is absent, damaged or out of order, or the seek leads elsewhere. Frames may have been given before.
    """
    number_at = {int(table.pts[table.display[number]]): number for number in segment}
    due = segment.start
    try:
        for frame in _decode_run(container, stream, table, segment):
            number = None if frame.pts is None else number_at.get(frame.pts)
            if number is None:
                continue
            if number != due or frame.is_corrupt:
                raise SeekError
            yield number, frame
            due += 1
    except av.FFmpegError as error:
        raise SeekError from error
    if due != segment.stop:
        raise SeekError


def _decode_run(
    container: InputContainer, stream: VideoStream, table: PacketTable, segment: range
) -> Iterator[VideoFrame]:
    """What the packets give that the segment needs, and some frames around it."""
    first, last = table.packets_of(segment)
    container.seek(int(table.pts[first]), stream=stream)
    packets = container.demux(stream)
    # The seek may lead to an earlier key frame, which costs reading but no decoding.
    packet = next((p for p in packets if p.dts is None or p.dts >= table.dts[first]), None)
    if packet is None or packet.pts != table.pts[first]:
        raise SeekError
    yield from packet.decode()
    for _, packet in zip(range(last - first), packets, strict=False):
        yield from packet.decode()
    yield from stream.decode(None)  # what the decoder holds back to bring it into order
