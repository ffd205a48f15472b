"""TensorBoard's event files, where TensorBoard is installed.

Written with its own protocol buffers, a whole event at a time into a file that is opened for it: nothing is lost by a kill, a
hundred heads need no hundred threads (torch's SummaryWriter has one each), and a training that fails leaves nothing open.
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


class EventFile:
    """A new file in `folder`; what earlier files say of steps after `done_steps` is hidden."""

    def __init__(self, folder: Path, done_steps: int = 0) -> None:
        """
        Raises:
            ImportError, OSError: TensorBoard is not there or does not load, or the folder cannot be written.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record = event_pb2.Event, summary_pb2.Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        num_earlier = sum(1 for _ in folder.glob("*tfevents*"))
        # Files are read in the order of their names: two of the same second need the number.
        self.path = folder / f"events.out.tfevents.{int(time.time())}.vcache.{num_earlier:03d}"
        self._write(file_version="brain.Event:2")
        if num_earlier:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=done_steps + 1, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """One event with the scalars that are there."""
        values = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None
        ]
        self._write(step=step, summary=self._summary(value=values))

    def _write(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        with self.path.open("ab") as file:
            self._record(file).write(event.SerializeToString())
