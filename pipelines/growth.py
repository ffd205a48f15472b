"""A dataset's list against a store's, by id: which videos are new, and whether those stored are still what they were."""

from collections.abc import Iterable

import numpy as np

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore


class DatasetChanged(ValueError):
    """The dataset lists other things than the store was made of, and not only more videos."""


def check_classes(store: FeatureStore, dataset: VideoDataset) -> None:
    """Raise DatasetChanged unless the classes are those of the store, in the same order: labels are positions in it."""
    stored, listed = store.manifest.class_names, dataset.class_names
    if stored == listed:
        return
    changes = [f"{name} is new" for name in listed if name not in stored]
    changes += [f"{name} is gone" for name in stored if name not in listed]
    raise DatasetChanged(
        f"{dataset.name} now has {len(listed)} classes, {store.path.name} was made with {len(stored)}: "
        f"{_first_few(changes) or 'they come in another order'}. A label is a position in the list of classes, so other "
        "classes need a new store: name one with --store PATH, or restore the list."
    )


def new_videos(store: FeatureStore, dataset: VideoDataset, split: str) -> tuple[Video, ...]:
    """The videos of a split that the store does not know, in the order of the dataset; all, where it does not know the split.

    Raises:
        DatasetChanged: a stored video is not listed any more or has another label, or none of the new ones is on the disk.
    """
    if split not in store.splits:
        return tuple(dataset.split(split))
    stored, videos = store.videos(split), dataset.split(split)
    listed = {video.video_id: video for video in videos}
    what = f"{dataset.name}/{split}"
    if gone := [repr(name) for name in stored.ids if name not in listed]:
        raise DatasetChanged(
            f"{what} no longer lists {len(gone)} of the {len(stored)} videos that {store.path.name} was made with: "
            f"{_first_few(gone)}. Restore the list, or extract into a new store with --store PATH."
        )
    pairs = zip(stored.ids, stored.labels.tolist(), strict=True)
    if other := [_relabelled(listed[name], label, dataset) for name, label in pairs if listed[name].label != label]:
        raise DatasetChanged(
            f"{what} gives {len(other)} videos of {store.path.name} another label: {_first_few(other)}. Restore the list, "
            "or extract into a new store with --store PATH."
        )
    known = frozenset(stored.ids)
    new = tuple(video for video in videos if video.video_id not in known)
    _check_on_disk(new, dataset, what)
    return new


def video_table(videos: Iterable[Video]) -> VideoTable:
    """The table that a store keeps of these videos."""
    videos = tuple(videos)
    return VideoTable(
        ids=tuple(video.video_id for video in videos),
        paths=tuple(video.path for video in videos),
        labels=np.array([video.label for video in videos], dtype=np.int64),
    )


def _check_on_disk(new: tuple[Video, ...], dataset: VideoDataset, what: str) -> None:
    """A list that is ahead of the disk: every new video would be recorded as failed, for good."""
    if new and not any((dataset.root / video.path).is_file() for video in new):
        raise DatasetChanged(
            f"none of the {len(new)} new videos that {what} lists is in {dataset.root}; the first should be "
            f"{dataset.root / new[0].path}. Put them there, or take them off the list."
        )


def _relabelled(video: Video, stored: int, dataset: VideoDataset) -> str:
    return f"{video.video_id!r} was {dataset.class_names[stored]}, is {dataset.class_names[video.label]}"


def _first_few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
