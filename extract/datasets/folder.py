"""A folder of class folders, with or without split folders above them."""

import os
from pathlib import Path

from vcache.extract.datasets.base import (
    VIDEO_SUFFIXES,
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    hashed_split,
    split_order,
)
from vcache.extract.datasets.registry import register_path_loader

_SPLITS = ("train", "val", "test")
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
    split_folders = [folder for folder in _folders(path) if _is_split(folder)]
    found = [
        (canonical_split(split.name), label.name, video)
        for split in split_folders
        for label, video in _class_videos(split)
    ]
    plain = [(label, video) for label, video in _class_videos(path) if label not in split_folders]
    if found and plain:
        names = ", ".join(folder.name for folder in split_folders)
        raise DatasetError(
            f"{path} has split folders ({names}) and the class folder {plain[0][0].name!r} beside them; move it"
        )
    if not found:
        found = [(hashed_split(_relative(video, path), val_fraction), label.name, video) for label, video in plain]
    if not found:
        raise DatasetError(
            f"no videos in {path}; looked in its class folders for {' '.join(VIDEO_SUFFIXES)}:\n{_LAYOUT}"
        )
    class_names = tuple(sorted({label for _, label, _ in found}))
    label_of = {name: index for index, name in enumerate(class_names)}
    videos = [
        Video(_relative(video, path), _relative(video, path), label_of[label], split) for split, label, video in found
    ]
    videos.sort(key=lambda video: (split_order(video.split), video.path))
    return VideoDataset(path.name or "root", path, class_names, tuple(videos))


def _is_split(folder: Path) -> bool:
    """Named for a split and divided into folders; a folder "test" that holds videos itself is a class."""
    return canonical_split(folder.name) in _SPLITS and any(_class_videos(folder, check=False))


def _class_videos(folder: Path, *, check: bool = True) -> list[tuple[Path, Path]]:
    """Each video in the folders of `folder`, with that folder; raises DatasetError if some lie beside them."""
    pairs = [(label, video) for label in _folders(folder) for video in _videos(label)]
    if check and pairs and (stray := _videos(folder)):
        raise DatasetError(
            f"{len(stray)} videos lie in {folder} outside any class folder, the first is {stray[0].name!r}; "
            "move them into one"
        )
    return pairs


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _videos(path: Path) -> list[Path]:
    entries = (entry for entry in path.iterdir() if entry.suffix.lower() in VIDEO_SUFFIXES)
    return sorted(entry for entry in entries if entry.is_file() and not entry.name.startswith("."))


def _relative(video: Path, root: Path) -> str:
    name = video.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"the file name {os.fsencode(name)!r} in {root} is not UTF-8; rename the file") from error
    return name
