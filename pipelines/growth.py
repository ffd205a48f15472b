"""A dataset's list against a store's, by id: which videos are new, and whether those stored are still what they were.

What a store's table says of a video beyond id, path and label, a column each where the dataset has it:

    start_frame, stop_frame        float64 (rows,)     its segment of the file, 0-based, stop exclusive; NaN: the whole file
    start_seconds, stop_seconds    float64 (rows,)     the same in seconds
    multi_hot                      uint8 (rows, K)     1 for each of its classes
    actions                        text (rows,)        "92 11.9 21.2;147 0.0 12.6": class, start and stop in seconds
    <kind of label>, as "verb"     int64 (rows,)       index into `Manifest.facts["label_names"][kind]`
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.video import Segment
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore

_UNITS: tuple[tuple[Literal["frames", "seconds"], str], ...] = (("frames", "frame"), ("seconds", "seconds"))
_RESERVED = ("start_frame", "stop_frame", "start_seconds", "stop_seconds", "multi_hot", "actions")


class DatasetChanged(ValueError):
    """The dataset lists other things than the store was made of, and not only more videos."""


def check_classes(store: FeatureStore, dataset: VideoDataset) -> None:
    """Raise DatasetChanged unless the classes are those of the store, in the same order: labels are positions in it."""
    _check_label_names(store, dataset)
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
        DatasetChanged: a stored video is not listed any more, or with another label or segment, or none of the new ones is on
            the disk.
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
    _check_columns(stored, video_table([listed[name] for name in stored.ids], dataset), what, store.path.name)
    known = frozenset(stored.ids)
    new = tuple(video for video in videos if video.video_id not in known)
    _check_on_disk(new, dataset, what)
    return new


def video_table(videos: Iterable[Video], dataset: VideoDataset) -> VideoTable:
    """The table that a store keeps of these videos, all of one split of the dataset.

    The columns are those that the split needs, so that parts of it have the same ones.
    """
    videos = tuple(videos)
    return VideoTable(
        ids=tuple(video.video_id for video in videos),
        paths=tuple(video.path for video in videos),
        labels=np.array([video.label for video in videos], dtype=np.int64),
        columns=_columns(videos, dataset) if videos else {},
    )


def videos_of(table: VideoTable, split: str, rows: Sequence[int] | None = None) -> tuple[Video, ...]:
    """The videos that a table, or these rows of it, was made of: the inverse of `video_table`."""
    rows = range(len(table)) if rows is None else rows
    columns = {name: values[list(rows)].tolist() for name, values in table.columns.items()}
    kinds = sorted(name for name in columns if name not in _RESERVED)
    return tuple(
        Video(
            table.ids[row],
            table.paths[row],
            int(table.labels[row]),
            split,
            segment=_segment(columns, place),
            labels=tuple((kind, columns[kind][place]) for kind in kinds),
            classes=tuple(np.flatnonzero(columns["multi_hot"][place]).tolist()) if "multi_hot" in columns else (),
            actions=_parsed_actions(columns["actions"][place]) if "actions" in columns else (),
        )
        for place, row in enumerate(rows)
    )


def label_facts(dataset: VideoDataset) -> dict[str, Any]:
    """What the manifest says of the labels beyond the names of the classes; nothing where there is one label per video."""
    facts: dict[str, Any] = {}
    if dataset.label_names:
        facts["label_names"] = {kind: list(names) for kind, names in sorted(dataset.label_names.items())}
    return facts | ({"multi_label": True} if dataset.multi_label else {})


def _columns(videos: Sequence[Video], dataset: VideoDataset) -> dict[str, np.ndarray]:
    split = dataset.split(videos[0].split)
    columns: dict[str, np.ndarray] = {}
    assert not set(_RESERVED) & set(dataset.label_names), "a kind of label has the name of another column"
    for unit, name in _UNITS:
        if any(video.segment is not None and video.segment.unit == unit for video in split):
            bounds = np.array([_bounds(video.segment, unit) for video in videos], dtype=np.float64)
            columns |= {f"start_{name}": bounds[:, 0], f"stop_{name}": bounds[:, 1]}
    if dataset.multi_label:
        columns["multi_hot"] = np.zeros((len(videos), len(dataset.class_names)), dtype=np.uint8)
        for row, video in enumerate(videos):
            columns["multi_hot"][row, list(video.classes)] = 1
    if any(video.actions for video in split):
        columns["actions"] = np.array([_written_actions(video) for video in videos], dtype=np.dtypes.StringDType())
    for kind in dataset.label_names:
        columns[kind] = np.array([dict(video.labels)[kind] for video in videos], dtype=np.int64)
    return columns


def _bounds(segment: Segment | None, unit: str) -> tuple[float, float]:
    return (segment.start, segment.stop) if segment is not None and segment.unit == unit else (np.nan, np.nan)


def _segment(columns: dict[str, Any], place: int) -> Segment | None:
    for unit, name in _UNITS:
        if f"start_{name}" in columns and not np.isnan(columns[f"start_{name}"][place]):
            return Segment(columns[f"start_{name}"][place], columns[f"stop_{name}"][place], unit)
    return None


def _written_actions(video: Video) -> str:
    return ";".join(f"{label} {start!r} {stop!r}" for label, start, stop in video.actions)


def _parsed_actions(text: str) -> tuple[tuple[int, float, float], ...]:
    actions = (action.split() for action in text.split(";") if action)
    return tuple((int(label), float(start), float(stop)) for label, start, stop in actions)


def _check_label_names(store: FeatureStore, dataset: VideoDataset) -> None:
    facts, listed = store.manifest.facts, label_facts(dataset)
    stored = {name: facts[name] for name in ("label_names", "multi_label") if name in facts}
    if stored != listed:
        raise DatasetChanged(
            f"{dataset.name} has {_kinds_of_labels(listed)}, {store.path.name} was made with {_kinds_of_labels(stored)}: "
            "other kinds of labels, or other names of them, need a new store: name one with --store PATH, or restore the list."
        )


def _kinds_of_labels(facts: dict[str, Any]) -> str:
    kinds = ["several labels per video" if facts.get("multi_label") else "one label per video"]
    return " and ".join(kinds + [f"{len(names)} {kind} names" for kind, names in facts.get("label_names", {}).items()])


def _check_columns(stored: VideoTable, listed: VideoTable, what: str, store: str) -> None:
    """Raise DatasetChanged if the list says other things of the stored videos than their table."""
    mend = "Restore the list, or extract into a new store with --store PATH."
    if stored.columns.keys() != listed.columns.keys():
        one, other = (", ".join(sorted(table.columns)) or "nothing more" for table in (listed, stored))
        raise DatasetChanged(f"{what} says {one} of each video, {store} was made with {other}. {mend}")
    for name, before in stored.columns.items():
        now = listed.columns[name]
        if before.shape != now.shape or before.dtype != now.dtype:
            raise DatasetChanged(f"{what} gives {name} in another form than {store} was made with. {mend}")
        differs = (before != now) & ~((before != before) & (now != now))  # NaN is NaN
        if rows := np.flatnonzero(differs.reshape(len(before), -1).any(axis=1)).tolist():
            other = _first_few([_changed(stored.ids[row], before[row], now[row]) for row in rows])
            raise DatasetChanged(f"{what} gives {len(rows)} videos of {store} another {name}: {other}. {mend}")


def _changed(video_id: str, before: Any, now: Any) -> str:
    return f"{video_id!r}" if np.ndim(before) else f"{video_id!r} was {before}, is {now}"


def _check_on_disk(new: tuple[Video, ...], dataset: VideoDataset, what: str) -> None:
    """A list that is ahead of the disk: every new video would be recorded as failed, for good."""
    if new and not any((dataset.root / video.path).exists() for video in new):
        raise DatasetChanged(
            f"none of the {len(new)} new videos that {what} lists is in {dataset.root}; the first should be "
            f"{dataset.root / new[0].path}. Put them there, or take them off the list."
        )


def _relabelled(video: Video, stored: int, dataset: VideoDataset) -> str:
    was, now = ("no class" if label < 0 else dataset.class_names[label] for label in (stored, video.label))
    return f"{video.video_id!r} was {was}, is {now}"


def _first_few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
