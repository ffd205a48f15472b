"""A CSV file with the columns path,label and perhaps split."""

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
    rows = list(read_csv(path, ("path", "label")))
    for line, row in rows:
        if empty := [name for name in ("path", "label", "split") if row.get(name) == ""]:
            raise DatasetError(f"{empty[0]} is empty; every row needs one", file=path, line=line)
    class_names, label_of = _classes(path, rows)
    located = []
    for line, row in rows:
        relative = inside(base, row["path"], path, line)
        split = canonical_split(row["split"]) if "split" in row else hashed_split(relative, val_fraction)
        located.append((Video(relative, relative, label_of[row["label"]], split), path, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.path))
    return VideoDataset(path.stem, base, class_names, tuple(videos))


def _classes(path: Path, rows: list[tuple[int, dict[str, str]]]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes, and the index of each label as it is written."""
    labels = {row["label"] for _, row in rows}
    if not all(_is_integer(label) for label in labels):
        names = tuple(sorted(labels))
        return names, {name: index for index, name in enumerate(names)}
    for line, row in rows:
        if int(row["label"]) < 0:
            raise DatasetError(f"label {row['label']} is negative; indices begin at 0", file=path, line=line)
    indices = {label: int(label) for label in labels}
    return tuple(str(index) for index in range(max(indices.values(), default=-1) + 1)), indices


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
