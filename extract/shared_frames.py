"""Memory that two processes share: the frames of one video at a time, from a decode process to its parent.

It is a file without a name: nothing is left of it when both processes are gone, however they went, and it is not bounded by
the size of /dev/shm, which is 64 MB in many containers. It is written and read, not mapped: a mapped file that the
other side cuts short kills the process that touches it (SIGBUS), and the parent must outlive whatever its workers do.
The second copy that this costs is 0.3 ms for 16 frames of 340x256, where decoding them takes above 100 ms.
"""

import math
import os
import sys
import tempfile

import numpy as np
from jaxtyping import UInt8

KEPT_BYTES = 64 * 2**20
"""What a buffer keeps between two videos, so that their memory is not asked for again; more goes back at once."""


class SharedFrames:
    """A buffer as large as its largest video so far, of at most KEPT_BYTES while nobody decodes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def create(cls) -> "SharedFrames":
        """An empty buffer. Its descriptor is inherited only by processes that are given it (`pass_fds`)."""
        if sys.platform == "linux":
            try:
                return cls(os.memfd_create("vcache-frames"))
            except OSError:  # some sandboxes have none
                pass
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Give back this process's hold of the memory."""
        os.close(self._descriptor)

    @property
    def size_bytes(self) -> int:
        """Memory that it takes now."""
        return os.fstat(self._descriptor).st_size

    def put(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Copy the frames in; those of the video before are gone.

        Raises:
            OSError: no memory.
        """
        flat, done = np.ascontiguousarray(frames).reshape(-1).data, 0
        while done < len(flat):  # one call moves 2 GiB at most
            done += os.pwrite(self._descriptor, flat[done:], done)

    def take(self, shape: tuple[int, int, int, int]) -> UInt8[np.ndarray, "F H W 3"]:
        """A copy of the frames that were put in, C-contiguous, the caller's own.

        Raises:
            ValueError: there is less than such a shape takes.
        """
        num_bytes = math.prod(shape)
        if min(shape) < 0 or num_bytes > self.size_bytes:
            raise ValueError(f"frames of shape {shape} were announced, and there are {self.size_bytes} bytes")
        flat, done = np.empty(num_bytes, dtype=np.uint8), 0
        while done < num_bytes:
            count = os.preadv(self._descriptor, [flat.data[done:]], done)
            if count == 0:
                raise ValueError(f"{done} of {num_bytes} bytes of frames are there")
            done += count
        return flat.reshape(shape)

    def trim(self) -> None:
        """Give back what is above KEPT_BYTES."""
        if self.size_bytes > KEPT_BYTES:
            os.ftruncate(self._descriptor, KEPT_BYTES)
