"""Lists of `path label`, one video a line, as mmaction2 and the papers' repositories keep them."""

import re
from itertools import islice
from pathlib import Path

from vcache.extract.datasets.annotations import read_lines
from vcache.extract.datasets.base import (
    DatasetError,
    Video,
    VideoDataset,
    check_unique_ids,
    hashed_split,
    inside,
    split_order,
)
from vcache.extract.datasets.disk import is_video_name, join
from vcache.extract.datasets.registry import register_path_loader
from vcache.extract.datasets.split_lists import lists_of_splits, names_of_classes, shared_name

_ROW = re.compile(r"(?P<path>.*?\S)\s+(?P<labels>[0-9]{1,9}(\s+[0-9]{1,9})*)")
_ROWS_TRIED = 100

_Row = tuple[Path, int, str, tuple[int, ...]]
"""List, line, path as it is listed, labels."""

_LAYOUT = """\
FILE.txt: `path label`, one video a line; the label is an index, or several; the path may have spaces
<path>, relative to the list's folder or to --root, or below <split>/, videos/, videos/<split>/ or videos_<split>/ there
train.txt brings val.txt and test.txt along, kinetics400_train_list_videos.txt its ..._val_..., and so on; without any of
    them, 20% (--val-fraction) become val; label_map*.txt beside the list names the classes, one a line"""


@register_path_loader("txt", summary="lists of `path label` as mmaction2's; pass the path of one", layout=_LAYOUT)
def load_video_list(path: Path, root: Path | None, val_fraction: float) -> VideoDataset:
    """Read a list and those of the other splits beside it. Ids are the paths as they are listed.

    A list named for val or test is that split even if it is alone; any other that is alone is split by a hash of the paths.
    One line with several labels makes it a multi-label dataset.

    Raises:
        DatasetError: with the line, for a malformed row, a path listed twice or outside the root.
    """
    base = root or path.parent
    rows = {split: _read(file, base) for split, file in lists_of_splits(path).items()}
    multi_label = any(len(labels) > 1 for listed in rows.values() for _, _, _, labels in listed)
    located = []
    for split, listed in rows.items():
        place = _place(base, split, [name for _, _, name, _ in listed])
        for file, line, name, labels in listed:
            video = Video(
                video_id=name,
                path=join(place, name),
                label=labels[0],
                split=split or hashed_split(name, val_fraction),
                classes=tuple(sorted(labels)) if multi_label else (),
            )
            located.append((video, file, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    every = ((label, file, line) for listed in rows.values() for file, line, _, labels in listed for label in labels)
    class_names = names_of_classes(path.parent, every)
    return VideoDataset(shared_name(path), base, class_names, tuple(videos), multi_label=multi_label)


def _read(file: Path, base: Path) -> list[_Row]:
    return [(file, line, *_row(text, base, file, line)) for line, text in read_lines(file)]


def _row(text: str, base: Path, file: Path, line: int) -> tuple[str, tuple[int, ...]]:
    """Path and labels of one line."""
    row = _ROW.fullmatch(text)
    if row is None:
        message = f"{text[-80:]!r} does not end in the index of a class; a CSV of path,label takes names"
        raise DatasetError(message, file=file, line=line)
    labels = tuple(int(label) for label in row["labels"].split())
    if not is_video_name(row["path"].rpartition("/")[2]):
        message = f"{row['path'][-80:]!r} does not end in the suffix of a video; a list takes `path label`"
        raise DatasetError(message, file=file, line=line)
    if len(set(labels)) < len(labels):
        raise DatasetError(f"{row['path']!r} has the same label twice", file=file, line=line)
    return inside(base, row["path"], file, line), labels


def _place(base: Path, split: str, listed: list[str]) -> str:
    """Below which folder the paths of a list are found; "" is the root itself, and the answer where none of them is there."""
    places = ("", split, "videos", f"videos/{split}", f"videos_{split}") if split else ("", "videos")
    tries = (place for name in islice(listed, _ROWS_TRIED) for place in places if (base / place / name).is_file())
    return next(tries, "")
