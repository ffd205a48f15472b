"""HMDB-51 with its three official splits, each under a name of its own."""

import re
from pathlib import Path

from vcache.extract.datasets.annotations import read_lines
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset, check_unique_ids, plain_name, split_order
from vcache.extract.datasets.disk import Disk, join, without_suffix
from vcache.extract.datasets.registry import register_folds

_ANNOTATIONS = ("", "testTrainMulti_7030_splits", "test_train_splits", "annotations")
_VIDEOS = ("", "hmdb51_org", "hmdb51", "HMDB51", "videos")
_FILE = re.compile(r"(?P<label>[^.].*)_test_split(?P<fold>[123])\.txt")
_SPLITS = {"0": None, "1": "train", "2": "test"}

_LAYOUT = """\
<class>_test_split<k>.txt "x.avi 1" (1 train, 2 test, 0 neither), one for each class; in the root,
    testTrainMulti_7030_splits/, test_train_splits/ or annotations/; k is 1 for hmdb51, 2 for hmdb51-2, 3 for hmdb51-3
<class>/x.avi|mp4|... in the root, hmdb51_org/, hmdb51/, HMDB51/ or videos/"""


def load_hmdb51(name: str, fold: int, root: Path) -> VideoDataset:
    """Read one of the three official splits; the classes are sorted. `unused` has the videos that it gives to neither side.

    Raises:
        DatasetError: no lists, a class without the list of this split, or a malformed list (with the line).
    """
    files = _files(root, fold)
    class_names, disk = tuple(sorted(files)), Disk(root)
    located, unused = [], []
    for label, class_name in enumerate(class_names):
        file = files[class_name]
        for line, text in read_lines(file):
            video_id, path, split = _row(text, class_name, disk, file, line)
            if split is None:
                unused.append(path)
            else:
                located.append((Video(video_id, path, label, split), file, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset(name, root, class_names, tuple(videos), unused=tuple(sorted(unused)))


def _files(root: Path, fold: int) -> dict[str, Path]:
    """Class -> its list; a class that has lists of other splits alone is a download that broke off."""
    for folder in _ANNOTATIONS:
        matches = [(match, path) for path in (root / folder).glob("*.txt") if (match := _FILE.fullmatch(path.name))]
        found = {match["label"]: path for match, path in matches if match["fold"] == str(fold)}
        if absent := sorted({match["label"] for match, _ in matches} - set(found)):
            names = ", ".join(f"{label}_test_split{fold}.txt" for label in absent[:3])
            raise DatasetError(f"{len(absent)} of the lists of split {fold} are not in {root / folder}: {names}")
        if found:
            return found
    raise DatasetError(f"no <class>_test_split{fold}.txt in {root}; expected:\n{_LAYOUT}")


def _row(text: str, class_name: str, disk: Disk, file: Path, line: int) -> tuple[str, str, str | None]:
    """Video id, path and split."""
    name, _, tag = text.rpartition(" ")
    if tag not in _SPLITS or not name.strip():
        raise DatasetError(f"{text[:60]!r} is not a video and 0, 1 or 2", file=file, line=line)
    name = plain_name(name.strip(), "video", file, line)
    stem = without_suffix(name)
    path = disk.find(stem, [join(place, class_name) for place in _VIDEOS])
    return f"{class_name}/{stem}", path or join(_folder(disk), f"{class_name}/{name}"), _SPLITS[tag]


def _folder(disk: Disk) -> str:
    return next((place for place in _VIDEOS[1:] if disk.folder(place)), "")


register_folds("hmdb51", load_hmdb51, num_folds=3, summary="HMDB-51: 51 actions from films", layout=_LAYOUT)
