"""A folder of class folders, with or without split folders above them."""

import os
from pathlib import Path, PurePosixPath

from vcache.extract.datasets.base import (
    VIDEO_SUFFIXES,
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    hashed_split,
    split_order,
)
from vcache.extract.datasets.disk import Disk, is_video_name, join
from vcache.extract.datasets.registry import register_path_loader

_SPLITS = ("train", "val", "test")
_Found = tuple[str | None, str, str]
"""Split (None: to be had by a hash), class and path of a video."""

_LAYOUT = """\
FOLDER/<class>/<video>                        split by a hash of the path: 20% (--val-fraction) become val
FOLDER/<train|val|validation|test>/<class>/<video>"""


@register_path_loader("folder", summary="any folder of class folders; pass its path", layout=_LAYOUT)
def load_folder(path: Path, root: Path | None, val_fraction: float) -> VideoDataset:
    """Read a folder; classes are the sorted names of the folders that hold videos. Hidden files are left out.

    Raises:
        DatasetError: no videos in class folders, videos outside of one, or `root` was given too.
    """
    if root is not None:
        raise DatasetError(
            f"--root {root} has no meaning for the folder {path}, which holds its videos itself; leave it out"
        )
    found = _find(Disk(path))
    if not found:
        raise DatasetError(
            f"no videos in {path}; looked in its class folders for {' '.join(VIDEO_SUFFIXES)}:\n{_LAYOUT}"
        )
    class_names = tuple(sorted({label for _, label, _ in found}))
    label_of = {name: index for index, name in enumerate(class_names)}
    videos = [
        Video(video, video, label_of[label], split or hashed_split(video, val_fraction))
        for split, label, video in found
    ]
    videos.sort(key=lambda video: (split_order(video.split), video.path))
    return VideoDataset(path.name or "root", path, class_names, tuple(videos))


def _find(disk: Disk) -> list[_Found]:
    split_folders = [name for name in _folders(disk, "") if _is_split(disk, name)]
    videos = [(split, *pair) for split in split_folders for pair in _class_videos(disk, split)]
    found: list[_Found] = [(canonical_split(split), label, video) for split, label, video in videos]
    plain: list[_Found] = [(None, *pair) for pair in _class_videos(disk, "") if pair[0] not in split_folders]
    if found and plain:
        names = ", ".join(split_folders)
        raise DatasetError(
            f"{disk.root} has split folders ({names}) and the class folder {plain[0][1]!r} beside them; move it"
        )
    return found or plain


def _is_split(disk: Disk, folder: str) -> bool:
    """Named for a split and divided into folders; a folder "test" that holds videos itself is a class."""
    return canonical_split(folder) in _SPLITS and any(
        _videos(disk, join(folder, label)) for label in _folders(disk, folder)
    )


def _class_videos(disk: Disk, folder: str) -> list[tuple[str, str]]:
    """Each video in the folders of `folder`, with that folder's name; raises DatasetError if some lie beside them."""
    pairs = [(label, video) for label in _folders(disk, folder) for video in _videos(disk, join(folder, label))]
    if pairs and (stray := _videos(disk, folder)):
        raise DatasetError(
            f"{len(stray)} videos lie in {disk.root / folder} outside any class folder, the first is "
            f"{PurePosixPath(stray[0]).name!r}; move them into one"
        )
    return pairs


def _folders(disk: Disk, path: str) -> list[str]:
    folder = disk.folder(path)
    return sorted(name for name in folder.folders if not name.startswith(".")) if folder else []


def _videos(disk: Disk, path: str) -> list[str]:
    """The videos of a folder; a link that leads nowhere is one too, which then fails as missing."""
    folder = disk.folder(path)
    names = folder.files | folder.broken_links if folder else ()
    return sorted(_checked(join(path, name), disk.root) for name in names if is_video_name(name))


def _checked(name: str, root: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"the file name {os.fsencode(name)!r} in {root} is not UTF-8; rename the file") from error
    return name
