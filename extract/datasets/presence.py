"""Which listed videos are not on the disk, and which videos on the disk no list names: both at once, before hours are spent."""

from collections.abc import Iterator
from dataclasses import dataclass

from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.datasets.disk import Disk, Folder, is_video_name, join


@dataclass(frozen=True, kw_only=True)
class Presence:
    """A dataset's list against its disk."""

    missing: tuple[Video, ...]
    """Listed and not there, in the order of the dataset."""
    extra: tuple[str, ...]
    """Videos below the root that no list names, sorted; relative to the root, bytes that are not UTF-8 as "\\xff"."""

    def num_missing(self, split: str) -> int:
        return sum(video.split == split for video in self.missing)


def presence(dataset: VideoDataset) -> Presence:
    """Compare the list of a whole dataset (after `only`, the other splits' videos are extra) with what is below its root.

    Each folder is listed once and no video is asked for by itself: 260,000 videos take a second or two. A folder that has two
    names through links counts once. Hidden files and folders are looked at only if they are listed.
    """
    disk = Disk(dataset.root)
    missing = tuple(video for video in dataset.videos if not _is_there(disk, video.path))
    listed = {video.path for video in dataset.videos} | set(dataset.unused)
    return Presence(missing=missing, extra=tuple(sorted(_shown(path) for path in _extra(disk, listed))))


def _is_there(disk: Disk, path: str) -> bool:
    """A file, or, in a list of folders of frames, a folder."""
    parent, _, name = path.rpartition("/")
    folder = disk.folder(parent)
    return folder is not None and (name in folder.files or (name in folder.folders and not is_video_name(name)))


def _extra(disk: Disk, listed: set[str]) -> Iterator[str]:
    by_folder: dict[tuple[int, int], set[str]] = {}
    for path in listed:
        parent, _, name = path.rpartition("/")
        if folder := disk.folder(parent):
            by_folder.setdefault(folder.identity, set()).add(name)
    for path, folder in _walk(disk, listed):
        unlisted = folder.files - by_folder.get(folder.identity, set())
        yield from (join(path, name) for name in unlisted if is_video_name(name))


def _walk(disk: Disk, listed: set[str]) -> Iterator[tuple[str, Folder]]:
    """Every folder below the root, each once; not into listed ones, which are videos made of frames."""
    seen, waiting = set(), [""]
    while waiting:
        path = waiting.pop()
        folder = disk.folder(path)
        if folder is None or folder.identity in seen:
            continue
        seen.add(folder.identity)
        yield path, folder
        visible = (name for name in sorted(folder.folders, reverse=True) if not name.startswith("."))
        waiting.extend(child for name in visible if (child := join(path, name)) not in listed)


def _shown(path: str) -> str:
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
