"""One shard of one part of a split, from video files to a committed shard: the unit of work of every kind of extraction."""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from vcache.extract.backbone import FrozenBackbone, Taps
from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.decode import decode_video
from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import Sampling
from vcache.extract.video import DecodeRequest, VideoError
from vcache.extract.views import EvaluationView, PreparedClip
from vcache.heads.cross_frame import cross_frame_maps
from vcache.pipelines.precision import channel_constants, encoded
from vcache.store.layout import ArraySpec
from vcache.store.parts import PartName, split_of
from vcache.store.quantise import source_name
from vcache.store.reader import FeatureStore
from vcache.store.writer import RowFailure, ShardWriter

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ShardTask:
    """The rows of one shard and the arrays that it still lacks."""

    part: PartName
    shard: int
    rows: range
    """Rows of the part."""
    arrays: tuple[ArraySpec, ...]


@dataclass
class ExtractionProgress:
    """Running counts, reported after every batch."""

    videos_total: int = 0
    """Videos that this run has to do; those stored before are not among them."""
    videos_done: int = 0
    videos_skipped: int = 0
    """Already in the store when the run began."""
    failures: int = 0
    frames_done: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class _Row:
    task: ShardTask
    row: int
    video: Video
    clip: PreparedClip | VideoError


def missing_shards(store: FeatureStore, splits: Iterable[str], arrays: Iterable[ArraySpec]) -> list[ShardTask]:
    """The shards of these splits that lack some of the arrays, with the arrays each of them lacks."""
    wanted, tasks = tuple(arrays), []
    for part in itertools.chain.from_iterable(store.parts(split) for split in splits):
        for shard in range(store.num_shards(part)):
            stored = store.committed_arrays(part, shard)
            if missing := tuple(spec for spec in wanted if spec.name not in stored):
                tasks.append(ShardTask(part, shard, store.shard_rows(part, shard), missing))
    return tasks


