"""`vcache predict`: a trained head on new videos, whole or in windows along them."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.pipelines.console import count, duration
from vcache.pipelines.decoding import Decoder, new_decoder
from vcache.pipelines.evaluation.averaging import Average, choose_average
from vcache.pipelines.prediction.sources import Collected, collect_videos
from vcache.pipelines.prediction.stream import VideoScores, predict_stream
from vcache.pipelines.prediction.video_model import VideoModel, open_video_model
from vcache.pipelines.prediction.windows import SEEKABLE, Timeline, cut_windows
from vcache.pipelines.stored_views import ONE_VIEW, ViewGrid, grid_word
from vcache.store.object_path import StorePath

_MUCH_LONGER = 4
"""Times the stretch that clips are usually of, from which on a clip of a video says little of it: it is told."""


_MOST_NOTES = 3
"""On long videos, before they are only counted."""


class PredictError(ValueError):
    """Something that cannot be predicted as asked."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What `vcache predict` is asked."""

    run: Path
    videos: tuple[str, ...]
    """Files, folders, ids of the run's store."""
    store: StorePath | None = None
    which: str = "last"
    views: ViewGrid = ONE_VIEW
    average: str | None = None
    """None: as the head's paper does."""
    window: float | None = None
    """Seconds; None: each video is one clip."""
    stride: float | None = None
    """Seconds between the beginnings of windows; None: as long as a window."""
    batch_size: int | None = None
    """None: as the store was made."""
    decode_workers: int | None = None
    """None: the cores."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise PredictError("--stride is of windows. Say how long they are with --window SECONDS.")
        for name, seconds in (("--window", self.window), ("--stride", self.stride)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise PredictError(f"{name} {seconds:g}: say seconds, more than 0.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a head says of videos, in the order in which they were named."""

    model: VideoModel
    views: ViewGrid
    average: Average
    num_others: int
    """Files of the folders that are no videos."""
    whole: tuple[VideoScores, ...]
    """Of whole videos. Where windows were asked for, only those that could not be read."""
    timelines: tuple[Timeline, ...] = ()
    """Where windows were asked for, of each video that could be read."""

    @property
    def failures(self) -> tuple[VideoScores, ...]:
        return tuple(one for one in self.whole if one.failure is not None)

    @property
    def is_complete(self) -> bool:
        """Whether every video, and every window, could be read."""
        return not self.failures and not any(any(timeline.failures) for timeline in self.timelines)


def predict(
    config: PredictConfig,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda note: None,
    on_timeline: Callable[[Timeline], None] = lambda timeline: None,
) -> Prediction:
    """Predict videos with the head of a run, or of a folder that `vcache export` wrote. A broken video costs itself.

    `on_timeline` gets each timeline when it is done, before the next video is looked at.

    Raises:
        UnknownVideo: no such file, folder or id.
        AverageError, PredictError: the head has no such average, or the backbone no such crops.
        WindowError: a video cannot be cut into windows.
        RunError, StoreKeyMismatch, HeadStoreMismatch, CannotRecompute: as for `open_video_model`.
    """
    on_stage("loading the backbone")
    model = open_video_model(config.run, store=config.store, which=config.which, device=config.device)
    for note in model.notes:
        on_note(note)
    average = choose_average(config.average, model.head, model.name)
    _check_crops(model, config.views)
    if config.batch_size is not None:
        model.extractor.batch_size = config.batch_size
    workers = config.decode_workers or os.cpu_count() or 1
    frame_folders = model.extractor.decoder == "images"
    collected = collect_videos(config.videos, model.store, frame_folders=frame_folders)
    decoder = new_decoder(workers, model.extractor.decoder)
    predictor = _Predictor(model, config, average, decoder, workers, on_stage, on_note, on_timeline)
    try:
        whole, timelines = predictor.in_windows(collected) if config.window else (predictor.whole(collected), ())
    finally:
        decoder.close()
    return Prediction(
        model=model,
        views=config.views,
        average=average,
        num_others=collected.num_others,
        whole=whole,
        timelines=timelines,
    )


