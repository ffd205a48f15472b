"""`--frame-step n`: every n-th of the stored frames, from the first on, without reading the others.

Of clips of stride s that makes clips of stride n s. They begin where the stored clips do:

    stored, 6 frames of stride 2    . x . x . x . x . x . x .        n = 3     . x . . . . . x . . . . .
    2 frames of stride 6            . . . x . . . . . x . . .

In a video that is long enough for a choice, that is up to (n - 1) s / 2 frames before the middle window of stride n s, and a
random window begins where the longer one fits. In a video that is not longer than the window of stride n s, they are the frames
that would have been extracted with it.
"""

from collections.abc import Mapping
from typing import Any


def frame_step_problem(frame_step: int, request: Mapping[str, Any]) -> str | None:
    """Why clips extracted by this request cannot be read at the frame step, to follow the name of a store; None if they can."""
    frames = request["frames"]
    if frame_step < 1 or frames % frame_step:
        return f"holds clips of {frames} frames, which --frame-step {frame_step} does not divide. Choose one that does."
    if frame_step > 1 and request.get("tsn"):
        return (
            f"holds one frame of each of {frames} segments of a video, and every {frame_step}. of them is not one of each of "
            f"{frames // frame_step} segments. Leave out --frame-step, or extract with --tsn --frames {frames // frame_step}."
        )
    return None


def strided_hint(wanted: int, request: Mapping[str, Any]) -> str:
    """A line on how to have clips of `wanted` frames from what is stored, or nothing."""
    step, rest = divmod(request["frames"], wanted)
    if rest or step < 2 or request.get("tsn"):
        return ""
    return (
        f"\nor read every {step}. of the stored frames, of stride {step * request['stride']}, with --frame-step {step}."
    )
