"""Writing shard files: to a temporary file of the same folder, or to a spool file that is uploaded to an object store."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vcache.store.files import TemporaryFile, write_all
from vcache.store.object_path import ObjectPath, StorePath

if TYPE_CHECKING:  # loaded late: a local store needs none of it
    from obstore.store import S3Store

PART_BYTES = 8 << 20
"""Of a multipart upload; S3 takes 5 MiB to 5 GiB and at most 10,000 parts."""
PARTS_AT_ONCE = 4


def unpublished_file(folder: StorePath, name: str) -> "TemporaryFile | UploadFile":
    """A file to be written and then published in the folder, where nobody sees it before."""
    return TemporaryFile(folder, name) if isinstance(folder, Path) else UploadFile()


class UploadFile:
    """Bytes on their way to an object, in an unnamed file of the local disk: a killed process leaves nothing behind.

    The object is there, whole, when `publish` returns. An upload that fails is aborted and leaves no parts; one that is killed
    leaves parts that nobody sees but the bill, which a bucket rule AbortIncompleteMultipartUpload removes.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=_spool_folder())  # noqa: SIM115 - `discard` closes it

    def write(self, buffers: Sequence[memoryview | bytes]) -> None:
        """Append all the buffers."""
        write_all(self._file.fileno(), buffers)

    def sync(self) -> None:
        """Nothing: what counts is the object."""

    def publish(self, path: StorePath) -> None:
        """Upload everything, in parts if it is large; memory is a few parts."""
        from obstore import put

        assert isinstance(path, ObjectPath)

        def upload(client: "S3Store") -> None:
            self._file.seek(0)
            put(client, path.key, self._file, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

        path.ask("written", upload)
        self.discard()

    def discard(self) -> None:
        self._file.close()


def _spool_folder() -> str | None:
    """`$TMPDIR`, else /var/tmp: /tmp is memory on many machines, and a shard of all layers is a gigabyte."""
    has_own = "TMPDIR" in os.environ or not Path("/var/tmp").is_dir()
    return None if has_own else "/var/tmp"
