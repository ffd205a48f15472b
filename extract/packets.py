"""What the packets of a video say before anything is decoded: how many frames, when each is shown, where decoding can begin.

One pass over the file, which costs about 3% of decoding it. Headers count frames that an edit list hides, and durations that
were never written; packets do not.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from vcache.extract.containers import missing_bytes
from vcache.extract.video import Damage, VideoError

# Headers round, and the last frame's duration is often not known, so that durations only show what is clearly cut.
_MIN_SHARE_OF_DURATION = 0.9
# One packet is one frame, and seeking by time works. MPEG-4 and VP8 have packets that show nothing; AVI and MPEG-TS have no
# index by display time.
_CONTAINERS_WITH_INDEX = frozenset(("mov", "mp4", "matroska", "webm"))
_CODECS_OF_ONE_FRAME_A_PACKET = frozenset(("h264", "hevc", "vp9", "av1"))
_NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True, kw_only=True, eq=False)
class PacketTable:
    """The packets of one video stream in the order of the file, times in units of `time_base` seconds."""

    pts: np.ndarray
    """(P,) int64, when the frame is shown; the smallest int64 where the container does not say."""
    dts: np.ndarray
    """(P,) int64, when it has to be decoded; same."""
    durations: np.ndarray
    keys: np.ndarray
    """(P,) bool: decoding can begin here."""
    shown: np.ndarray
    """(P,) bool: within the edit list. The others are decoded, because others refer to them, and never shown."""
    time_base: float
    fps: float | None
    num_declared: int
    """Frames by the header; 0 if it does not say."""
    duration_seconds: float | None
    """By the header; None if it does not say."""
    format_names: frozenset[str]
    """FFmpeg's names of the container: a file of the MP4 family has six."""
    codec: str

    @property
    def num_shown(self) -> int:
        """Packets with a frame to show; for most codecs the number of frames."""
        return int(self.shown.sum())

    @cached_property
    def display(self) -> np.ndarray:
        """Of each frame in display order its packet; meant for tables that are `seekable`."""
        shown = np.flatnonzero(self.shown)
        return shown[np.argsort(self.pts[shown], kind="stable")]

    @cached_property
    def times(self) -> np.ndarray:
        """(frames,) seconds from the first frame shown, ascending; by decoding order where display times are absent."""
        ticks = np.sort((self.pts if self._has_times else self.dts)[self.shown])
        if len(ticks) == 0 or ticks[0] == _NO_TIME:
            return np.arange(self.num_shown) / (self.fps or 1.0)
        return (ticks - ticks[0]) * self.time_base

    @property
    def _has_times(self) -> bool:
        return bool((self.pts[self.shown] != _NO_TIME).all())

    @cached_property
    def seekable(self) -> bool:
        """Frame i in display order is packet `display[i]`, and a seek by time leads to it."""
        times = self.pts[self.shown]
        return (
            not self.format_names.isdisjoint(_CONTAINERS_WITH_INDEX)
            and self.codec in _CODECS_OF_ONE_FRAME_A_PACKET
            and self._has_times
            and len(np.unique(times)) == len(times)
        )

    @property
    def has_open_groups(self) -> bool:
        """A frame is shown before the key frame that comes before it in the file: it may refer to the group before."""
        later = np.minimum.accumulate(self.pts[::-1])[::-1]
        return bool((self.keys & (later < self.pts)).any())

    @property
    def end_seconds(self) -> float | None:
        """When the last frame ends; None without times."""
        timed = self.shown & (self.pts != _NO_TIME)
        if timed.sum() < 2:
            return None
        end = int((self.pts[timed] + self.durations[timed]).max())
        # The longer of both accounts: some files begin at five seconds, and their duration may or may not count from there.
        return max(end, end - int(self.pts[timed].min())) * self.time_base

    def packets_of(self, frames: range) -> tuple[int, int]:
        """The packets that have to be decoded for these frames: from the first, a key packet, to the last, both included."""
        needed = self.display[frames.start : frames.stop]
        keys = np.flatnonzero(self.keys[: needed.min() + 1] & (self.pts[: needed.min() + 1] <= self.pts[needed].min()))
        return (int(keys[-1]) if len(keys) else 0), int(needed.max())


