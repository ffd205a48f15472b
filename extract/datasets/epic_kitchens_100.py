"""EPIC-KITCHENS-100: actions in long kitchen videos, each a segment with a verb and a noun (Damen et al. 2022)."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vcache.extract.datasets.base import (
    VIDEO_SUFFIXES,
    DatasetError,
    Video,
    VideoDataset,
    check_unique_ids,
    inside,
    read_csv,
    split_order,
)
from vcache.extract.datasets.registry import register_dataset
from vcache.extract.video import Segment

_FILES = {"train": "EPIC_100_train.csv", "val": "EPIC_100_validation.csv"}
_COLUMNS = (
    "narration_id", "participant_id", "video_id", "start_frame", "stop_frame", "verb_class", "noun_class",
)  # fmt: skip
_FOLDERS = ("", "annotations", "epic-kitchens-100-annotations")

_LAYOUT = """\
EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv in the root, annotations/
    or epic-kitchens-100-annotations/; the CSVs of test have no labels and are left out
<P01>/videos/<P01_01>.MP4, also below EPIC-KITCHENS/, or in <P01>/, videos/<P01>/ or videos/"""


class _Narration(NamedTuple):
    """One row: an action of a video."""

    narration_id: str
    participant: str
    video: str
    segment: Segment
    verb: int
    noun: int
    split: str
    file: Path
    line: int


@register_dataset(
    "epic-kitchens-100",
    summary="EPIC-KITCHENS-100: 90,000 actions, each a verb and a noun, in 700 videos",
    layout=_LAYOUT,
)
def load_epic_kitchens_100(root: Path) -> VideoDataset:
    """Read train and validation; each narrated action is a video, and many of them are segments of one file.

    The classes are the pairs of verb class and noun class in either split, sorted by both numbers and named by both keys: 3,806
    in the official files, some of them in validation only. Verb and noun are labels of their own. Frames are counted from 1, as
    the official frames are named, with both ends: 8 to 202 is the segment from 7 up to 202.

    Raises:
        DatasetError: one of the four files is not there, or is malformed.
    """
    folder = _annotation_folder(root)
    verbs, nouns = (_read_classes(folder / f"EPIC_100_{kind}_classes.csv") for kind in ("verb", "noun"))
    rows = [row for split, name in _FILES.items() for row in _read(folder / name, split, len(verbs), len(nouns))]
    pairs = sorted({(row.verb, row.noun) for row in rows})
    action_of = {pair: index for index, pair in enumerate(pairs)}
    find = _finder(root)
    located = [(_video(row, find(row), action_of[row.verb, row.noun]), row.file, row.line) for row in rows]
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=_order)
    class_names = tuple(f"{verbs[verb]} {nouns[noun]}" for verb, noun in pairs)
    return VideoDataset("epic-kitchens-100", root, class_names, tuple(videos), {"verb": verbs, "noun": nouns})


def _annotation_folder(root: Path) -> Path:
    names = (*_FILES.values(), "EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv")
    there = [[name for name in names if (root / folder / name).is_file()] for folder in _FOLDERS]
    best = max(range(len(_FOLDERS)), key=lambda place: len(there[place]))
    if absent := [name for name in names if name not in there[best]]:
        raise DatasetError(f"no {', '.join(absent)} in {root / _FOLDERS[best]}; expected:\n{_LAYOUT}")
    return root / _FOLDERS[best]


def _read_classes(file: Path) -> tuple[str, ...]:
    """The keys of the verb or noun classes, in the order of their ids, which count from 0."""
    keys: list[str] = []
    for line, row in read_csv(file, ("id", "key")):
        if row["id"] != str(len(keys)) or not row["key"]:
            raise DatasetError(
                f"id {row['id']!r} with key {row['key']!r}; expected {len(keys)} and a name", file=file, line=line
            )
        keys.append(row["key"])
    return tuple(keys)


def _read(file: Path, split: str, num_verbs: int, num_nouns: int) -> Iterator[_Narration]:
    for line, row in read_csv(file, _COLUMNS):
        if empty := [name for name in _COLUMNS if not row[name]]:
            raise DatasetError(f"{empty[0]} is empty; expected {','.join(_COLUMNS)}", file=file, line=line)
        start, stop = (_whole_number(row, name, file, line) for name in ("start_frame", "stop_frame"))
        start = max(start - 1, 0)
        if start >= stop:
            raise DatasetError(f"frames {row['start_frame']} to {stop} are none", file=file, line=line)
        yield _Narration(
            row["narration_id"],
            row["participant_id"],
            row["video_id"],
            Segment(float(start), float(stop), "frames"),
            _index(row, "verb_class", num_verbs, file, line),
            _index(row, "noun_class", num_nouns, file, line),
            split,
            file,
            line,
        )


def _whole_number(row: dict[str, str], name: str, file: Path, line: int) -> int:
    if not (row[name].isascii() and row[name].isdecimal()):
        raise DatasetError(f"{name} is {row[name]!r}; expected a whole number", file=file, line=line)
    return int(row[name])


def _index(row: dict[str, str], name: str, count: int, file: Path, line: int) -> int:
    index = _whole_number(row, name, file, line)
    if index >= count:
        listed = f"EPIC_100_{name.removesuffix('_class')}_classes.csv"
        raise DatasetError(f"{name} is {index}; {listed} has 0 to {count - 1}", file=file, line=line)
    return index


def _finder(root: Path) -> Callable[[_Narration], str]:
    """Narration -> path of its video relative to root; each folder is listed once, and each video looked up once."""
    found: dict[tuple[str, str], str] = {}

    @cache
    def listing(folder: Path) -> dict[str, str]:
        files = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
        return {file.stem: file.name for file in files if file.suffix.lower() in VIDEO_SUFFIXES}

    def look(row: _Narration) -> str:
        person = row.participant
        places = (f"{person}/videos", person, f"EPIC-KITCHENS/{person}/videos", f"videos/{person}", "videos")
        first = inside(root, f"{places[0]}/{row.video}.MP4", row.file, row.line)
        hits = (f"{place}/{name}" for place in places if (name := listing(root / place).get(row.video)))
        return next(hits, first)

    def find(row: _Narration) -> str:
        key = row.participant, row.video
        if key not in found:
            found[key] = look(row)
        return found[key]

    return find


def _video(row: _Narration, path: str, action: int) -> Video:
    labels = (("noun", row.noun), ("verb", row.verb))
    return Video(row.narration_id, path, action, row.split, segment=row.segment, labels=labels)


def _order(video: Video) -> tuple[tuple[int, str], str, float, str]:
    """File by file, from its beginning: what reads ahead finds the file in memory."""
    assert video.segment is not None
    return split_order(video.split), video.path, video.segment.start, video.video_id
