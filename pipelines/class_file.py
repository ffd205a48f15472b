"""Names of classes from a file, in the order of a head's outputs.

.json    a list of names; or {index: name}, or {name: index}
.csv     rows of index,name, with or without a line of titles
others   one name per line
"""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any


class ClassFileError(ValueError):
    """A file that does not give each class one name."""


def read_class_names(path: Path, num_classes: int | None = None) -> tuple[str, ...]:
    """The names in the file, by index; of so many classes, or of any number.

    Raises:
        ClassFileError: it cannot be read, indices are missing, names are there twice, or it has another number of names.
    """
    names = read_names(path, "--classes")
    if num_classes is not None and len(names) != num_classes:
        raise ClassFileError(f"{path} has {len(names)} class names; the checkpoint has {num_classes} classes.")
    if not names:
        raise ClassFileError(f"{path} gives no class names: it is empty.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1 or "" in names:
        raise ClassFileError(f"{path} has a class without a name." if "" in names else f"{path} has {name!r} twice.")
    return names


def read_names(path: Path, option: str) -> tuple[str, ...]:
    """The names in the file that `option` named, by index, of whatever classes.

    Raises:
        ClassFileError: it cannot be read, or indices are missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return {".json": _from_json, ".csv": _from_csv}.get(path.suffix.lower(), _from_lines)(text)
    except OSError as error:
        raise ClassFileError(f"{option} {path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except (ValueError, csv.Error) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ClassFileError(f"{path} gives no class names: {error}.") from error


def _from_lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _from_json(text: str) -> tuple[str, ...]:
    content = json.loads(text)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return tuple(name.strip() for name in content)
    if isinstance(content, dict):
        pairs = list(content.items())
        if not all(_is_index(key) for key in content):
            pairs = [(index, name) for name, index in pairs]
        return _by_index(pairs)
    raise ValueError("its JSON is neither a list of names nor an object of names and indices")


def _from_csv(text: str) -> tuple[str, ...]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if rows and not _is_index(rows[0][0]):
        rows = rows[1:]
    if odd := [row for row in rows if len(row) != 2]:
        raise ValueError(f"{','.join(odd[0])!r} is not of the form index,name")
    return _by_index([(index, name) for index, name in rows])


def _by_index(pairs: list[tuple[Any, Any]]) -> tuple[str, ...]:
    if odd := [index for index, name in pairs if not _is_index(index) or not isinstance(name, str)]:
        raise ValueError(f"{odd[0]!r} is not the index of a name")
    names = {int(index): name.strip() for index, name in pairs}
    if sorted(names) != list(range(len(pairs))):
        raise ValueError(f"its indices are not 0 to {len(pairs) - 1}, each once")
    return tuple(names[index] for index in range(len(pairs)))


def _is_index(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().isascii() and value.strip().isdigit()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
