"""Training with the decoder's frames and the backbone in the loop, for accuracy.py: features that no epoch has seen before.

Everything else is what `vcache train-head` does: order of the videos, head, optimiser, rounding to the dtype of the store.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from torch import Tensor

from vcache.extract.datasets.base import Video
from vcache.extract.sampling import ClipRule, StridedSampling
from vcache.extract.video import DecodedVideo, DecodeRequest, distinct_frames
from vcache.extract.views import View
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.decoding import Decode, decode_here
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.loading.sources import ArraySelection, Part
from vcache.pipelines.read_plan import ReadPlan


class KeptFrames:
    """A decoder that opens each video once: all of its frames stay in memory as uint8, and clips are picked from them."""

    def __init__(self, decode: Decode = decode_here) -> None:
        self._decode, self._videos = decode, dict[Path, DecodedVideo]()

    def __call__(self, request: DecodeRequest) -> DecodedVideo:
        """
        Raises:
            ValueError: a segment of a video is asked for.
        """
        if request.segment is not None:
            raise ValueError(f"{request.path.name}: only whole videos are kept, and a segment was asked for")
        if request.path not in self._videos:
            self._videos[request.path] = self._whole(request)
        video = self._videos[request.path]
        _, clips = request.resolve(video.num_video_frames, ())
        numbers = distinct_frames(clips)
        return replace(video, frames=video.pick(numbers), numbers=numbers, clips=clips)

    def _whole(self, request: DecodeRequest) -> DecodedVideo:
        num_frames = self._decode(request).num_video_frames
        every = ClipRule(sampling=StridedSampling(num_frames=num_frames, stride_frames=1))
        return self._decode(replace(request, clips=(every,)))


class OnlineSource:
    """In place of a store's rows: each batch is prepared in one view and run through the backbone when it is asked for."""

    def __init__(self, extractor: ClipExtractor, videos: Sequence[Video], view: View) -> None:
        """`videos` are those of the split, row by row."""
        self.extractor, self.videos, self.view = extractor, videos, view

    def selection(self, wanted: ArraySelection) -> ArraySelection:
        return wanted

    def batches(self, parts: Sequence[Part], wanted: ArraySelection) -> Iterator[dict[str, Tensor]]:
        for part in parts:
            clips = [self.extractor.prepare(self.videos[row], self.view) for row in part.rows]
            yield dict(self.extractor.start(clips, wanted.specs.values()).arrays)


@contextmanager
def online(extractor: ClipExtractor, view_of_epoch: Callable[[int], View]) -> Iterator[None]:
    """Within this, epochs of training read nothing from the store; validation does."""

    def epoch(
        self: ClipLoader, number: int, *, first_batch: int = 0, plans: Sequence[ReadPlan] | None = None
    ) -> Iterator[Batch]:
        rows = self.order.order(number, self.rows)
        by_id = {video.video_id: video for video in extractor.dataset.videos if video.split == self.split}
        videos = [by_id[video_id] for video_id in self.store.videos(self.split).ids]
        source = OnlineSource(extractor, videos, view_of_epoch(number))
        return self._batches(source, rows, np.zeros_like(rows), tuple(plans or self.plans), first_batch)

    with mock.patch.object(ClipLoader, "epoch", epoch):
        yield
