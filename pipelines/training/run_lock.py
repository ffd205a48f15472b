"""One process at a time trains a run: two would write over each other's logs and delete each other's checkpoints.

What is locked (flock) is a file that the run has anyway and that nobody else writes meanwhile; the lock ends with the process,
however that dies. On network file systems other machines see it, unless they are mounted with `local_lock`.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vcache.pipelines.runs import RunError


@contextmanager
def held_alone(file: Path) -> Iterator[None]:
    """Hold the folder of `file`, its config.json or sweep.json. A file system without locks is none.

    Raises:
        RunError: another process holds it, or another block of this one.
    """
    lock = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is training {file.parent}. Wait for it, or stop it first with Ctrl-C, which keeps what it did."
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(lock)
