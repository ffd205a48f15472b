"""Lists of one dataset, a file for each split, as mmaction2 and the papers keep them: which files, which classes."""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from vcache.extract.datasets.annotations import read_lines
from vcache.extract.datasets.base import DatasetError, canonical_split, split_order

_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "validate", "valid"),
    "test": ("test", "testing"),
}
_MAX_CLASSES = 1_000_000
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(word for words in _SPELLINGS.values() for word in words)})(?![a-z])")


def lists_of_splits(path: Path) -> dict[str, Path]:
    """Split -> list, of `path` and of those beside it that differ in the name of the split alone: train.txt brings val.txt along.

    The split "" is to be divided by a hash: a list that is not named for a split, or one for train that is alone.
    """
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


def shared_name(path: Path) -> str:
    """The same for each of the lists: what their names share."""
    if len(_SPLIT_WORD.findall(path.stem)) != 1:
        return path.stem
    return re.sub(r"[-_. ]{2,}", "_", _SPLIT_WORD.sub("", path.stem)).strip("-_. ") or path.parent.name or "list"


def names_of_classes(folder: Path, labels: Iterable[tuple[int, Path, int]]) -> tuple[str, ...]:
    """The names in label_map*.txt in the folder of the lists, or the indices themselves; each label comes with file and line.

    Raises:
        DatasetError: a label that the map does not name or that is no index, a name twice, or several maps.
    """
    highest = max(labels, key=lambda label: label[0], default=None)
    count = 0 if highest is None else highest[0] + 1
    if highest is not None and count > _MAX_CLASSES:  # there would be a class for every number below it
        raise DatasetError(f"label {count - 1} is not the index of a class", file=highest[1], line=highest[2])
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
        raise DatasetError(message, file=highest[1], line=highest[2])
    if twice := [name for name, other in pairwise(sorted(names)) if name == other]:
        raise DatasetError(f"the class {twice[0]!r} is listed twice", file=maps[0])
    return names
