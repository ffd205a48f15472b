"""Kinetics-400, -600 and -700 from their own CSV files and a tree of clips: one form, three names."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from vcache.extract.datasets.base import (
    DatasetError,
    Video,
    VideoDataset,
    canonical_split,
    check_unique_ids,
    plain_name,
    read_csv,
    split_order,
)
from vcache.extract.datasets.disk import Disk
from vcache.extract.datasets.registry import register_dataset

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SPLIT_FOLDERS = {"val": ("val", "validate", "validation")}

_LAYOUT = """\
train.csv, val.csv, test.csv (or <anything>_val.csv, or annotations/*.csv): label,youtube_id,time_start,time_end,split
<youtube_id>_<start>_<end>.mp4|mkv|webm|..., with both times as six digits, in any of
    <split>/   <split>/<label>/   videos/   videos/<split>/   videos_<split>/   videos_<split>/<label>/   <label>/
    (a label with spaces or underscores); rows of test without a label are not used"""


def load_kinetics(name: str, root: Path) -> VideoDataset:
    """Read all CSVs under `root`; the classes are the sorted labels of all of them, as in every published list.

    A listed video that is not there keeps its row, with the first place where it was looked for as its path. Some copies
    give the videos of test no label: these are in no split, and `unused` has their paths.

    Raises:
        DatasetError: no CSV, or a malformed one.
    """
    rows = [(file, *row) for file in _annotation_files(root) for row in _read(file)]
    class_names = tuple(sorted({label for *_, label in rows} - {""}))
    label_of = {label: index for index, label in enumerate(class_names)}
    find = _finder(root)
    located, unused = [], []
    for file, line, video_id, split, label in rows:
        path = find(video_id, split, label)
        if label:
            located.append((Video(video_id, path, label_of[label], split), file, line))
        else:
            unused.append(path)
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset(name, root, class_names, tuple(videos), unused=tuple(sorted(unused)))


def _annotation_files(root: Path) -> list[Path]:
    """The CSVs named for a split in the root, else all in annotations/."""
    named = [path for path in sorted(root.glob("*.csv")) if _split_of(path) in ("train", "val", "test")]
    files = named or sorted(root.glob("annotations/*.csv"))
    if not files:
        raise DatasetError(f"no Kinetics CSV in {root} or {root / 'annotations'}; expected:\n{_LAYOUT}")
    return files


def _split_of(file: Path) -> str:
    return canonical_split(file.stem.replace("-", "_").rsplit("_", 1)[-1])


def _read(file: Path) -> Iterator[tuple[int, str, str, str]]:
    """Line, video id, split under its usual name, and label: "" where a row of test has none."""
    required = _COLUMNS[1:] if _is_unlabelled(file) else _COLUMNS
    for line, row in read_csv(file, required):
        split, label = canonical_split(row["split"]), row.get("label", "")
        if empty := [name for name in required if not row[name] and not (name == "label" and split == "test")]:
            raise DatasetError(f"{empty[0]} is empty; expected {','.join(_COLUMNS)}", file=file, line=line)
        yield line, _video_id(file, line, row), plain_name(split, "split", file, line), label


def _is_unlabelled(file: Path) -> bool:
    """A test list whose header has no label."""
    if _split_of(file) != "test":
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return "label" not in [name.strip().strip('"') for name in lines.readline().split(",")]


def _video_id(file: Path, line: int, row: dict[str, str]) -> str:
    start, end = row["time_start"], row["time_end"]
    if not (start.isdecimal() and end.isdecimal()):
        raise DatasetError(f"time_start {start!r} and time_end {end!r} must be whole seconds", file=file, line=line)
    youtube_id = plain_name(row["youtube_id"], "youtube_id", file, line)
    return f"{youtube_id}_{int(start):06d}_{int(end):06d}"


def _finder(root: Path) -> Callable[[str, str, str], str]:
    """(video id, split, label) -> path relative to root, on the disk or as it should be."""
    disk = Disk(root)

    @cache
    def folders(split: str, label: str) -> tuple[str, ...]:
        leads_elsewhere = label in ("", ".", "..") or set(label) & {"/", "\0"}
        labels = () if leads_elsewhere else tuple(dict.fromkeys((label, label.replace(" ", "_"))))
        splits = _SPLIT_FOLDERS.get(split, (split,))
        videos = [f"videos_{name}" for name in splits]
        return (
            *splits,
            *(f"{name}/{text}" for name in splits for text in labels),
            "videos",
            *(f"videos/{name}" for name in splits),
            *videos,
            *(f"{name}/{text}" for name in videos for text in labels),
            *labels,
        )

    def find(video_id: str, split: str, label: str) -> str:
        return disk.find(video_id, folders(split, label)) or f"{split}/{video_id}.mp4"

    return find


def _register(name: str, num_classes: int) -> None:
    @register_dataset(name, summary=f"Kinetics-{num_classes}: 10 s YouTube clips of human actions", layout=_LAYOUT)
    def load(root: Path) -> VideoDataset:
        return load_kinetics(name, root)


for _num_classes in (400, 600, 700):
    _register(f"k{_num_classes // 100}00", _num_classes)
