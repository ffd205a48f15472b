"""What a dataset is: named classes and a list of videos, some of which may not be on the disk."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from vcache.extract.video import Segment

VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv",
)  # fmt: skip
"""Which files of a folder are taken for videos; lower case, compared without regard to case."""

_SPLIT_ALIASES = {"validation": "val", "validate": "val", "valid": "val", "training": "train", "testing": "test"}
_SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}


class DatasetError(ValueError):
    """A dataset that cannot be read as asked; `.file` and `.line` (1-based) say where, if it is one row of a file."""

    def __init__(self, message: str, *, file: Path | None = None, line: int | None = None) -> None:
        self.file, self.line = file, line
        where = "" if file is None else f"{file}: " if line is None else f"{file}, line {line}: "
        super().__init__(where + message)


@dataclass(frozen=True)
class Video:
    """One row of the annotation: a whole file, a segment of one, or a folder of frames."""

    video_id: str
    """Unique within its split."""
    path: str
    """Relative to the dataset's root, with forward slashes; several videos may be segments of one file."""
    label: int
    """Index into `VideoDataset.class_names`. Of several classes the first one listed, of none -1."""
    split: str
    segment: Segment | None = None
    """What of the file is the video; None: all of it."""
    labels: tuple[tuple[str, int], ...] = ()
    """Labels of other kinds as (kind, index into `VideoDataset.label_names[kind]`), sorted by kind."""
    classes: tuple[int, ...] = ()
    """In a multi-label dataset all classes of the video, ascending; indices into `VideoDataset.class_names`."""
    actions: tuple[tuple[int, float, float], ...] = ()
    """When each class is seen, where the annotation says it: (class, start, stop) in seconds, in its own order."""


@dataclass(frozen=True)
class VideoDataset:
    """Videos in a fixed order: two readings of the same annotation give the same list on any machine."""

    name: str
    root: Path
    class_names: tuple[str, ...]
    videos: tuple[Video, ...]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The classes of each other kind of label, as "verb"; every video has a label of each kind."""
    multi_label: bool = False
    """A video may have several classes (`Video.classes`), or none."""
    frame_folders: bool = False
    """Each video is a folder of numbered images."""
    unused: tuple[str, ...] = ()
    """Paths of videos that the annotation names and no split holds: HMDB-51's third tag, test lists without labels."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order in which they first appear."""
        return tuple(dict.fromkeys(video.split for video in self.videos))

    def split(self, name: str) -> tuple[Video, ...]:
        """The videos of one split.

        Raises:
            DatasetError: there is no such split.
        """
        if name not in self.splits:
            raise DatasetError(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return tuple(video for video in self.videos if video.split == name)

    @cached_property
    def missing(self) -> tuple[Video, ...]:
        """Videos that are listed and not on the disk. They stay in the list, and extraction records them as failed."""
        return tuple(video for video in self.videos if not (self.root / video.path).exists())

    def only(self, splits: Sequence[str]) -> "VideoDataset":
        """The same dataset with some of its splits; all classes are kept.

        Raises:
            DatasetError: there is no such split.
        """
        chosen = frozenset(video for name in splits for video in self.split(name))
        return replace(self, videos=tuple(video for video in self.videos if video in chosen))


def canonical_split(name: str) -> str:
    """One name for what Kinetics calls "validate", others "validation" or "val"; lower case."""
    name = name.strip().lower()
    return _SPLIT_ALIASES.get(name, name)


def split_order(name: str) -> tuple[int, str]:
    """A key that sorts train, val, test, and then whatever else there is."""
    return _SPLIT_ORDER.get(name, len(_SPLIT_ORDER)), name


def hashed_split(video_id: str, val_fraction: float) -> str:
    """ "val" for about `val_fraction` of the ids, "train" for the rest.

    By the id alone: a video stays in its split when others come or go, and on every machine.
    """
    digest = hashlib.sha256(video_id.encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def check_unique_ids(videos: Iterable[tuple[Video, Path, int]]) -> None:
    """Raise DatasetError at the second row with the same id in one split; each video comes with its file and line."""
    seen: dict[tuple[str, str], tuple[Path, int]] = {}
    for video, file, line in videos:
        key = (video.split, video.video_id)
        if key in seen:
            first_file, first_line = seen[key]
            raise DatasetError(
                f"{video.video_id!r} is listed twice in {video.split} (first in {first_file.name}, line {first_line}); "
                "remove one of the rows",
                file=file,
                line=line,
            )
        seen[key] = (file, line)


def inside(root: Path, listed: str, file: Path, line: int | None) -> str:
    """The path relative to `root`, "." and ".." worked out.

    Links are not followed: a link inside the root may lead where its owner wants.

    Raises:
        DatasetError: the path, as `line` of `file` lists it, leaves the root, is the root itself, or no file can have it.
    """
    _check_characters(listed, file, line)
    if _is_plain(listed):
        return listed
    relative = os.path.relpath(os.path.normpath(root / listed), os.path.normpath(root))
    if Path(relative).parts[:1] == (os.pardir,) or relative == os.curdir:
        raise DatasetError(
            f"{listed!r} leaves {root}; say --root FOLDER with one that holds all videos", file=file, line=line
        )
    return Path(relative).as_posix()


def _is_plain(path: str) -> bool:
    """Nothing to work out. Nearly every path is; the long way takes 15 us, which is four seconds of 260,000 rows."""
    return bool(path) and path[0] not in "/." and path[-1] != "/" and "//" not in path and "/." not in path


def plain_name(name: str, what: str, file: Path, line: int | None) -> str:
    """The name itself, if a file or folder can have it: no slash, not ".."; `what` says in the error what it is.

    Raises:
        DatasetError: with file and line.
    """
    _check_characters(name, file, line)
    if not name or "/" in name or name in (os.curdir, os.pardir):
        raise DatasetError(f"{what} {name!r} is not the name of a file", file=file, line=line)
    return name


def _check_characters(name: str, file: Path, line: int | None) -> None:
    """NUL ends a name for the system; half a surrogate pair, which JSON can spell, has no UTF-8."""
    try:
        sound = name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        sound = False
    if not sound or "\0" in name:
        raise DatasetError(f"{name!r} holds a character that no file name can", file=file, line=line)


def read_csv(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with a header, as (line, {column: text without surrounding space}); blank lines are left out.

    Raises:
        DatasetError: not UTF-8, a required column is absent, or a row has more or fewer fields than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            _check_header(path, header, required)
            for row in rows:
                fields = [text.strip() for text in row]
                if not any(fields):
                    continue
                if len(row) != len(header):
                    message = f"{len(row)} fields where the header has {len(header)} ({','.join(header)})"
                    raise DatasetError(
                        f"{message}; put text with commas into double quotes", file=path, line=rows.line_num
                    )
                yield rows.line_num, dict(zip(header, fields, strict=True))
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 text ({error.reason}); save it as UTF-8", file=path) from error
    except csv.Error as error:
        raise DatasetError(f"not a CSV: {error}", file=path, line=rows.line_num) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", file=path) from error


def _check_header(path: Path, header: list[str], required: Sequence[str]) -> None:
    expected = f"expected a header with the columns {','.join(required)}"
    if not header:
        raise DatasetError(f"the file is empty; {expected}", file=path, line=1)
    if absent := [name for name in required if name not in header]:
        found = ",".join(header)[:100]
        raise DatasetError(f"no column {', '.join(absent)} in the first line ({found}); {expected}", file=path, line=1)
    if len(set(header)) < len(header):
        raise DatasetError(f"a column is named twice ({','.join(header)})", file=path, line=1)
