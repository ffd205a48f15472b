"""CRC32C, the checksum of every chunk, index and record.

`fastcrc` because reading is a copy and a checksum, and nothing else: it checks 52 GB/s of what is in the processor's
cache, where the package `crc32c` checks 24-28, reads any buffer in place, and lets other threads run meanwhile.
"""

from fastcrc import crc32


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The CRC32C of `data`; with `value`, the CRC32C of what came before, of both together."""
    return crc32.iscsi(data, value)
