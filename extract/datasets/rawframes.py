"""Lists of `dir num_frames label`: videos as folders of frames, as mmaction2, Text4Vis and ActionCLIP keep them."""

import re
from pathlib import Path
from typing import NamedTuple

from vcache.extract.datasets.annotations import read_lines
from vcache.extract.datasets.base import (
    VIDEO_SUFFIXES,
    DatasetError,
    Video,
    VideoDataset,
    check_unique_ids,
    hashed_split,
    inside,
    split_order,
)
from vcache.extract.datasets.registry import register_path_loader
from vcache.extract.datasets.split_lists import lists_of_splits, names_of_classes, shared_name
from vcache.extract.video import Segment

_FRAME_NAME = re.compile(r".*\d\.(jpe?g|png|webp|bmp)", re.IGNORECASE)
"""A numbered image: img_00001.jpg, image_0001.jpg, 000001.png."""

_LAYOUT = """\
FILE.txt: `dir num_frames label`, one video a line; the label is an index, the path of the folder may have spaces
<dir>/img_00001.jpg (or any numbered images: image_0001.jpg, 000001.png), relative to the list's folder or to --root
train.txt brings val.txt and test.txt along, k400_train_rawframes.txt its ..._val_..., and so on; without any of them, 20%
    (--val-fraction) become val; label_map*.txt beside the list names the classes, one a line"""


class _Row(NamedTuple):
    folder: str
    """Relative to the root."""
    num_frames: int
    label: int
    file: Path
    line: int


def looks_like_rawframes(path: Path, root: Path | None = None) -> bool:
    """Whether the first line of a list ends in two whole numbers and begins with a folder.

    Of a folder that is not there, a name that is no video's is enough: `v.mp4 3 7` is a video with two labels.
    """
    text = next((text for _, text in read_lines(path)), "")
    folder, num_frames, label = (*text.rsplit(maxsplit=2), "", "", "")[:3]
    if not (_is_index(num_frames) and _is_index(label)):
        return False
    return ((root or path.parent) / folder).is_dir() or Path(folder).suffix.lower() not in VIDEO_SUFFIXES


@register_path_loader("rawframes", summary="lists of folders of frames; pass the path of one", layout=_LAYOUT)
def load_rawframes(path: Path, root: Path | None, val_fraction: float) -> VideoDataset:
    """Read a list and those of the other splits beside it; each video is a folder and the segment of its listed frames.

    A folder that holds fewer frames than are listed is found when it is decoded.

    Raises:
        DatasetError: with the line, for a malformed row, a folder listed twice or outside the root, or one without frames if it
            is the first that is there.
    """
    base = root or path.parent
    rows = {
        split: [_row(text, base, file, line) for line, text in read_lines(file)]
        for split, file in lists_of_splits(path).items()
    }
    located = [
        (_video(row, split or hashed_split(row.folder, val_fraction)), row.file, row.line)
        for split, listed in rows.items()
        for row in listed
    ]
    check_unique_ids(located)
    every = [row for listed in rows.values() for row in listed]
    class_names = names_of_classes(path.parent, ((row.label, row.file, row.line) for row in every))
    _check_frames(base, every)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.path))
    return VideoDataset(shared_name(path), base, class_names, tuple(videos), frame_folders=True)


def _video(row: _Row, split: str) -> Video:
    return Video(row.folder, row.folder, row.label, split, segment=Segment(0.0, float(row.num_frames), "frames"))


def _row(text: str, base: Path, file: Path, line: int) -> _Row:
    folder, num_frames, label = (*text.rsplit(maxsplit=2), "", "", "")[:3]
    if not (_is_index(num_frames) and _is_index(label)):
        raise DatasetError(f"{text[:80]!r}; expected `dir num_frames label`", file=file, line=line)
    if num_frames.strip("0") == "":
        raise DatasetError(f"{folder!r} is listed with 0 frames; remove the row", file=file, line=line)
    return _Row(inside(base, folder, file, line), int(num_frames), int(label), file, line)


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _check_frames(base: Path, rows: list[_Row]) -> None:
    """Look into the first folder that is there: in a wrong layout, every video would be recorded as failed."""
    for row in rows:
        folder = base / row.folder
        if not folder.is_dir():
            continue
        if not any(_FRAME_NAME.fullmatch(file.name) for file in folder.iterdir()):
            raise DatasetError(
                f"{folder} holds no numbered images, as img_00001.jpg; rename them, or correct the list",
                file=row.file,
                line=row.line,
            )
        return
