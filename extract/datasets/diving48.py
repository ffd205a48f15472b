"""Diving48: which of 48 dives, known by take-off, somersaults, twists and position alone."""

from pathlib import Path

from vcache.extract.datasets.annotations import check_unique_entries, find_file, read_entries, read_json
from vcache.extract.datasets.base import DatasetError, Video, VideoDataset, plain_name, split_order
from vcache.extract.datasets.disk import Disk
from vcache.extract.datasets.registry import register_dataset

_LAYOUT = """\
Diving48_vocab.json (48 lists of four words), Diving48_V2_train.json, Diving48_V2_test.json
    [{vid_name, label, start_frame, end_frame}]; in the root or annotations/
<vid_name>.mp4|... in rgb/, videos/ or the root: one file a dive, so that the frame numbers are not needed"""


@register_dataset("diving48", summary="Diving48 V2: 48 dives, told apart by their motion alone", layout=_LAYOUT)
def load_diving48(root: Path) -> VideoDataset:
    """Read the vocabulary and the lists that are there; a class is the four words of its dive, as in "Back 15som 05Twis FREE".

    Raises:
        DatasetError: no vocabulary or no list, or a malformed one (with the entry).
    """
    class_names, disk = _class_names(root), Disk(root)
    located = []
    for split in ("train", "test"):
        file = find_file(root, (f"Diving48_V2_{split}.json",))
        for entry in read_entries(file) if file else ():
            video_id = plain_name(entry.text("vid_name"), f"entry {entry.number}: vid_name", entry.file, None)
            path = disk.find(video_id, ("rgb", "videos", "")) or f"rgb/{video_id}.mp4"
            located.append((Video(video_id, path, entry.index("label", class_names), split), entry))
    if not located:
        raise DatasetError(f"no Diving48_V2_train.json or _test.json with videos in {root}; expected:\n{_LAYOUT}")
    check_unique_entries(located)
    videos = sorted((video for video, _ in located), key=lambda video: (split_order(video.split), video.video_id))
    return VideoDataset("diving48", root, class_names, tuple(videos))


def _class_names(root: Path) -> tuple[str, ...]:
    file = find_file(root, ("Diving48_vocab.json",))
    if file is None:
        raise DatasetError(f"no Diving48_vocab.json in {root}; expected:\n{_LAYOUT}")
    vocabulary = read_json(file)
    if not isinstance(vocabulary, list) or not vocabulary:
        raise DatasetError("expected a list of lists of words", file=file)
    for number, words in enumerate(vocabulary, start=1):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise DatasetError(f"entry {number}: {repr(words)[:60]}; expected a list of words", file=file)
    names = tuple(" ".join(words) for words in vocabulary)
    if len(set(names)) < len(names):
        raise DatasetError("two entries are the same", file=file)
    return names
