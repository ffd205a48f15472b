"""A CSV file with the columns path,label and perhaps split."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vcache.extract.datasets.base import (
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    check_unique_ids,
    hashed_split,
    inside,
    read_csv,
    split_order,
)
from vcache.extract.datasets.registry import register_path_loader

_Row = tuple[int, str, str, str | None]
"""Line, path, label and split, in tuples: 260,000 dicts kept at once cost the garbage collector as long as the reading."""

_MAX_INDEX = 999_999

_LAYOUT = """\
FILE.csv: path,label[,split], with a header; a label is a name, or an index if all of them are whole numbers
<path>, relative to the CSV's folder or to --root; without a split column, 20% (--val-fraction) become val"""


@register_path_loader("csv", summary="any CSV of path,label[,split]; pass its path", layout=_LAYOUT)
def load_csv(path: Path, root: Path | None, val_fraction: float) -> VideoDataset:
    """Read a CSV; the videos are sorted by split and path, so that the order of the rows changes nothing.

    Raises:
        DatasetError: with the line, for a malformed row, an empty field, a path listed twice or outside the root.
    """
    base = root or path.parent
    rows = list(_read(path))
    class_names, label_of = _classes(path, rows)
    located = []
    for line, listed, label, split in rows:
        relative = inside(base, listed, path, line)
        video = Video(relative, relative, label_of[label], split or hashed_split(relative, val_fraction))
        located.append((video, path, line))
    check_unique_ids(located)
    order = cache(split_order)
    videos = sorted((video for video, _, _ in located), key=lambda video: (order(video.split), video.path))
    return VideoDataset(path.stem, base, class_names, tuple(videos))


def _read(path: Path) -> Iterator[_Row]:
    split_of = cache(canonical_split)  # there are few of them, and one string for each
    for line, row in read_csv(path, ("path", "label")):
        listed, label, split = row["path"], row["label"], row.get("split")
        if not (listed and label and split != ""):
            empty = next(name for name in ("path", "label", "split") if row.get(name) == "")
            raise DatasetError(f"{empty} is empty; every row needs one", file=path, line=line)
        yield line, listed, label, split and split_of(split)


def _classes(path: Path, rows: list[_Row]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes, and the index of each label as it is written."""
    labels = {label for _, _, label, _ in rows}
    if not all(_is_integer(label) for label in labels):
        names = tuple(sorted(labels))
        return names, {name: index for index, name in enumerate(names)}
    for line, _, label, _ in rows:
        if int(label) < 0:
            raise DatasetError(f"label {label} is negative; indices begin at 0", file=path, line=line)
        if int(label) > _MAX_INDEX:  # there would be a class for every number below it
            raise DatasetError(
                f"label {label} is above {_MAX_INDEX}; put a letter before labels that are names", file=path, line=line
            )
    indices = {label: int(label) for label in labels}
    return tuple(str(index) for index in range(max(indices.values(), default=-1) + 1)), indices


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
