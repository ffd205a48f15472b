"""What is to be extracted: the shards that lack arrays, and those of them that the same videos fill, joined into jobs.

A task is one shard of one view of one store, written by one writer; a job is the tasks that one pass over the same videos
serves, whatever the view and whatever the store. Rows are computed in batches of a fixed size, each in a fixed slot:

    rows of the shard    64 65 66 67 | 68 69 70          batch_size 4; row 70 is the last
    slot                  0  1  2  3 |  0  1  2  -       a slot without a clip is computed all the same, and thrown away
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vcache.extract.datasets.base import Video
from vcache.extract.views import View
from vcache.pipelines.batches import ClipExtractor
from vcache.store.layout import ArraySpec
from vcache.store.parts import PartName, split_of
from vcache.store.reader import FeatureStore


@dataclass(frozen=True)
class ShardTask:
    """The rows of one shard and the arrays of a view that it still lacks."""

    part: PartName
    shard: int
    rows: range
    """Rows of the part."""
    arrays: tuple[ArraySpec, ...]
    view: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A store and what computes its rows."""

    store: FeatureStore
    extractor: ClipExtractor
    views: Mapping[int, View]
    """The definitions of the views, by number."""


@dataclass(frozen=True, eq=False)
class TargetTask:
    """A task of one of the stores that a run writes."""

    target: Target
    task: ShardTask

    @property
    def view(self) -> View:
        return self.target.views[self.task.view]

    def slot(self, row: int) -> int:
        """Where in its batch a row of the part is computed."""
        return slot_of(row, self.task.rows, self.target.extractor.batch_size)


@dataclass(frozen=True, eq=False)
class ShardJob:
    """Some videos, and all that a pass over them fills: row `task.rows[i]` of each task is of video i."""

    videos: tuple[Video, ...]
    tasks: tuple[TargetTask, ...]


def slot_of(row: int, shard_rows: range, batch_size: int) -> int:
    """The place of a row of a shard in its batch, whatever became of the rows around it."""
    return (row - shard_rows.start) % batch_size


def missing_shards(
    store: FeatureStore, splits: Iterable[str], arrays: Mapping[int, Iterable[ArraySpec]] | Iterable[ArraySpec]
) -> list[ShardTask]:
    """The shards of these splits that lack some of the arrays, with the arrays each of them lacks.

    Args:
        arrays: of each view by number, or those of view 0.
    """
    by_view = arrays if isinstance(arrays, Mapping) else {0: arrays}
    wanted = {view: tuple(specs) for view, specs in by_view.items()}
    tasks = []
    for part in itertools.chain.from_iterable(store.parts(split) for split in splits):
        for shard in range(store.num_shards(part)):
            for view, specs in wanted.items():
                stored = store.committed_arrays(part, shard, view)
                if missing := tuple(spec for spec in specs if spec.name not in stored):
                    tasks.append(ShardTask(part, shard, store.shard_rows(part, shard), missing, view))
    return tasks


def joined_jobs(tasks: Iterable[TargetTask]) -> list[ShardJob]:
    """The tasks as jobs, in the order of the first task of each; tasks over exactly the same videos are one job."""
    jobs: dict[tuple[str, tuple[str, ...]], list[TargetTask]] = {}
    for task in tasks:
        jobs.setdefault((split_of(task.task.part), _video_ids(task)), []).append(task)
    videos = _VideoLists()
    return [ShardJob(tuple(videos.of(group[0])), tuple(group)) for group in jobs.values()]


def _video_ids(task: TargetTask) -> tuple[str, ...]:
    rows = task.task.rows
    return task.target.store.part_videos(task.task.part).ids[rows.start : rows.stop]


class _VideoLists:
    """The videos of tasks, found by their ids: the dataset may list more videos now, or in another order."""

    def __init__(self) -> None:
        self._by_id: dict[int, dict[tuple[str, str], Video]] = {}

    def of(self, task: TargetTask) -> Iterator[Video]:
        dataset = task.target.extractor.dataset
        if id(dataset) not in self._by_id:
            self._by_id[id(dataset)] = {(video.split, video.video_id): video for video in dataset.videos}
        split = split_of(task.task.part)
        yield from (self._by_id[id(dataset)][split, video_id] for video_id in _video_ids(task))
