"""A decoder that does what the name of the video says: it runs in the decode processes of test_workers.py."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from vcache.extract.decode import decode_video
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError


class NeedsTwo(Exception):
    """It pickles, and cannot be unpickled."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


def decode(request: DecodeRequest) -> DecodedVideo:
    """`do.<what>.<argument>` does `what`; anything else is a video."""
    if not request.path.name.startswith("do."):
        return decode_video(request)
    _, what, argument = request.path.name.split(".")
    return DEEDS[what](argument, request)


def first_time_segfault(argument: str, request: DecodeRequest) -> DecodedVideo:
    mark = request.path.with_name(argument)
    if not mark.exists():
        mark.touch()
        ctypes.string_at(0)
    return frames("4", request)


def frames(argument: str, request: DecodeRequest) -> DecodedVideo:
    """`argument` rows of 1000 pixels, all different, without any file."""
    values = np.arange(int(argument) * 3000) * 7 + int(argument)
    return DecodedVideo(
        frames=values.astype(np.uint8).reshape(1, -1, 1000, 3),
        numbers=(0,),
        clips=((0,),),
        num_video_frames=1,
        fps=None,
    )


def garbage(argument: str, request: DecodeRequest) -> DecodedVideo:
    """Over every descriptor there is."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\0" * int(argument))
        except OSError:
            continue
    return frames("4", request)


def loud(argument: str, request: DecodeRequest) -> DecodedVideo:
    for _ in range(int(argument)):
        os.write(1, b"x" * 4096)
        os.write(2, b"x" * 4096)
    return frames("4", request)


def abort(argument: str, request: DecodeRequest) -> DecodedVideo:
    os.write(2, b"free(): " + argument.encode() + b" pointer\n")
    os.abort()


def say(text: str) -> DecodedVideo:
    raise VideoError("missing", text)


def fail(error: Exception) -> DecodedVideo:
    raise error


DEEDS = {
    "frames": frames,
    "first_time_segfault": first_time_segfault,
    "segfault": lambda *_: ctypes.string_at(0),
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda *_: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda argument, _: os._exit(int(argument)),
    "sys_exit": lambda argument, _: sys.exit(int(argument)),
    "sleep": lambda argument, _: time.sleep(int(argument)),
    "abort": abort,
    "garbage": garbage,
    "loud": loud,
    "pid": lambda *_: say(str(os.getpid())),
    "modules": lambda argument, _: say(" ".join(sorted(set(argument.split("-")) & set(sys.modules)))),
    "oom_score": lambda *_: say(Path("/proc/self/oom_score_adj").read_text()),
    "core_limit": lambda *_: say(Path("/proc/self/limits").read_text().split("core file size")[1]),
    "memory": lambda *_: np.ones((2**40, 2**20), dtype=np.uint8),
    "value_error": lambda argument, _: fail(ValueError(argument)),
    "needs_two": lambda argument, _: fail(NeedsTwo(argument, 2)),
    "nothing": lambda *_: None,
}