def check_file(path: Path, damage: Damage) -> None:
    """Report a file that is not there, or that lacks bytes that its container announces."""
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise VideoError("empty", "the file has no bytes")
        if lacking := missing_bytes(path):
            damage.report(VideoError("truncated", f"the file ends {lacking} bytes before its container says"))
    except OSError as error:
        raise VideoError("missing", f"the file cannot be read: {error.strerror or error}") from error


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream, for one thread; FFmpeg's errors inside come out as VideoError."""
    kind = "not_video"
    try:
        # absolute: FFmpeg would take "a:b.mp4" for a protocol. The whitelist keeps a playlist from opening the network.
        with av.open(
            str(path.absolute()), metadata_errors="replace", options={"protocol_whitelist": "file,crypto,data"}
        ) as container:
            kind = "decode_error"
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
                held = ", ".join(sorted({s.type for s in container.streams})) or "no streams at all"
                raise VideoError("no_video_stream", f"the file holds no video stream (it holds: {held})")
            if stream.codec_context is None:
                raise VideoError("decode_error", "the header names a codec that FFmpeg cannot decode, or is damaged")
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except VideoError:
        raise
    except Exception as error:  # PyAV also raises ValueError, UnicodeDecodeError and AssertionError on damaged files
        raise VideoError(kind, describe(error)) from error


def describe(error: Exception) -> str:
    """One line without the path, which PyAV's own errors carry in str()."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def demux(container: InputContainer, stream: VideoStream, damage: Damage) -> Iterator[Packet]:
    """The packets of the stream, the last one empty, which drains the decoder; up to the first that cannot be read."""
    packets = iter(container.demux(stream))
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except Exception as error:
            damage.report(VideoError("decode_error", describe(error)))
            return
        yield packet


def read_table(
    container: InputContainer, stream: VideoStream, damage: Damage, keep: list[Packet] | None = None
) -> PacketTable:
    """Read all packets; append them to `keep` if that is given."""
    rows = []
    for packet in demux(container, stream, damage):
        if keep is not None:
            keep.append(packet)
        if packet.size:  # not the drain at the end
            pts, dts = (_NO_TIME if time is None else time for time in (packet.pts, packet.dts))
            rows.append((pts, dts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy()
    codec = stream.codec_context.codec
    return PacketTable(
        pts=columns[0], dts=columns[1], durations=columns[2], keys=columns[3] > 0, shown=columns[4] > 0,
        time_base=float(stream.time_base or 0),
        fps=float(stream.average_rate) if stream.average_rate else None,
        num_declared=stream.frames,
        duration_seconds=_declared_seconds(container, stream),
        format_names=frozenset(container.format.name.split(",")),
        codec=codec.canonical_name,
    )  # fmt: skip


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """The duration of the stream by its header, else of the file if there is nothing else in it, else None."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Sound may well outlast the picture.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


def check_whole(table: PacketTable, damage: Damage) -> None:
    """Report a stream that has less than its header promises."""
    num_stored, declared = len(table.pts), table.duration_seconds
    if table.num_shown == 0:
        raise VideoError(
            "no_frames",
            f"the video stream holds no frame to show ({num_stored} packet{'s' * (num_stored != 1)} in all)",
        )
    end = table.end_seconds
    if end is not None and declared:
        if end < _MIN_SHARE_OF_DURATION * declared:
            damage.report(VideoError("truncated", f"the video ends at {end:.2f} s of {declared:.2f} s"))
    # Only without durations: the count takes in all that an edit list cuts off, of which FFmpeg gives no packets.
    elif num_stored < _MIN_SHARE_OF_DURATION * table.num_declared:
        damage.report(VideoError("truncated", f"{num_stored} of {table.num_declared} frames are in the file"))


class TableCache:
    """The tables of the last few files: the segments of a long video are asked for one after another.

    An hour of 216,000 packets takes 0.9 s of one core to read, and 9 MB to keep; a segment of two seconds is then decoded in
    0.03 s. Each decode process reads for itself.
    """

    def __init__(self, num_files: int) -> None:
        self._num_files, self._lock = num_files, threading.Lock()
        self._tables: OrderedDict[tuple[str, int, int], tuple[PacketTable, VideoError | None]] = OrderedDict()

    def get(self, path: Path, container: InputContainer, stream: VideoStream, damage: Damage) -> PacketTable:
        """The table of this file as it is now, read if need be; what was found wrong while reading is reported again."""
        status = path.stat()
        key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
        with self._lock:
            found = self._tables.pop(key, None)
        if found is None:
            reading = Damage(allow_partial=True)
            found = read_table(container, stream, reading), reading.first
        with self._lock:
            self._tables[key] = found
            while len(self._tables) > self._num_files:
                self._tables.popitem(last=False)
        if found[1] is not None:
            damage.report(VideoError(found[1].kind, found[1].reason))  # raised twice, one would keep two tracebacks
        return found[0]
