"""Which video is meant: one that a store lists, by id, path or row, or any file."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from vcache.extract.datasets.base import Video
from vcache.pipelines.evaluation.evaluate import validation_split
from vcache.pipelines.growth import videos_of
from vcache.store.reader import FeatureStore


class UnknownVideo(LookupError):
    """Neither the store nor the disk has the video, or its name is that of several."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A video, and where it lies."""

    video: Video
    """Its path is relative to `root`; the label of a file that no store lists is -1."""
    root: Path
    split: str | None = None
    row: int | None = None
    damage: str | None = None
    """Why the store holds only a part of it."""

    @property
    def partial(self) -> bool:
        """Whether a damaged video will do."""
        return self.damage is not None


def find_video(
    store: FeatureStore, *, video: str | None, row: int | None, split: str | None, root: Path | None = None
) -> Target:
    """The video of that id, listed path or row; else the file of that path.

    Without a split, rows are those of the validation split, and the other names are looked for there first.

    Raises:
        UnknownVideo: there is no such row, id, path or file, or several videos have the path. Names the nearest id.
        SplitNotFound: the store has no such split.
    """
    lies = root or Path(store.manifest.facts["root"])
    splits = [split] if split else sorted(store.splits, key=lambda name: name != validation_split(store.splits))
    if (video is None) == (row is None):
        raise UnknownVideo("say which video: one of VIDEO and --row ROW.")
    if video is None:
        assert row is not None
        return _by_row(store, splits[0], row, lies)
    for name in splits:
        if (found := _listed_row(store, name, video, lies)) is not None:
            return _by_row(store, name, found, lies)
    if (file := Path(video)).exists():
        path = file.resolve()
        return Target(video=Video(file.stem, path.name, -1, "none"), root=path.parent)
    raise UnknownVideo(
        f"{video!r} is neither a video of {store.path.name} nor a file. {_nearest(store, splits, video)}"
    )


def _by_row(store: FeatureStore, split: str, row: int, root: Path) -> Target:
    table = store.videos(split)
    if not 0 <= row < len(table):
        raise UnknownVideo(f"row {row}: split {split!r} of {store.path.name} has the rows 0 to {len(table) - 1}.")
    (video,) = videos_of(table, split, [row])
    damage = next((f"{one.kind}: {one.reason}" for one in store.partial(split) if one.row == row), None)
    return Target(video=video, root=root, split=split, row=row, damage=damage)


def _listed_row(store: FeatureStore, split: str, name: str, root: Path) -> int | None:
    """The row with that id; else the only one with that path, which may be given from here or from the root."""
    table = store.videos(split)
    if name in table.ids:
        return table.ids.index(name)
    paths = {name, Path(name).as_posix()}
    if (file := Path(name).resolve()).is_relative_to(root.resolve()):
        paths.add(file.relative_to(root.resolve()).as_posix())
    rows = [row for row, path in enumerate(table.paths) if path in paths]
    if len(rows) > 1:
        ids = ", ".join(repr(table.ids[row]) for row in rows[:3])
        raise UnknownVideo(
            f"{name!r} holds {len(rows)} videos of split {split!r}. Name one of them by its id: {ids} ..."
        )
    return rows[0] if rows else None


def _nearest(store: FeatureStore, splits: list[str], name: str) -> str:
    ids = {video_id: split for split in reversed(splits) for video_id in store.videos(split).ids}
    near = difflib.get_close_matches(name, ids, n=1, cutoff=0.5)
    if near:
        return f"The nearest id is {near[0]!r} of split {ids[near[0]]!r}."
    return f"Ids look like this: {next(iter(ids))!r}." if ids else ""
