"""What runs in a decode process: one request after the other, until the parent is gone.

    python -P -m vcache.extract.worker_main SOCKET FRAMES PARENT        two descriptors and a process id

It imports the decoder, NumPy and no torch. Any exception is an answer; only what ends a process ends this one.
"""

import ctypes
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from vcache.extract.decode import decode_video
from vcache.extract.decoders import DecoderError, get_decoder
from vcache.extract.messages import receive_message, send_message
from vcache.extract.shared_frames import SharedFrames
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OOM_SCORE = "500"  # of 1000: this process is killed before the one that holds the model


def main() -> None:
    """Say ("ready",) once the decoder is loaded; to each request ("size", bytes), then ("video", ...) or ("error", ...)."""
    link_descriptor, frames_descriptor, parent = map(int, sys.argv[1:])
    _end_with(parent)
    _cost_little()
    link, frames = socket.socket(fileno=link_descriptor), SharedFrames(frames_descriptor)
    with suppress(EOFError, ConnectionError):  # the parent closed its end: there is nothing more to do
        name, sys.path[:] = receive_message(link)
        try:
            decode = _load(name)
        except DecoderError as error:
            return send_message(link, ("error", error))
        send_message(link, ("ready",))
        while True:
            request = receive_message(link)
            # Asked here and not in the parent: on a dead network disk this call never returns.
            send_message(link, ("size", _size_bytes(request.path)))
            send_message(link, _answer(decode, request, frames))


def _end_with(parent: int) -> None:
    """Die when the parent does, also in the middle of a video and also when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call
        os._exit(1)


def _cost_little() -> None:
    """A crash writes no core file, and short memory costs this process and not its parent."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _load(decoder: str) -> Callable[[DecodeRequest], DecodedVideo]:
    """`decode_video` with this decoder loaded, or the function of "package.module:function"."""
    module, _, function = decoder.partition(":")
    if not function:
        get_decoder(decoder)  # now, and not within the time of the first video
        return decode_video
    decode: Callable[[DecodeRequest], DecodedVideo] = getattr(import_module(module), function)
    return decode


def _size_bytes(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _answer(
    decode: Callable[[DecodeRequest], DecodedVideo], request: DecodeRequest, frames: SharedFrames
) -> tuple[object, ...]:
    """The frames go into the shared memory, all else into the message. A function of its own, so that nothing is kept."""
    try:
        video = decode(request)
        frames.put(video.frames)
        return "video", replace(video, frames=np.empty((0, 0, 0, 3), dtype=np.uint8)), video.frames.shape
    except VideoError as error:
        return "error", error
    except MemoryError as error:
        return "error", VideoError("decode_error", f"MemoryError: {error or 'not enough memory for this video'}")
    except Exception as error:
        return "error", _portable(error)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; in other words if it does not survive the way."""
    error.add_note("In the decode process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main()
