"""Something-Something V2: templates for classes, JSON lists, one .webm a video."""

from collections.abc import Iterator
from pathlib import Path

from vcache.extract.datasets.annotations import (
    Entry,
    check_unique_entries,
    find_file,
    read_entries,
    read_json,
    read_lines,
)
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset, plain_name, split_order
from vcache.extract.datasets.disk import Disk, join
from vcache.extract.datasets.registry import register_dataset

_PREFIX = "something-something-v2-"
_LISTS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}
_ANNOTATIONS = ("", "labels", "annotations")
_VIDEOS = ("20bn-something-something-v2", "videos/20bn-something-something-v2", "videos", "")

_LAYOUT = """\
labels.json {template without brackets: "index"}, train.json, validation.json [{id, template, ...}], test.json with
    test-answers.csv id;label (without it, test is not used); in the root, labels/ or annotations/, with or without
    something-something-v2- before the name; a list may have label_idx in place of template (*-with-label.json)
<id>.webm|mp4|... in [videos/]20bn-something-something-v2/, videos/ or the root"""


@register_dataset("ssv2", summary="Something-Something V2: 174 templates of handling objects", layout=_LAYOUT)
def load_ssv2(root: Path) -> VideoDataset:
    """Read labels.json and the lists that are there; the order of the classes is that of their indices.

    Videos of test without an answer are in no split; `unused` has their paths.

    Raises:
        DatasetError: no labels or no list, a malformed one (with the entry), a template that is not a class.
    """
    class_names = _class_names(root)
    disk, label_of = Disk(root), {name: index for index, name in enumerate(class_names)}
    located, unused = [], []
    for split, file in _lists(root):
        answers = _answers(root, label_of) if split == "test" else {}
        for entry in read_entries(file):
            video_id = plain_name(entry.text("id"), f"entry {entry.number}: id", file, None)
            path = disk.find(video_id, _VIDEOS) or join(_folder(disk), f"{video_id}.webm")
            label = _label(entry, class_names, label_of)
            if label is None and answers is not None:
                label = _answer(entry, video_id, answers)
            if label is None:
                unused.append(path)
            else:
                located.append((Video(video_id, path, label, split), entry))
    check_unique_entries(located)
    videos = sorted((video for video, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset("ssv2", root, class_names, tuple(videos), unused=tuple(sorted(unused)))


def _class_names(root: Path) -> tuple[str, ...]:
    file = find_file(root, _names("labels.json"), _ANNOTATIONS)
    if file is None:
        raise DatasetError(f"no labels.json in {root}; expected:\n{_LAYOUT}")
    indices = read_json(file)
    if not isinstance(indices, dict) or not indices:
        raise DatasetError('expected an object of {template: "index"}', file=file)
    by_index = {str(index): name for name, index in indices.items()}
    if set(by_index) != {str(index) for index in range(len(indices))}:
        raise DatasetError(f"the indices of its {len(indices)} templates are not 0 to {len(indices) - 1}", file=file)
    return tuple(by_index[str(index)] for index in range(len(indices)))


def _lists(root: Path) -> list[tuple[str, Path]]:
    found = []
    for split, stems in _LISTS.items():
        names = [
            name for stem in stems for form in (f"{stem}.json", f"{stem}-with-label.json") for name in _names(form)
        ]
        if file := find_file(root, names, _ANNOTATIONS):
            found.append((split, file))
    if not found:
        raise DatasetError(f"no train.json, validation.json or test.json in {root}; expected:\n{_LAYOUT}")
    return found


def _names(name: str) -> tuple[str, str]:
    return name, _PREFIX + name


def _folder(disk: Disk) -> str:
    """Where a video that is not there should be: in the first of the usual folders that is."""
    return next((name for name in _VIDEOS[:-1] if disk.folder(name)), _VIDEOS[0])


def _label(entry: Entry, class_names: tuple[str, ...], label_of: dict[str, int]) -> int | None:
    """The label that the entry itself gives, by template, by index, or by both if they agree."""
    by_index = entry.index("label_idx", class_names) if "label_idx" in entry.fields else None
    if "template" not in entry.fields:
        return by_index
    template = _class_of(entry.text("template"))
    if template not in label_of:
        raise entry.error(f"template {template!r} is not in labels.json")
    if by_index not in (None, label_of[template]):
        raise entry.error(f"label_idx is {by_index}, and {template!r} has index {label_of[template]} in labels.json")
    return label_of[template]


def _class_of(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _answers(root: Path, label_of: dict[str, int]) -> dict[str, int] | None:
    """Video id -> label from test-answers.csv, or None without that file."""
    file = find_file(root, _names("test-answers.csv"), _ANNOTATIONS)
    return None if file is None else dict(_read_answers(file, label_of))


def _answer(entry: Entry, video_id: str, answers: dict[str, int]) -> int:
    if video_id not in answers:
        where = ", nor an answer in test-answers.csv" if answers else ""
        raise entry.error(f"video {video_id} has neither a template nor a label_idx{where}")
    return answers[video_id]


def _read_answers(file: Path, label_of: dict[str, int]) -> Iterator[tuple[str, int]]:
    for line, text in read_lines(file):
        if line == 1 and text.replace(" ", "").lower() == "id;label":
            continue
        video_id, _, answer = (part.strip() for part in text.partition(";"))
        if not (video_id and answer):
            raise DatasetError(f"{text[:60]!r} is not id;label", file=file, line=line)
        label = _class_of(answer.strip('"'))
        if label not in label_of:
            raise DatasetError(f"{label!r} is not in labels.json", file=file, line=line)
        yield video_id, label_of[label]