def _check_crops(model: VideoModel, views: ViewGrid) -> None:
    if views[1] > 1 and model.extractor.preprocessing.resize_mode == "squash":
        raise PredictError(
            f"--views {grid_word(views)}: the backbone is shown whole frames made square, of which there is one crop. "
            f"Say --views {views[0]}x1."
        )


@dataclass(frozen=True)
class _Predictor:
    model: VideoModel
    config: PredictConfig
    average: Average
    decoder: Decoder
    workers: int
    on_stage: Callable[[str], None]
    on_note: Callable[[str], None]
    on_timeline: Callable[[Timeline], None]

    def whole(self, collected: Collected) -> tuple[VideoScores, ...]:
        done, num_long = [], 0
        self.on_stage(f"0/{count(len(collected.videos), 'video')}")
        for one in self._scores(collected.videos):
            done.append(one)
            self.on_stage(f"{len(done)}/{count(len(collected.videos), 'video')}")
            if note := _long_note(self.model, one):
                num_long += 1
                if num_long <= _MOST_NOTES:
                    self.on_note(note)
        if num_long > _MOST_NOTES:
            self.on_note(f"The same holds for {count(num_long - _MOST_NOTES, 'more video')}.")
        return tuple(done)

    def in_windows(self, collected: Collected) -> tuple[tuple[VideoScores, ...], tuple[Timeline, ...]]:
        """Video after video; those that cannot be read, and the timelines of the others."""
        failed, timelines = [], []
        for video in collected.videos:
            self.on_stage(f"looking at {video.video_id}")
            try:
                timelines.append(self._timeline(video))
            except VideoError as error:
                failed.append(VideoScores(video=video, failure=error))
            else:
                self.on_timeline(timelines[-1])
        return tuple(failed), tuple(timelines)

    def _timeline(self, video: Video) -> Timeline:
        assert self.config.window is not None
        stride = self.config.stride or self.config.window
        windows = cut_windows(self.model, self.decoder, video, self.config.window, stride)
        if len(windows) > 1 and Path(video.path).suffix.lower() not in SEEKABLE:
            self.on_note(
                f"{video.video_id} may have no index by time, and is then decoded from its beginning for each of "
                f"{len(windows)} windows. Faster, of an H.264 copy:  ffmpeg -i FILE -c:v libx264 -an FILE.mp4"
            )
        found = []
        for one in self._scores(windows):
            found.append(one)
            self.on_stage(f"{video.video_id}: {len(found)}/{count(len(windows), 'window')}")
        return Timeline.of(self.model, video, found)

    def _scores(self, videos: Sequence[Video]) -> Iterator[VideoScores]:
        views = self.model.views(self.config.views)
        return predict_stream(self.model, videos, views, self.decoder, self.workers, self.average)


def _long_note(model: VideoModel, one: VideoScores) -> str | None:
    """Of a video of which a clip sees little, or frames much further apart than those trained on."""
    usual, segment = model.usual_frames, one.video.segment
    if usual is None or segment is not None or one.num_video_frames <= _MUCH_LONGER * usual:
        return None
    long, span = (
        duration(frames / one.fps) if one.fps else count(frames, "frame") for frames in (one.num_video_frames, usual)
    )
    seconds = f"{usual / one.fps:.3g}" if one.fps else "SECONDS"
    seen = one.frames[1] - one.frames[0] + 1
    sees = (
        f"the clip is of frames {one.frames[0]} to {one.frames[1]} alone"
        if seen <= _MUCH_LONGER * usual
        else f"its {model.extractor.sampling.num_frames} frames are spread over all of it"
    )
    return (
        f"{one.video.video_id} is {long} long, and the clips that the head was trained on are of about {span}: {sees}. "
        f"Predict along it with:  --window {seconds}"
    )
