"""What a video holds, found by decoding it: the frames that are wanted, their count, and every damage that shows.

The packets are read first, which costs about 3% of decoding and gives the frame count that headers get wrong, and then
decoded, all of them.

Strict: a file with damage that shows is refused, with a kind and a reason. Therefore every frame is decoded, also those after
the last one wanted: damage to H.264 is concealed by the decoder and shows up only as a flag on the frame. So a file is
refused or accepted whatever the sampling, and the frame count is the true one. It costs up to a third more for a window
in the middle of the video, nothing for segments over all of it. Only the wanted frames are turned into RGB.

A segment is decoded from the key frame before it to its end, where the container has an index by time (MP4, MOV, Matroska,
WebM) and the codec gives one frame a packet (H.264, HEVC, VP9, AV1); anything that does not come out as the packets say
(damage, a key frame that is none), and any other file, is decoded from the first frame to the last. A file that ends early
is refused whatever the segment, because finding it out costs nothing; damage within a file of the right length is noticed
only among the frames that were decoded.

How much of such damage is noticed depends on the codec. Of 12 copies with five flipped bits each, H.264 clips were refused
12 times (three clips tried), MPEG-4 9 times, and HEVC and VP9 twice: these two carry nothing to check against, and a wrong
picture is a valid one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from vcache.extract.packets import (
    PacketTable,
    TableCache,
    check_file,
    check_whole,
    demux,
    describe,
    open_video,
    read_table,
)
from vcache.extract.seek import SeekError, frames_of_segment
from vcache.extract.video import Damage, DecodedVideo, DecodeRequest, VideoError, distinct_frames

# A file up to here is read once, and its packets kept for the decoder; a larger one is read twice.
_MAX_BYTES_IN_MEMORY = 64 * 2**20

_tables = TableCache(num_files=4)
_Frames = dict[int, np.ndarray]
_Convert = Callable[[VideoFrame], np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """A video that has been decoded and found sound, or taken as it is: an answer, and what other decoders ask of it."""

    table: PacketTable
    numbers: tuple[int, ...]
    clips: tuple[tuple[int, ...], ...]
    num_video_frames: int
    first_frame: int
    damage: VideoError | None
    size: tuple[int, int]
    """Height and width of the upright frame."""
    frames: _Frames
    """The wanted frames by number; empty if nothing was to be converted."""

    def answer(self, frames: UInt8[np.ndarray, "F H W 3"]) -> DecodedVideo:
        """The answer to the request, with these frames."""
        return DecodedVideo(
            frames=frames, numbers=self.numbers, clips=self.clips, num_video_frames=self.num_video_frames,
            fps=self.table.fps, first_frame=self.first_frame, damage=self.damage,
        )  # fmt: skip


@dataclass(frozen=True)
class _Pass:
    """What came out of the decoder."""

    frames: _Frames
    times: list[float | None]
    """Of each frame in display order, in seconds by the container's clock."""
    size: tuple[int, int]


def survey_video(request: DecodeRequest, *, convert: _Convert | None) -> Survey:
    """Decode what the request needs; the wanted frames are kept as `convert` makes them, none without it.

    Raises:
        VideoError: and nothing else, whatever the file.
    """
    damage = Damage(allow_partial=request.allow_partial)
    check_file(request.path, damage)
    try:
        with open_video(request.path) as (container, stream):
            if request.segment is not None:
                return _survey_segment(request, container, stream, convert, damage)
            kept: list[Packet] | None = [] if request.path.stat().st_size <= _MAX_BYTES_IN_MEMORY else None
            table = read_table(container, stream, damage, kept)
            check_whole(table, damage)
            return _survey_whole(request, table, kept, convert, damage)
    except VideoError as error:
        if damage.first is None:
            raise
        # What was found first is why too little is left: no header, no frame, none where the segment lies.
        raise damage.first from error


