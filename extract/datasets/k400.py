"""Kinetics-400 from its own CSV files and a tree of clips; Kinetics-600 and -700 have the same form."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from vcache.extract.datasets.base import (
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    check_unique_ids,
    read_csv,
    split_order,
)
from vcache.extract.datasets.registry import register_dataset

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
_SPLIT_FOLDERS = {"val": ("val", "validate", "validation")}

_LAYOUT = """\
train.csv, val.csv, test.csv (or <anything>_val.csv, or annotations/*.csv): label,youtube_id,time_start,time_end,split
<youtube_id>_<start>_<end>.mp4|mkv|webm|avi, with both times as six digits, in any of
    <split>/   <split>/<label>/   videos/   videos/<split>/   <label>/     (a label with spaces or underscores)"""


@register_dataset("k400", summary="Kinetics-400: 10 s YouTube clips of 400 human actions", layout=_LAYOUT)
def load_k400(root: Path) -> VideoDataset:
    """Read all CSVs under `root`; the classes are the sorted labels of all of them, as in every published list.

    A listed video that is not there keeps its row, with the first place where it was looked for as its path.

    Raises:
        DatasetError: no CSV, or a malformed one.
    """
    files = _annotation_files(root)
    rows = [(file, line, row) for file in files for line, row in _read(file)]
    class_names = tuple(sorted({row["label"] for _, _, row in rows}))
    label_of = {name: index for index, name in enumerate(class_names)}
    find = _finder(root)
    located = []
    for file, line, row in rows:
        video_id, split = _video_id(file, line, row), canonical_split(row["split"])
        path = find(video_id, split, row["label"])
        located.append((Video(video_id, path, label_of[row["label"]], split), file, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset("k400", root, class_names, tuple(videos))


def _annotation_files(root: Path) -> list[Path]:
    """The CSVs named for a split in the root, else all in annotations/."""
    named = [path for path in sorted(root.glob("*.csv")) if _names_split(path.stem)]
    files = named or sorted(root.glob("annotations/*.csv"))
    if not files:
        raise DatasetError(f"no Kinetics CSV in {root} or {root / 'annotations'}; expected:\n{_LAYOUT}")
    return files


def _names_split(stem: str) -> bool:
    return canonical_split(stem.replace("-", "_").rsplit("_", 1)[-1]) in ("train", "val", "test")


def _read(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in read_csv(file, _COLUMNS):
        if empty := [name for name in _COLUMNS if not row[name]]:
            raise DatasetError(f"{empty[0]} is empty; expected {','.join(_COLUMNS)}", file=file, line=line)
        yield line, row


def _video_id(file: Path, line: int, row: dict[str, str]) -> str:
    try:
        start, end = int(row["time_start"]), int(row["time_end"])
    except ValueError as error:
        times = f"time_start {row['time_start']!r} and time_end {row['time_end']!r}"
        raise DatasetError(f"{times} must be whole seconds", file=file, line=line) from error
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"


def _finder(root: Path) -> Callable[[str, str, str], str]:
    """(video id, split, label) -> path relative to root; each folder is listed once, not asked once per video."""

    @cache
    def listing(folder: str) -> dict[str, str]:
        path = root / folder
        files = sorted(path.iterdir()) if path.is_dir() else []
        return {file.stem: f"{folder}/{file.name}" for file in reversed(files) if file.suffix.lower() in _SUFFIXES}

    @cache
    def folders(split: str, label: str) -> tuple[str, ...]:
        labels = dict.fromkeys((label, label.replace(" ", "_")))
        splits = _SPLIT_FOLDERS.get(split, (split,))
        return (
            *splits,
            *(f"{name}/{text}" for name in splits for text in labels),
            "videos",
            *(f"videos/{name}" for name in splits),
            *labels,
        )

    def find(video_id: str, split: str, label: str) -> str:
        hits = (listing(folder).get(video_id) for folder in folders(split, label))
        return next((hit for hit in hits if hit), f"{split}/{video_id}.mp4")

    return find
