"""Whether a compiled program gives the logits of the model it was made of: asked before it is left anywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from vcache.pipelines.prediction.export_program import ProgramInput
from vcache.pipelines.prediction.video_model import VideoModel

TOLERANCE = 1e-4
"""Largest difference of a logit; of logits that are larger than 1, of the largest."""
ROUNDED = {"bfloat16": 8.0, "int8": 8.0}
"""How many times that is allowed where features are stored more coarsely than float16: a value that lies between two steps may be
rounded to the other one, for a difference of a millionth."""
_CLIPS = 3
"""Of the batch that is compared, another number than the program was traced with (export_onnx.py), whatever the model's batch."""
Run = Callable[[UInt8[np.ndarray, "B F S S 3"]], Float[np.ndarray, "B K"]]
"""A program that was loaded from its file."""


class ExportError(ValueError):
    """What was asked for cannot be exported, or came out wrong; nothing is left."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What came out of the comparison."""

    max_difference: float
    """Of any logit."""
    tolerance: float
    largest_logit: float
    num_clips: int

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON has."""
        return dict(vars(self))


def check_program(name: str, run: Run, model: VideoModel) -> Checked:
    """Compare the program with `VideoModel.scores` on clips of noise, one at a time and several.

    Raises:
        ExportError: it gives other logits.
    """
    taken, batch = ProgramInput.of(model), min(_CLIPS, model.extractor.batch_size)
    clips = taken.random_clips(model, _CLIPS)
    wanted = torch.cat([model.scores(clips[i : i + batch]) for i in range(0, _CLIPS, batch)])
    alone, together = (torch.from_numpy(run(taken.frames(some).numpy())) for some in (clips[:1], clips))
    got = torch.cat([alone, together])
    if got.shape != (1 + _CLIPS, wanted.shape[1]):
        raise ExportError(f"{name} gives logits of shape {tuple(together.shape)} for {_CLIPS} clips: it is not kept.")
    difference = float((got - torch.cat([wanted[:1], wanted])).abs().max())
    largest = float(wanted.abs().max())
    tolerance = TOLERANCE * max(1.0, largest) * max(ROUNDED.get(spec.dtype, 1.0) for spec in model.arrays)
    if not difference <= tolerance:  # a NaN is no agreement either
        raise ExportError(
            f"{name} gives other logits than the model: they differ by {difference:.1e}, and {tolerance:.1e} is allowed. It is "
            "not kept. The folder without it does everything that `vcache predict` needs:  leave out --format."
        )
    return Checked(max_difference=difference, tolerance=tolerance, largest_logit=largest, num_clips=1 + _CLIPS)
