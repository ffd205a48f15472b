"""One decode process as its parent sees it: started, asked, timed, killed.

The process is a fresh interpreter, neither forked (the parent holds CUDA and threads) nor started by multiprocessing, which runs
the user's script a second time and forbids processes to the workers of dask.
"""

import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

from vcache.extract.messages import GarbledMessage, receive_message, send_message
from vcache.extract.shared_frames import SharedFrames
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError

MIN_DEADLINE_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 50_000
"""One core decodes 4 to 8 MB of H.264 in a second. This leaves room for a slow disk, many workers and low bit rates."""
SLOWEST_SEGMENT_BYTES_PER_SECOND = 500_000
"""Of the whole file that a segment lies in: it is read, and mostly not decoded."""

_START_SECONDS = 120.0  # the imports take 0.25 s, and much longer from a cold network disk
_DEATH_SECONDS = 1.0  # from the end of the socket to the exit status
_LOG_BYTES = 4096
# One thread: the worker multiplies no matrices, and BLAS would start a thread for every core.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class DecodeProcessError(RuntimeError):
    """No decode process can be started; the message ends with what the process said. `killed`: by a signal."""

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


def deadline_seconds(size_bytes: int, *, is_segment: bool = False) -> float:
    """How long a video of this size, or a segment of it, may take: 30 s, or a second for every 50 kB or 500 kB."""
    slowest = SLOWEST_SEGMENT_BYTES_PER_SECOND if is_segment else SLOWEST_BYTES_PER_SECOND
    return max(MIN_DEADLINE_SECONDS, size_bytes / slowest)


