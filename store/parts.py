"""Parts: a split grows by whole parts, so that nothing stored is ever rewritten.

A part is a folder with a table of videos, views, shards and commit records of its own. The videos that a split was made
with are the part of the split's own name, those added later are `<split>+1`, `<split>+2`, ... Who uses features names
splits, and the rows of a split are those of its parts, one part after the other; who writes or verifies names parts:

    part              train     | train+1 | train+2
    row of the part   0 1 2 3 4 | 0 1     | 0 1 2
    row of "train"    0 1 2 3 4 | 5 6     | 7 8 9
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np

PartName = NewType("PartName", str)
"""A name in `Manifest.splits`: a split's own name, or that with +1, +2, ... To mypy a plain split name is not one."""

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SplitParts:
    """The parts of one split, in the order of its rows."""

    split: str
    names: tuple[PartName, ...]
    starts: tuple[int, ...]
    """The row of the split at which each part begins."""
    num_rows: int

    def by_part(self, rows: np.ndarray) -> Iterator[tuple[PartName, np.ndarray, np.ndarray]]:
        """Each part that some of the rows lie in: its name, their positions in `rows`, and their rows of the part."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers):
            positions = np.flatnonzero(numbers == number)
            yield self.names[number], positions, rows[positions] - self.starts[number]


def split_of(part: str) -> str:
    """The split that a part belongs to."""
    return part.partition("+")[0]


def part_name(split: str, number: int) -> PartName:
    """The name of part `number` of a split, counted from 0."""
    return PartName(f"{split}+{number}" if number else split)


def check_split_name(split: str) -> None:
    """Splits are folders beside `_commit`, and '+' sets a part's number apart, so their names are restricted."""
    if not _SPLIT_NAME.fullmatch(split):
        raise ValueError(
            f"split name {split!r} must start with a letter or digit and hold only those and '_', '.', '-'"
        )


def group_parts(sizes: Mapping[PartName, int]) -> dict[str, SplitParts]:
    """The splits in the order in which they were made, from part name -> rows.

    Raises:
        ValueError: a name is not one of a split or part, a part is empty, or one is there without those before it.
    """
    splits: dict[str, list[PartName]] = {}
    for part, num_rows in sizes.items():
        split = split_of(part)
        check_split_name(split)
        names = splits.setdefault(split, [])
        if part != (expected := part_name(split, len(names))):
            raise ValueError(f"part {part!r} of split {split!r} is listed where {expected!r} is next")
        if num_rows < 1:
            raise ValueError(f"split {part!r} has {num_rows} videos; a split must have at least 1")
        names.append(part)
    return {split: _split_parts(split, names, sizes) for split, names in splits.items()}


def row_numbers(rows: Sequence[int] | np.ndarray, of: str, num_rows: int) -> np.ndarray:
    """Rows of a split or part as int64 (len(rows),).

    Raises:
        ValueError, IndexError: they are not integers, or not all of them from 0 to `num_rows` - 1.
    """
    wanted = np.asarray(rows)
    if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and wanted.size):
        raise ValueError(f"rows must be a list of integers, got {wanted.dtype} of shape {wanted.shape}")
    wanted = wanted.astype(np.int64)
    outside = wanted[(wanted < 0) | (wanted >= num_rows)]
    if outside.size:
        raise IndexError(f"row {outside[0]} of {of!r}: there are rows 0 to {num_rows - 1}")
    return wanted


def _split_parts(split: str, names: list[PartName], sizes: Mapping[PartName, int]) -> SplitParts:
    ends = np.cumsum([sizes[name] for name in names]).tolist()
    return SplitParts(split, tuple(names), (0, *ends[:-1]), ends[-1])
