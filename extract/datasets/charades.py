"""Charades: 30 s videos at home with several of 157 actions each, and when each is seen (Sigurdsson et al. 2016)."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from vcache.extract.datasets.base import (
    VIDEO_SUFFIXES,
    DatasetError,
    Video,
    VideoDataset,
    check_unique_ids,
    inside,
    read_csv,
    split_order,
)
from vcache.extract.datasets.registry import register_dataset

_CLASSES = "Charades_v1_classes.txt"
_FILES = {"train": "Charades_v1_train.csv", "test": "Charades_v1_test.csv"}
_FOLDERS = ("", "Charades", "annotations")
_VIDEOS = ("Charades_v1_480", "Charades_v1", "videos")

_LAYOUT = """\
Charades_v1_classes.txt with lines `c000 Holding some clothes`, Charades_v1_train.csv and Charades_v1_test.csv with the columns
    id and actions, as "c092 11.90 21.20;c147 0.00 12.60"; in the root, Charades/ or annotations/
Charades_v1_480/<id>.mp4, or in Charades_v1/, videos/ or the root"""

_Actions = tuple[tuple[int, float, float], ...]


@register_dataset("charades", summary="Charades: 157 actions at home, several per video", layout=_LAYOUT)
def load_charades(root: Path) -> VideoDataset:
    """Read train and test, one row per video with all its classes; when each action is seen is kept with it.

    A video without actions keeps its row: it has no classes, and its label is -1. The usual mean average precision leaves
    such videos out, and a loss for one label per video refuses them.

    Raises:
        DatasetError: no list of classes, no CSV, or a malformed one.
    """
    class_names = _read_classes(_file(root, _CLASSES))
    files = {split: file for split, name in _FILES.items() if (file := _find_file(root, name))}
    if not files:
        raise DatasetError(f"no {' or '.join(_FILES.values())} in {root}; expected:\n{_LAYOUT}")
    find, located = _finder(root), []
    for split, file in files.items():
        for line, video_id, actions in _read(file, len(class_names)):
            inside(root, video_id, file, line)
            label = actions[0][0] if actions else -1
            classes = tuple(sorted({action[0] for action in actions}))
            video = Video(video_id, find(video_id), label, split, classes=classes, actions=actions)
            located.append((video, file, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset("charades", root, class_names, tuple(videos), multi_label=True)


def _find_file(root: Path, name: str) -> Path | None:
    paths = (root / folder / name for folder in _FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _file(root: Path, name: str) -> Path:
    if file := _find_file(root, name):
        return file
    raise DatasetError(f"no {name} in {root}; expected:\n{_LAYOUT}")


def _read_classes(file: Path) -> tuple[str, ...]:
    names: list[str] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 text ({error.reason}); save it as UTF-8", file=file) from error
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        number, _, name = text.strip().partition(" ")
        if number != f"c{len(names):03d}" or not name:
            raise DatasetError(f"{text[:60]!r}; expected c{len(names):03d} and a class", file=file, line=line)
        names.append(name.strip())
    return tuple(names)


def _read(file: Path, num_classes: int) -> Iterator[tuple[int, str, _Actions]]:
    for line, row in read_csv(file, ("id", "actions")):
        if not row["id"]:
            raise DatasetError("id is empty; every video needs one", file=file, line=line)
        actions = (text for text in row["actions"].split(";") if text.strip())
        yield line, row["id"], tuple(_action(text, num_classes, file, line) for text in actions)


def _action(text: str, num_classes: int, file: Path, line: int) -> tuple[int, float, float]:
    """Class, start and stop in seconds. As written, also where it ends after the video does."""
    try:
        name, start, stop = text.split()
        label, times = int(name.removeprefix("c")), (float(start), float(stop))
    except ValueError as error:
        raise DatasetError(f"{text!r} is no action; expected `c092 11.90 21.20`", file=file, line=line) from error
    if name != f"c{label:03d}" or not 0 <= label < num_classes:
        raise DatasetError(f"{name!r} is not in {_CLASSES}, which ends at c{num_classes - 1:03d}", file=file, line=line)
    if not all(math.isfinite(time) and time >= 0 for time in times):
        raise DatasetError(f"{text!r} has a time that is not a number of seconds", file=file, line=line)
    return label, *times


def _finder(root: Path) -> Callable[[str], str]:
    """Video id -> path relative to root; each folder is listed once."""

    @cache
    def listing(folder: str) -> dict[str, str]:
        path = root / folder
        files = sorted(path.iterdir(), reverse=True) if path.is_dir() else []
        return {file.stem: file.relative_to(root).as_posix() for file in files if file.suffix.lower() in VIDEO_SUFFIXES}

    def find(video_id: str) -> str:
        hits = (listing(folder).get(video_id) for folder in (*_VIDEOS, ""))
        return next((hit for hit in hits if hit), f"{_VIDEOS[0]}/{video_id}.mp4")

    return find
