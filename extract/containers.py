"""How many bytes a video file should have, read from its container's own length fields.

A download that broke off often decodes without an error up to the break: Matroska and AVI need nothing from the end of
the file. Their outermost length field tells it to the byte, where a comparison of durations has to leave room for sound
that outlasts the picture.
"""

import struct
from pathlib import Path
from typing import BinaryIO

# ISO 14496-12 boxes found at the top level. An unknown type ends the walk: what follows may be junk, not a length.
_TOP_LEVEL_BOXES = frozenset(
    b"ftyp styp moov moof mdat free skip wide uuid meta mfra sidx ssix pdin prft emsg udta pnot".split()
)
_EBML_HEADER, _SEGMENT = 0x1A45DFA3, 0x18538067


def missing_bytes(path: Path) -> int:
    """How many bytes the file lacks by its own account (MP4/MOV, Matroska/WebM, AVI); 0 if whole or if nothing says.

    Raises:
        OSError: the file cannot be read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] in _TOP_LEVEL_BOXES:
            declared = _end_of_boxes(file, size_bytes)
        elif head[:4] == _EBML_HEADER.to_bytes(4, "big"):
            declared = _end_of_segment(file)
        elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            declared = _end_of_riff(file, size_bytes)
        else:
            declared = 0
    return max(declared - size_bytes, 0)


def _end_of_boxes(file: BinaryIO, size_bytes: int) -> int:
    """Where the last top-level box ends; beyond the end of the file if the file was cut inside it."""
    end = 0
    while end < size_bytes:
        file.seek(end)
        header = file.read(16)
        if len(header) < 8 or header[4:8] not in _TOP_LEVEL_BOXES:
            break
        (length,) = struct.unpack(">I", header[:4])
        if length == 1 and len(header) == 16:
            (length,) = struct.unpack(">Q", header[8:])
        if length < 8:  # 0: to the end of the file, whatever that is
            break
        end += length
    return end


def _end_of_segment(file: BinaryIO) -> int:
    """Where the Matroska segment ends; 0 if it was written as a stream, of unknown length (RFC 8794, section 6.2)."""
    file.seek(4)
    header_bytes = _ebml_length(file)
    if header_bytes is None:
        return 0
    file.seek(header_bytes, 1)
    if int.from_bytes(file.read(4), "big") != _SEGMENT:
        return 0
    segment_bytes = _ebml_length(file)
    return 0 if segment_bytes is None else file.tell() + segment_bytes


def _ebml_length(file: BinaryIO) -> int | None:
    """A variable-length integer: the zeros before its first one count the bytes that follow; all ones is unknown."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_more = 8 - first[0].bit_length()
    value_bits = 7 * (num_more + 1)
    value = int.from_bytes(first + file.read(num_more), "big") & ((1 << value_bits) - 1)
    return None if value == (1 << value_bits) - 1 else value


def _end_of_riff(file: BinaryIO, size_bytes: int) -> int:
    """Where the last RIFF chunk ends: one for most AVI files, one per gigabyte in OpenDML ones."""
    end = 0
    while end < size_bytes:
        file.seek(end)
        header = file.read(8)
        if len(header) < 8 or header[:4] != b"RIFF":
            break
        (length,) = struct.unpack("<I", header[4:])
        if length == 0:  # the writer never came back to fill it in
            break
        end += 8 + length + (length % 2 if end + 8 + length < size_bytes else 0)
    return end
