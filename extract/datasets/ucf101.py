"""UCF101 with its three official splits, each under a name of its own."""

from pathlib import Path, PurePosixPath

from vcache.extract.datasets.annotations import find_file, read_lines
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset, check_unique_ids, inside, split_order
from vcache.extract.datasets.disk import Disk, join, without_suffix
from vcache.extract.datasets.registry import register_folds

_ANNOTATIONS = ("", "ucfTrainTestlist", "annotations")
_VIDEOS = ("", "UCF-101", "UCF101", "videos")

_LAYOUT = """\
classInd.txt "1 ApplyEyeMakeup", trainlist0k.txt "ApplyEyeMakeup/v_x.avi 1", testlist0k.txt without the index;
    in the root, ucfTrainTestlist/ or annotations/; k is 1 for ucf101, 2 for ucf101-2, 3 for ucf101-3
<class>/v_x.avi|mp4|... in the root, UCF-101/, UCF101/ or videos/"""


def load_ucf101(name: str, fold: int, root: Path) -> VideoDataset:
    """Read one of the three official splits; the classes are those of classInd.txt, in its order.

    Raises:
        DatasetError: a list is not there, or malformed (with the line).
    """
    class_names = _class_names(root)
    disk, label_of = Disk(root), {class_name.casefold(): index for index, class_name in enumerate(class_names)}
    located = []
    for split in ("train", "test"):
        file = _file(root, f"{split}list0{fold}.txt")
        for line, text in read_lines(file):
            path, label = _row(text, root, file, line, label_of)
            located.append((Video(without_suffix(path), _place(disk, path), label, split), file, line))
    check_unique_ids(located)
    videos = sorted((video for video, _, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset(name, root, class_names, tuple(videos))


def _file(root: Path, name: str) -> Path:
    if file := find_file(root, (name,), _ANNOTATIONS):
        return file
    raise DatasetError(f"no {name} in {root}; expected:\n{_LAYOUT}")


def _class_names(root: Path) -> tuple[str, ...]:
    file, names = _file(root, "classInd.txt"), list[str]()
    for line, text in read_lines(file):
        index, name = (*text.split(maxsplit=1), "")[:2]
        if index != str(len(names) + 1) or not name:
            raise DatasetError(f"{text[:60]!r}; expected {len(names) + 1} and a class", file=file, line=line)
        if name.casefold() in (other.casefold() for other in names):
            raise DatasetError(f"the class {name!r} is listed twice", file=file, line=line)
        names.append(name)
    return tuple(names)


def _row(text: str, root: Path, file: Path, line: int, label_of: dict[str, int]) -> tuple[str, int]:
    """Path and label. The folder says the class, and an index, from 1, has to agree with it.

    In any case: the copies of the data do not agree on HandstandPushups.
    """
    listed, _, index = text.rpartition(" ")
    if not index.isdecimal():  # a list of test, which has none
        listed, index = text, ""
    path = inside(root, listed.strip(), file, line)
    label = label_of.get(PurePosixPath(path).parent.name.casefold())
    if label is None:
        raise DatasetError(f"{path!r} is not in the folder of a class of classInd.txt", file=file, line=line)
    if index not in ("", str(label + 1)):
        raise DatasetError(
            f"index {index} for {path!r}; its folder has {label + 1} in classInd.txt", file=file, line=line
        )
    return path, label


def _place(disk: Disk, path: str) -> str:
    """Where the video is, or where it was looked for first. A copy may have been converted, hence the stem alone."""
    folder, _, stem = without_suffix(path).rpartition("/")
    return disk.find(stem, [join(place, folder) for place in _VIDEOS]) or join(_folder(disk), path)


def _folder(disk: Disk) -> str:
    return next((place for place in _VIDEOS[1:] if disk.folder(place)), "")


register_folds("ucf101", load_ucf101, num_folds=3, summary="UCF101: 101 actions", layout=_LAYOUT)