class ShardExtractor:
    """Decodes ahead in threads, runs the backbone on batches of clips, writes rows in order and commits shard by shard."""

    def __init__(
        self,
        dataset: VideoDataset,
        sampling: Sampling,
        preprocessing: Preprocessing,
        backbone: FrozenBackbone,
        *,
        num_threads: int,
        batch_size: int,
    ) -> None:
        self.dataset, self.sampling, self.preprocessing, self.backbone = dataset, sampling, preprocessing, backbone
        self.num_threads, self.batch_size = num_threads, batch_size
        self.constants: dict[str, torch.Tensor] = {}
        """What int8 is made with (precision.py); `run` takes those of the store."""

    def run(
        self, store: FeatureStore, tasks: Iterable[ShardTask], progress: ExtractionProgress, report: Callable[[], None]
    ) -> None:
        """Extract and commit the tasks one after the other; `report` is called after every batch of clips.

        A video that cannot be used is recorded as failed and the run goes on; any other error stops it, with the shards
        before it committed and nothing of the shard at hand.
        """
        tasks = tuple(tasks)
        quantised = {spec.name for task in tasks for spec in task.arrays if spec.dtype == "int8"}
        self.constants = channel_constants(store, quantised, self.backbone.device)
        jobs = self._jobs(store, tasks)
        for task, rows in itertools.groupby(self._decode_ahead(jobs), key=lambda row: row.task):
            with ShardWriter(store, task.part, task.shard, task.arrays) as writer:
                # Batches end with the shard, so that a row has the same neighbours in its batch after any resume.
                for batch in _batched(rows, self.batch_size):
                    self._write_batch(writer, batch, progress)
                    report()

    def _jobs(self, store: FeatureStore, tasks: Iterable[ShardTask]) -> Iterator[tuple[ShardTask, int, Video]]:
        """Every row with its video, found by its id: the dataset may list more videos now, or in another order."""
        videos = {(video.split, video.video_id): video for video in self.dataset.videos}
        for task in tasks:
            ids = store.part_videos(task.part).ids
            for row in task.rows:
                yield task, row, videos[split_of(task.part), ids[row]]

    def _decode_ahead(self, jobs: Iterable[tuple[ShardTask, int, Video]]) -> Iterator[_Row]:
        """Rows in the order of the jobs, with two batches decoded or being decoded ahead."""
        pending: deque[Future[_Row]] = deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode")
        try:
            for job in jobs:
                pending.append(pool.submit(self._decode, *job))
                if len(pending) > self.num_threads + 2 * self.batch_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, task: ShardTask, row: int, video: Video) -> _Row:
        try:
            return _Row(task, row, video, self.prepare(video))
        except VideoError as error:
            return _Row(task, row, video, error)

    def prepare(self, video: Video) -> PreparedClip:
        """Decode and preprocess one video; VideoError if it cannot be used. Safe in several threads."""
        view, path = EvaluationView(), self.dataset.root / video.path
        rules = (view.clip_rule(self.sampling, video.video_id),)
        return view.prepare(decode_video(DecodeRequest(path=path, clips=rules)), 0, self.preprocessing, video.video_id)

    def _write_batch(self, writer: ShardWriter, batch: tuple[_Row, ...], progress: ExtractionProgress) -> None:
        clips = [row.clip for row in batch if isinstance(row.clip, PreparedClip)]
        features = iter(self.forward(clips, batch[0].task.arrays)) if clips else iter(())
        table = writer.store.part_videos(writer.part)
        for row in batch:
            if isinstance(row.clip, VideoError):
                path = table.paths[row.row]  # as listed when the row was made; the file may lie elsewhere now
                writer.fail(RowFailure(row.row, row.video.video_id, path, row.clip.kind, row.clip.reason))
                progress.failures += 1
            else:
                arrays = next(features)
                writer.write(row.row, arrays)
                progress.frames_done += len(row.clip.images)
                progress.bytes_written += sum(array.nbytes for array in arrays.values())
            progress.videos_done += 1

    def forward(self, clips: list[PreparedClip], arrays: tuple[ArraySpec, ...]) -> list[dict[str, np.ndarray]]:
        """The arrays of each clip, by name, in the dtypes of the store."""
        specs = {spec.name: spec for spec in arrays}
        # Scales may be asked for without what they scale: a repair writes single arrays.
        dtypes = {
            source_name(name): spec.dtype if name == source_name(name) else "int8" for name, spec in specs.items()
        }
        stored: dict[str, torch.Tensor] = {}
        for name, feature in self.features(clips, dtypes).items():
            stored |= encoded(name, feature, dtypes[name], self.constants)
        split = {
            name: stored[name].cpu().numpy().reshape(len(clips), *specs[name].shape) for name in specs if name in stored
        }
        return [
            {name: values[b] for name, values in split.items()}
            | {name: array for name, array in clip.record.items() if name in specs}
            for b, clip in enumerate(clips)
        ]

    def features(self, clips: list[PreparedClip], names: Collection[str]) -> dict[str, torch.Tensor]:
        """Those of the named arrays that the backbone computes, in float32 on its device.

        Frame by frame, (B*T, *shape of a frame), but maps, which are clip by clip: (B, T-1, 2, P, P).
        """
        layers = {kind: _layers(names, kind) for kind in ("tokens", "cls", "q", "k", "maps", "block_input")}
        pixels = torch.cat([clip.images for clip in clips]).to(self.backbone.device)
        images = self.preprocessing.normalise(pixels)  # (B*T, 3, S, S)
        taps = self.backbone(
            images,
            tokens=sorted({*layers["tokens"], *layers["cls"]}),
            qk=sorted({*layers["q"], *layers["k"], *layers["maps"]}),
            inputs=layers["block_input"],
        )
        computed = _by_array_name(taps) | _maps(taps, layers["maps"], len(clips))
        return {name: computed[name] for name in names if name in computed}


def _layers(names: Iterable[str], kind: str) -> tuple[int, ...]:
    return tuple(int(name.split("/")[1]) for name in names if name.startswith(f"{kind}/"))


def _by_array_name(taps: Taps) -> dict[str, torch.Tensor]:
    named = {"embed": taps.embed}
    named |= {f"tokens/{layer}": tokens for layer, tokens in taps.tokens.items()}
    named |= {f"cls/{layer}": tokens[:, 0] for layer, tokens in taps.tokens.items()}
    named |= {f"block_input/{layer}": tokens for layer, tokens in taps.inputs.items()}
    named |= {f"q/{layer}": q for layer, q in taps.q.items()}
    return named | {f"k/{layer}": k for layer, k in taps.k.items()}


def _maps(taps: Taps, layers: Iterable[int], num_clips: int) -> dict[str, torch.Tensor]:
    """The cross-frame maps of whole clips, where the backbone saw only frames."""

    def clips(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (num_clips, -1))  # (B, T, H, N, d)

    return {f"maps/{layer}": cross_frame_maps(clips(taps.q[layer]), clips(taps.k[layer])) for layer in layers}


def _batched(items: Iterable[_Item], size: int) -> Iterator[tuple[_Item, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
