"""Videos to scores: decoded ahead of the backbone by several threads, in batches over the videos and their views, in order."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.extract.views import EvaluationView, PreparedClip
from vcache.pipelines.decoding import Decoder
from vcache.pipelines.evaluation.averaging import Average, ScoreMean
from vcache.pipelines.prediction.video_model import VideoModel
from vcache.pipelines.stages import PreparedVideo, prepared_clips


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoScores:
    """What a head says of a video, or why it says nothing."""

    video: Video
    scores: Float[Tensor, " K"] | None = None
    """Of one view the logits, of several what averaging.py makes of them."""
    failure: VideoError | None = None
    num_video_frames: int = 0
    """Of the whole file."""
    fps: float | None = None
    frames: tuple[int, int] = (0, 0)
    """The first and the last frame of the file that was looked at."""


def predict_stream(
    model: VideoModel,
    videos: Iterable[Video],
    views: Sequence[EvaluationView],
    decoder: Decoder,
    num_threads: int,
    average: Average = "softmax",
) -> Iterator[VideoScores]:
    """The scores of each video, in order; of several views their average. One that cannot be used costs itself.

    What is held is at most the prepared clips of `num_threads` videos and of those of two batches.
    """
    batch_size = model.extractor.batch_size
    waiting: deque[_Pending] = deque()
    clips: list[tuple[_Pending, PreparedClip]] = []
    read_ahead = num_threads + 2 * max(1, batch_size // len(views))
    with closing(_prepared_ahead(model, videos, views, decoder, num_threads, read_ahead)) as prepared:
        for video, result in prepared:
            pending = _Pending(video, result)
            waiting.append(pending)
            clips += [(pending, clip) for clip in pending.clips]
            while len(clips) >= batch_size:
                _run(model, clips[:batch_size], average if len(views) > 1 else None)
                del clips[:batch_size]
            yield from _finished(model, waiting, average)
    if clips:
        _run(model, clips, average if len(views) > 1 else None)
    yield from _finished(model, waiting, average)


class _Pending:
    """A video whose clips are on their way through the backbone."""

    def __init__(self, video: Video, result: PreparedVideo | VideoError) -> None:
        self.video, self.result = video, result
        self.clips = () if isinstance(result, VideoError) else result.clips
        self.outputs: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        return len(self.outputs) == len(self.clips)

    def scored(self, model: VideoModel, average: Average) -> VideoScores:
        if isinstance(self.result, VideoError):
            return VideoScores(video=self.video, failure=self.result)
        return VideoScores(
            video=self.video,
            scores=_averaged(model, self.outputs, average),
            num_video_frames=self.result.num_video_frames,
            fps=self.result.fps,
            frames=_covered(self.result.clips),
        )


def _averaged(model: VideoModel, outputs: Sequence[Tensor], average: Average) -> Float[Tensor, " K"]:
    if len(outputs) == 1:
        return outputs[0]
    mean = ScoreMean(average, multi_label=model.multi_label)
    for output in outputs:
        mean.add(output.unsqueeze(0))
    scores = mean.result()
    return (model.classified(scores) if average == "embeddings" else scores)[0].float()


def _covered(clips: Sequence[PreparedClip]) -> tuple[int, int]:
    frames = [int(frame) for clip in clips for frame in clip.record["frame_index"][[0, -1]]]
    return min(frames), max(frames)


def _run(model: VideoModel, batch: Sequence[tuple[_Pending, PreparedClip]], average: Average | None) -> None:
    """One batch; `average` is None where nothing is averaged."""
    forward = model.embeddings if average == "embeddings" else model.scores
    for (pending, _), output in zip(batch, forward([clip for _, clip in batch]), strict=True):
        pending.outputs.append(output)


def _finished(model: VideoModel, waiting: deque[_Pending], average: Average) -> Iterator[VideoScores]:
    while waiting and waiting[0].is_done:
        yield waiting.popleft().scored(model, average)


def _prepared_ahead(
    model: VideoModel,
    videos: Iterable[Video],
    views: Sequence[EvaluationView],
    decoder: Decoder,
    num_threads: int,
    read_ahead: int,
) -> Generator[tuple[Video, PreparedVideo | VideoError]]:
    """Each video with its views, in order, with up to `read_ahead` of them decoded or being decoded ahead."""
    wanted = [(model.extractor, view) for view in views]

    def prepare(video: Video) -> tuple[Video, PreparedVideo | VideoError]:
        try:
            return video, prepared_clips(wanted, video, decoder.decode)
        except VideoError as error:
            return video, error

    pending: deque[Future[tuple[Video, PreparedVideo | VideoError]]] = deque()
    pool = ThreadPoolExecutor(num_threads, "decode")
    try:
        for video in videos:
            pending.append(pool.submit(prepare, video))
            if len(pending) >= read_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:  # also where the caller stops asking
        decoder.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
