"""Frames of videos of a store for people: its stored pixels, else decoded from the files where they are there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vcache.extract.sampling import ClipRule, sampling_from_dict
from vcache.extract.video import DecodeRequest, VideoError
from vcache.pipelines import decoding
from vcache.pipelines.growth import videos_of
from vcache.store.errors import StoreError
from vcache.store.reader import FeatureStore

Frames = UInt8[np.ndarray, "T H W 3"]
SHOWN = 4
"""Frames of a video."""
HIGH = 112
"""Pixels of a frame, from top to bottom."""
_GAP = 4


class FrameSource:
    """Where frames come from; what cannot be shown has its reason in `troubles`."""

    def __init__(self, store: FeatureStore, root: Path | None = None) -> None:
        self.store, self.root = store, root or Path(store.manifest.facts.get("root", "."))
        self.troubles: list[str] = []

    def frames(self, split: str, video_id: str) -> Frames | None:
        """A few frames of the clip of view 0, evenly spread over it; None where there are none."""
        ids = self.store.videos(split).ids
        if video_id not in ids:
            self.troubles.append(f"{self.store.path.name} does not list {video_id}")
            return None
        row = ids.index(video_id)
        try:
            stored = self._stored(split, row)
            return stored if stored is not None else self._decoded(split, row)
        except (VideoError, StoreError, OSError) as error:
            self.troubles.append(error.reason if isinstance(error, VideoError) else str(error))
            return None

    def _stored(self, split: str, row: int) -> Frames | None:
        if not self._has("pixels", split, row):
            return None
        pixels = self.store.read(split, "pixels", [row])[0]
        return np.asarray(pixels)[evenly(len(pixels), SHOWN)]

    def _decoded(self, split: str, row: int) -> Frames:
        (video,) = videos_of(self.store.videos(split), split, [row])
        path = self.root / video.path
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        request = DecodeRequest(
            path=path,
            clips=(ClipRule(sampling=sampling_from_dict(self.store.manifest.spec["sampling"])),),
            segment=video.segment,
            allow_partial=True,
            decoder=str(self.store.manifest.spec["decoder"]["decoder"]),
        )
        clip = decoding.decode_here(request).clip(0)
        return clip[evenly(len(clip), SHOWN)]

    def _has(self, name: str, split: str, row: int) -> bool:
        return name in self.store.arrays(split) and bool(self.store.committed_rows(split, [name])[row])


def evenly(number: int, most: int) -> list[int]:
    """Up to so many places of as many as there are, from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, number - 1, min(number, most))})


def strip(frames: Sequence[np.ndarray], high: int = HIGH) -> Image.Image:
    """Frames (H, W, 3) beside each other, each so many pixels high; small ones are enlarged by whole numbers first."""
    images = [_scaled(frame, high) for frame in frames]
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    sheet, left = Image.new("RGB", (width, high), (128, 128, 128)), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + _GAP
    return sheet


def _scaled(frame: np.ndarray, high: int) -> Image.Image:
    """A wide or tall frame is cut to at most twice as wide as high, so that strips stay alike."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    width = max(1, round(image.width * high / image.height))
    if image.height < high:
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
    image = image.resize((width, high), Image.Resampling.LANCZOS)
    return image.crop(((width - 2 * high) // 2, 0, (width + 2 * high) // 2, high)) if width > 2 * high else image
