"""Decode processes: a video that hangs, crashes or eats all memory costs itself and nothing else.

    with DecodePool(num_workers=8) as pool:
        video = pool.decode(DecodeRequest(path=path, clips=clips))        # from up to 8 threads at once

A decoder is native code on files from the internet. It may hold the interpreter's lock for ever or end the process, so
only another process can stop it and survive it.

Memory is bounded by the number of workers: nothing is queued, a request that finds no free worker waits with its caller.
A worker holds the frames of one video: twice while they are stacked, then once in its hands and once in the shared buffer,
of which at most 64 MiB are kept for the next video, then there and in the caller's copy. So above what the processes take
themselves, the pool takes at most num_workers x (2 x the frames of the largest request + 64 MiB).
"""

import os
import sys
import threading
import weakref
from types import TracebackType

from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError
from vcache.extract.worker import DecodeProcessError, Launcher, Worker

_TRIED_AGAIN = ("timeout", "worker_crash")  # what the machine may be to blame for


class DecodePool:
    """Up to `num_workers` processes, each started when it is first needed; `decode` may be called from any thread.

    No process outlives the pool: not `close`, not the end of the interpreter, not a parent that is killed.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        decoder: str = "pyav",
        deadline_seconds: float | None = None,
        recycle_after: int = 500,
    ) -> None:
        """Starts no process yet.

        Args:
            num_workers: videos decoded at once, each by one thread.
            decoder: the decoder that a process loads when it starts; a request may name another one. Or
                "package.module:function", a function that is called in place of `decode_video`.
            deadline_seconds: for one video; None is 30 s, and more for files above 1.5 MB (`worker.deadline_seconds`).
            recycle_after: videos after which a process is replaced, in case its libraries leak.

        Raises:
            ValueError: a number is not positive.
        """
        for name, value in (("num_workers", num_workers), ("recycle_after", recycle_after)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if deadline_seconds is not None and not deadline_seconds > 0:
            raise ValueError(f"deadline_seconds ({deadline_seconds:g}) must be above 0")
        self._deadline_seconds, self._recycle_after = deadline_seconds, recycle_after
        self._free = threading.Semaphore(num_workers)
        self._crew = _Crew(decoder)
        self._end = weakref.finalize(self, self._crew.disband)  # runs on `close`, and when the pool is forgotten
        # On Linux the kernel ends the processes. Ending them before would give daemon threads an error to print.
        self._end.atexit = sys.platform != "linux"  # type: ignore[misc]  # typeshed lists it in no slot

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        """As `decode_video`, in another process; waits for a free one. The frames belong to the caller.

        A video that ends the process or its time is tried once more in a new process.

        Raises:
            VideoError: of the decoder; "timeout" or "worker_crash" if both tries ended so.
            DecodeProcessError: no process can be started.
            DecoderError: the decoder is not known, or not installed.
            RuntimeError: the pool is closed, or was made before a fork.
        """
        with self._free:
            try:
                return self._try(request)
            except VideoError as error:
                if error.kind not in _TRIED_AGAIN:
                    raise
            try:
                return self._try(request)
            except VideoError as error:
                if error.kind not in _TRIED_AGAIN:
                    raise
                raise VideoError(error.kind, f"{error.reason}; tried twice") from None

    def _try(self, request: DecodeRequest) -> DecodedVideo:
        worker = self._crew.borrow()
        try:
            return worker.decode(request, self._deadline_seconds)
        except VideoError as error:
            if error.kind in _TRIED_AGAIN:
                self._crew.check_open()  # it was `close` that ended the process
            raise
        finally:
            self._crew.give_back(worker, keep=worker.num_decoded < self._recycle_after)

    def close(self) -> None:
        """End all processes. A `decode` in another thread raises RuntimeError."""
        self._end()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Crew:
    """The processes: who is idle, who is out. It knows nothing of the pool, so that a forgotten pool can be ended."""

    def __init__(self, decoder: str) -> None:
        self._lock = threading.RLock()  # a signal handler may close the pool
        self._launcher = Launcher(decoder)
        self._idle: list[Worker] = []
        self._out: set[Worker] = set()
        self._owner, self._closed = os.getpid(), False

    def borrow(self) -> Worker:
        """A process that is ready: an idle one, else a new one."""
        while worker := self._pop_idle():
            if worker.alive:
                return worker
            self.give_back(worker, keep=False)  # it died at rest, which is no video's fault
        try:
            return self._start()
        except DecodeProcessError as error:
            self.check_open()
            if not error.killed:
                raise
            return self._start()  # memory may have been short for a moment

    def _pop_idle(self) -> Worker | None:
        with self._lock:
            self.check_open()
            if not self._idle:
                return None
            worker = self._idle.pop()
            self._out.add(worker)
            return worker

    def _start(self) -> Worker:
        worker = self._launcher.start()
        with self._lock:
            self._out.add(worker)
        try:
            self.check_open()
            worker.wait_ready()
        except BaseException:
            self.give_back(worker, keep=False)
            raise
        return worker

    def give_back(self, worker: Worker, *, keep: bool) -> None:
        """Keep it for the next request if it can take one."""
        with self._lock:
            self._out.discard(worker)
            if keep and worker.usable and not self._closed:
                self._idle.append(worker)
                return
        worker.dispose()

    def check_open(self) -> None:
        """Raise RuntimeError if the processes cannot be used here."""
        if self._closed:
            raise RuntimeError("the decode pool is closed")
        if os.getpid() != self._owner:
            raise RuntimeError("the decode pool belongs to the process that made it; make one after the fork")

    def disband(self) -> None:
        """End all processes. The descriptors of those at work are closed by who borrowed them."""
        if os.getpid() != self._owner:  # a fork of the owner ends
            return
        with self._lock:
            self._closed = True
            idle, out = self._idle, tuple(self._out)
            self._idle = []
        for worker in (*idle, *out):  # all at once, and then one after the other
            worker.process.kill()
        for worker in idle:
            worker.dispose()
        for worker in out:
            worker.kill()
        self._launcher.close()
