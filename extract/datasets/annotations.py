"""Annotation files: where they may lie, the lines of a text, the entries of a JSON list."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vcache.extract.datasets.base import DatasetError, Video


def find_file(root: Path, names: Sequence[str], folders: Sequence[str] = ("", "annotations")) -> Path | None:
    """The first of `names` that is in the first of `folders` below `root` that has any of them."""
    paths = (root / folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text as (line, text without surrounding space); blank ones are left out.

    Raises:
        DatasetError: not UTF-8, or it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 text ({error.reason}); save it as UTF-8", file=path) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", file=path) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DatasetError: not UTF-8, not JSON (with the line), or it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 text ({error.reason}); save it as UTF-8", file=path) from error
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg}; if the download broke off, fetch it again"
        raise DatasetError(message, file=path, line=error.lineno) from error
    except RecursionError as error:
        raise DatasetError("not an annotation: nested too deeply", file=path) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", file=path) from error


class Entry:
    """One object of a JSON list. JSON has no rows, so that errors name the number of the entry, from 1."""

    def __init__(self, file: Path, number: int, fields: dict[str, Any]) -> None:
        self.file, self.number, self.fields = file, number, fields

    def text(self, key: str) -> str:
        """A field that is text, or a whole number written as one.

        Raises:
            DatasetError: absent, empty, or something else.
        """
        value = self.fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{key} is {_seen(value)}; expected text or a whole number")
        return value.strip()

    def index(self, key: str, class_names: Sequence[str]) -> int:
        """A field that is an index into `class_names`, as a number or as text.

        Raises:
            DatasetError: absent, something else, or out of range.
        """
        text = self.text(key)
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(class_names)):
            raise self.error(f"{key} is {text}; expected an index from 0 to {len(class_names) - 1}")
        return int(text)

    def error(self, message: str) -> DatasetError:
        return DatasetError(f"entry {self.number}: {message}", file=self.file)


def read_entries(path: Path) -> list[Entry]:
    """The objects of a JSON list.

    Raises:
        DatasetError: not a list of objects.
    """
    value = read_json(path)
    if not isinstance(value, list):
        raise DatasetError(f"{_seen(value)}; expected a list of objects", file=path)
    for number, fields in enumerate(value, start=1):
        if not isinstance(fields, dict):
            raise DatasetError(f"entry {number}: {_seen(fields)}; expected an object", file=path)
    return [Entry(path, number, fields) for number, fields in enumerate(value, start=1)]


def check_unique_entries(videos: Iterable[tuple[Video, Entry]]) -> None:
    """Raise DatasetError at the second entry with the same id in one split."""
    seen: dict[tuple[str, str], Entry] = {}
    for video, entry in videos:
        first = seen.setdefault((video.split, video.video_id), entry)
        if first is not entry:
            raise entry.error(f"{video.video_id!r} is listed twice in {video.split} (first as entry {first.number})")


def _seen(value: object) -> str:
    return "absent" if value is None else repr(value)[:60]
