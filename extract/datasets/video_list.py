"""Lists of `path label`, one video a line, as mmaction2 and the papers' repositories keep them."""

import re
from itertools import islice, pairwise
from pathlib import Path

from vcache.extract.datasets.annotations import read_lines
from vcache.extract.datasets.base import (
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    check_unique_ids,
    hashed_split,
    inside,
    split_order,
)
from vcache.extract.datasets.disk import is_video_name, join
from vcache.extract.datasets.registry import register_path_loader

_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "validate", "valid"),
    "test": ("test", "testing"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(word for words in _SPELLINGS.values() for word in words)})(?![a-z])")
_ROW = re.compile(r"(?P<path>.*?\S)\s+(?P<labels>[0-9]{1,6}(\s+[0-9]{1,6})*)")
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
    rows = {split: _read(file, base) for split, file in _lists(path).items()}
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
    class_names = _class_names(path.parent, [row for listed in rows.values() for row in listed])
    return VideoDataset(_name(path), base, class_names, tuple(videos), multi_label=multi_label)


def _read(file: Path, base: Path) -> list[_Row]:
    return [(file, line, *_row(text, base, file, line)) for line, text in read_lines(file)]


def _lists(path: Path) -> dict[str, Path]:
    """Split -> list, of all that are there; the split "" is one to be divided by a hash."""
    words = list(_SPLIT_WORD.finditer(path.stem))
    if len(words) != 1:
        return {"": path}
    before, after = path.stem[: words[0].start()], path.stem[words[0].end() :]
    files = {canonical_split(words[0][0]): path}
    for split, spellings in _SPELLINGS.items():
        named = (path.with_name(f"{before}{word}{after}{path.suffix}") for word in spellings)
        found = next((file for file in named if file.is_file()), None)
        if found is not None:
            files.setdefault(split, found)
    return (
        {"": path} if list(files) == ["train"] else dict(sorted(files.items(), key=lambda item: split_order(item[0])))
    )


def _name(path: Path) -> str:
    """The same for each of the lists: what their names share."""
    if len(_SPLIT_WORD.findall(path.stem)) != 1:
        return path.stem
    return re.sub(r"[-_. ]{2,}", "_", _SPLIT_WORD.sub("", path.stem)).strip("-_. ") or path.parent.name or "list"


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


def _class_names(folder: Path, rows: list[_Row]) -> tuple[str, ...]:
    """The names in label_map*.txt beside the list, or the indices themselves."""
    highest = max(rows, key=lambda row: max(row[-1]), default=None)
    count = 0 if highest is None else max(highest[-1]) + 1
    maps = sorted(folder.glob("label_map*.txt"))
    if not maps:
        return tuple(str(index) for index in range(count))
    if len(maps) > 1:
        raise DatasetError(
            f"{folder} has {len(maps)} files label_map*.txt ({maps[0].name}, {maps[1].name}, ...); keep one"
        )
    names = tuple(text for _, text in read_lines(maps[0]))
    if highest is not None and count > len(names):
        message = f"label {count - 1}, and {maps[0].name} names {len(names)} classes"
        raise DatasetError(message, file=highest[0], line=highest[1])
    if twice := [name for name, other in pairwise(sorted(names)) if name == other]:
        raise DatasetError(f"the class {twice[0]!r} is listed twice", file=maps[0])
    return names