class Worker:
    """A process that decodes one video at a time. `usable` is False while it does, and for good once it failed to answer."""

    def __init__(self, decoder: str) -> None:
        """Starts the process and does not wait for it. `decoder` is a name, or "package.module:function"."""
        self.usable, self.num_decoded = False, 0
        self._log, self._deadline = b"", 0.0
        with ExitStack() as opened:
            self.frames = opened.enter_context(closing(SharedFrames.create()))
            self._link, theirs = socket.socketpair()
            opened.enter_context(self._link)
            with theirs:
                self.process = _spawn(theirs.fileno(), self.frames.fileno())
            opened.pop_all()
        assert self.process.stdout is not None
        # Only for a process that was stopped: what is sent is smaller than what a socket takes without a reader.
        self._link.settimeout(MIN_DEADLINE_SECONDS)
        self._output = self.process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._poll = select.poll()
        self._poll.register(self._link, select.POLLIN)
        self._poll.register(self._output, select.POLLIN)
        with suppress(OSError):  # died already: `wait_ready` says of what
            send_message(self._link, (decoder, sys.path))

    def wait_ready(self) -> None:
        """Until it has imported its decoder.

        Raises:
            DecodeProcessError: it died on the way, or took too long.
            DecoderError: the decoder is not known, or not installed.
        """
        try:
            answer = self._receive(time.monotonic() + _START_SECONDS)
        except TimeoutError:
            what = f"was not ready within {_START_SECONDS:g} s"
        except (EOFError, GarbledMessage):
            what = f"ended before it was ready ({self._cause_of_death()})"
        else:
            if answer[0] == "error":
                raise answer[1]
            self.usable = True
            return
        killed = (self.process.poll() or 0) < 0
        said = self._log.decode(errors="replace").strip()
        raise DecodeProcessError(f"a decode process {what}; it said:\n{said or '(nothing)'}", killed=killed)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def decode(self, request: DecodeRequest, seconds: float | None) -> DecodedVideo:
        """Ask for one video; `seconds` is the deadline, None one by the size of the file.

        Raises:
            VideoError: of the decoder, or "timeout" or "worker_crash"; with these two the worker is no longer usable.
            Exception: whatever else the decoder raised.
        """
        self.usable, self._log = False, b""
        start = time.monotonic()
        limit = seconds or MIN_DEADLINE_SECONDS
        try:
            send_message(self._link, request)
            _, size_bytes = self._receive(start + limit)
            limit = seconds or deadline_seconds(size_bytes, is_segment=request.segment is not None)
            video = self._unpack(self._receive(start + limit))
        except TimeoutError:
            raise VideoError("timeout", f"no answer within {limit:g} s") from None
        except (EOFError, ConnectionError):
            raise VideoError("worker_crash", f"the decode process died ({self._cause_of_death()})") from None
        except (GarbledMessage, TypeError, ValueError):
            raise VideoError("worker_crash", "the decode process sent what is not an answer") from None
        self.usable = True
        self.num_decoded += 1
        if isinstance(video, Exception):
            raise video
        return video

    def _unpack(self, message: Any) -> DecodedVideo | Exception:
        match message:
            case ("video", DecodedVideo() as video, (int(), int(), int(), 3) as shape):
                video = replace(video, frames=self.frames.take(shape))
                self.frames.trim()
                return video
            case ("error", Exception() as error):
                return error
        raise GarbledMessage

    def _receive(self, until: float) -> Any:
        self._deadline = until
        return receive_message(self._link, self._wait)

    def _wait(self) -> None:
        """Until there is something to receive. What the process prints is read meanwhile: a full pipe would stop it."""
        while (seconds := self._deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in self._poll.poll(min(seconds, 3600) * 1000)]
            if self._output in ready:
                self._read_log()
            if self._link.fileno() in ready:
                return
        raise TimeoutError

    def _read_log(self) -> None:
        """Keep the end of what was printed since the request."""
        with suppress(BlockingIOError):
            while part := os.read(self._output, 2**16):
                self._log = (self._log + part)[-_LOG_BYTES:]
                if time.monotonic() > self._deadline:
                    return
            with suppress(KeyError):
                self._poll.unregister(self._output)  # closed: it would be "ready" for ever

    def _cause_of_death(self) -> str:
        try:
            code = self.process.wait(_DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        self._read_log()
        said = self._log.decode(errors="replace").strip().splitlines()
        return _describe_exit(code) + (f": {said[-1]}" if said else "")

    def kill(self) -> None:
        """End the process, from any thread, whatever it is doing."""
        self.process.kill()
        try:
            self.process.wait(_DEATH_SECONDS)
        except subprocess.TimeoutExpired:  # the kernel waits for a dead disk; the process ends if that ever comes back
            with suppress(RuntimeError):  # no thread can start while the interpreter ends
                threading.Thread(target=self.process.wait, daemon=True).start()

    def dispose(self) -> None:
        """`kill`, and give back descriptors and memory; nobody may be in `decode`."""
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._link.close()
        self.frames.close()


def _spawn(link: int, frames: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: a numpy.py in the working directory is not NumPy.
        [sys.executable, "-P", "-m", "vcache.extract.worker_main", str(link), str(frames), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=(link, frames),
        env={**os.environ, **_ENVIRONMENT},
        start_new_session=True,  # Ctrl-C in the terminal goes to the parent's group
    )


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, maybe by the kernel for want of memory" if name == "SIGKILL" else name


class Launcher:
    """Starts workers from one thread that lives until `close`.

    The kernel ends a worker with the thread that started it, not with the process: a worker that was started by a
    passing thread of the caller would be lost with it.
    """

    def __init__(self, decoder: str) -> None:
        self._wanted: queue.SimpleQueue[Future[Worker] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.RLock(), False
        threading.Thread(target=_launch, args=(decoder, self._wanted), name="vcache-launch", daemon=True).start()

    def start(self) -> Worker:
        """A worker that is on its way; `wait_ready` is to be called.

        Raises:
            OSError: the system has no process or descriptor left.
            RuntimeError: closed.
        """
        future: Future[Worker] = Future()
        with self._lock:
            if self._closed:  # nobody would answer
                raise RuntimeError("the decode pool is closed")
            self._wanted.put(future)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.add_done_callback(_dispose)
            raise

    def close(self) -> None:
        """End the thread, and with it every worker that is left."""
        with self._lock:
            self._closed = True
            self._wanted.put(None)


def _dispose(started: "Future[Worker]") -> None:
    if started.exception() is None:
        started.result().dispose()


def _launch(decoder: str, wanted: "queue.SimpleQueue[Future[Worker] | None]") -> None:
    while future := wanted.get():
        try:
            future.set_result(Worker(decoder))
        except BaseException as error:
            future.set_exception(error)