def _survey_whole(
    request: DecodeRequest, table: PacketTable, kept: list[Packet] | None, convert: _Convert | None, damage: Damage
) -> Survey:
    """Decode from the first frame to the last. The count of the packets says what to keep; where it is wrong, once more."""
    guess = frozenset(_guess(request, table)) if convert else frozenset()
    done = _decode(request, guess, kept, convert, damage)
    if damage.first is None:
        _check_count(table.num_shown, len(done.times))
    segment, clips = request.resolve(len(done.times), _seconds(done.times, table))
    numbers = distinct_frames(clips)
    if convert and not guess.issuperset(numbers):
        again = _decode(request, frozenset(numbers), None, convert, damage)
        if len(again.times) != len(done.times):
            counts = f"{len(done.times)} frames, and {len(again.times)} the second time"
            raise VideoError("frame_count", f"decoding gave {counts}")
        done = again
    return Survey(
        table=table, numbers=numbers, clips=clips, num_video_frames=len(done.times), first_frame=segment.start,
        damage=damage.first, size=done.size, frames=done.frames,
    )  # fmt: skip


def _survey_segment(
    request: DecodeRequest,
    container: InputContainer,
    stream: VideoStream,
    convert: _Convert | None,
    damage: Damage,
) -> Survey:
    """Decode the segment alone; all of the video if what comes out is not exactly what the packets promise."""
    table = _tables.get(request.path, container, stream, damage)
    check_whole(table, damage)
    if not table.seekable:
        return _survey_whole(request, table, None, convert, damage)
    segment, clips = request.resolve(table.num_shown, table.times)
    numbers = distinct_frames(clips)
    wanted, frames, size = frozenset(numbers), {}, (0, 0)
    try:
        for number, frame in frames_of_segment(container, stream, table, segment):
            size = _upright_size(frame)
            if convert and number in wanted:
                frames[number] = convert(frame)
    except SeekError:
        return _survey_whole(request, table, None, convert, damage)
    return Survey(
        table=table, numbers=numbers, clips=clips, num_video_frames=table.num_shown, first_frame=segment.start,
        damage=damage.first, size=size, frames=frames,
    )  # fmt: skip


def _guess(request: DecodeRequest, table: PacketTable) -> tuple[int, ...]:
    """The wanted frames, were there as many as packets; none if the segment does not lie within these."""
    try:
        return distinct_frames(request.resolve(table.num_shown, table.times)[1])
    except VideoError:
        return ()


def _seconds(times: list[float | None], table: PacketTable) -> np.ndarray:
    """From the first frame, ascending; by the packets where a frame does not know."""
    if None not in times:
        seconds = np.sort(np.array(times, dtype=np.float64))
        return seconds - seconds[0]
    if len(times) == table.num_shown:
        return table.times
    return np.arange(len(times)) / (table.fps or 1.0)


def _decode(
    request: DecodeRequest,
    wanted: frozenset[int],
    kept: list[Packet] | None,
    convert: _Convert | None,
    damage: Damage,
) -> _Pass:
    """Decode everything, from the packets if they were kept."""
    if kept is not None:
        return _collect(_frames(kept, damage), wanted, convert, damage)
    with open_video(request.path) as (container, stream):
        return _collect(_frames(demux(container, stream, damage), damage), wanted, convert, damage)


def _frames(packets: Iterable[Packet], damage: Damage) -> Iterator[VideoFrame]:
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            damage.report(VideoError("decode_error", describe(error)))
            continue
        yield from frames


def _collect(decoded: Iterator[VideoFrame], wanted: frozenset[int], convert: _Convert | None, damage: Damage) -> _Pass:
    frames: _Frames = {}
    times: list[float | None] = []
    damaged, size = [], (0, 0)
    for number, frame in enumerate(decoded):
        times.append(frame.time)
        size = _upright_size(frame) if number == 0 else size
        if frame.is_corrupt:
            damaged.append(number)
        if convert and number in wanted:
            frames[number] = convert(frame)
    if not times:
        raise VideoError("no_frames", "the decoder gave no frame")
    if damaged:
        reason = f"{len(damaged)} of {len(times)} frames are damaged, the first is {damaged[0]}"
        damage.report(VideoError("corrupt_frames", reason))
    return _Pass(frames, times, size)


def _check_count(num_packets: int, num_frames: int) -> None:
    """A factor of two is normal: hidden or empty frames and single fields in packets, or two frames packed into one."""
    if not num_packets / 2 <= num_frames <= num_packets * 2:
        raise VideoError("frame_count", f"{num_packets} packets gave {num_frames} frames")


def quarter_turns_left(frame: VideoFrame) -> int:
    """By the rotation of the header, for np.rot90."""
    # The header's angle turns counter-clockwise, as np.rot90 does.
    return round(frame.rotation / 90) % 4


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if quarter_turns_left(frame) % 2 else (frame.height, frame.width)
