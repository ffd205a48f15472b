"""Views: how every video of a store is turned into one clip of images. View 0 is the evaluation view.

decoded = decode_video(DecodeRequest(path=path, clips=tuple(view.clip_rule(sampling, video_id) for view in views)))
clip = views[0].prepare(decoded, 0, preprocessing, video_id)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import ClipRule, Sampling
from vcache.extract.video import DecodedVideo


@dataclass(frozen=True)
class PreparedClip:
    """One view of one video, ready for the backbone but for normalisation (`Preprocessing.normalise`)."""

    images: UInt8[Tensor, "T 3 S S"]
    record: Mapping[str, np.ndarray]
    """What was done to make the view, under the names of the store's arrays: `frame_index` (T,) int32, `crop` (4,) float32,
    which is top, left, height, width in pixels of the video, and `flip` () uint8."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The centre crop of one of the evaluation clips: `temporal` is (which, of how many)."""

    temporal: tuple[int, int] = (0, 1)

    def clip_rule(self, sampling: Sampling, video_id: str) -> ClipRule:
        """Which frames of this video the view takes."""
        which, of = self.temporal
        return ClipRule(sampling=sampling, view=which, num_views=of)

    def prepare(self, video: DecodedVideo, number: int, preprocessing: Preprocessing, video_id: str) -> PreparedClip:
        """The images of clip `number` of the decoded video, which was asked for with this view's rule."""
        height, width = video.frames.shape[1:3]
        record: dict[str, np.ndarray] = {
            "frame_index": np.array(video.clips[number], dtype=np.int32),
            "crop": np.array(preprocessing.crop_box(height, width), dtype=np.float32),
            "flip": np.zeros((), dtype=np.uint8),
        }
        return PreparedClip(preprocessing.pixels(video.clip(number)), record)
