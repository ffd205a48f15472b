"""Which videos are meant by the words of `vcache predict`: files, folders with all videos in them, ids of a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vcache.extract.datasets.base import VIDEO_SUFFIXES, Video
from vcache.extract.video import Segment
from vcache.pipelines.console import count
from vcache.pipelines.finding import UnknownVideo, find_video
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


@dataclass(frozen=True)
class Collected:
    """Videos in the order in which they were named, each once, with absolute paths."""

    videos: tuple[Video, ...]
    """The id is the path as it was named, or the id in the store; there is no label."""
    num_others: int
    """Files in the folders that are no videos by their names."""


def collect_videos(words: Sequence[str], store: StorePath | None, *, frame_folders: bool = False) -> Collected:
    """Files whatever their names, folders with every video below them in sorted order, else ids of the store.

    Args:
        frame_folders: a folder is a video, of which the files are the frames.

    Raises:
        UnknownVideo: there is no such file, folder or id, or a folder has no video in it.
    """
    videos: list[Video] = []
    num_others = 0
    for word in words:
        path = Path(word)
        if not path.exists():
            videos.append(_of_store(word, store))
        elif path.is_dir() and not frame_folders:
            found, others = _in_folder(path)
            videos += found
            num_others += others
        else:
            videos.append(_file(path))
    once: dict[tuple[str, Segment | None], Video] = {}
    for video in videos:
        once.setdefault((video.path, video.segment), video)
    return Collected(tuple(once.values()), num_others)


def _file(path: Path) -> Video:
    return Video(str(path), str(path.absolute()), -1, "none")


def _in_folder(folder: Path) -> tuple[list[Video], int]:
    files = sorted(_files(folder))
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        held = f", but {count(len(files), 'file')}" if files else ": it is empty"
        raise UnknownVideo(
            f"{folder} has no video in it or below{held}. Videos in a folder are known by their names: "
            f"{', '.join(VIDEO_SUFFIXES)}. A file named by itself is read whatever its name."
        )
    return [_file(path) for path in videos], len(files) - len(videos)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        broken_link = path.is_symlink() and not path.exists()  # is listed, and then named as missing
        if (path.is_file() or broken_link) and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _of_store(word: str, store: StorePath | None) -> Video:
    if store is None:
        raise UnknownVideo(f"{word} is neither a file nor a folder. Name videos, or folders with videos in them.")
    with FeatureStore.open(store) as opened:
        target = find_video(opened, video=word, row=None, split=None)
    return replace(target.video, path=str((target.root / target.video.path).absolute()))
