"""The world of moving shapes as video files: H.264 in MP4, in split folders, with a CSV that `vcache extract` reads.

    python -m vcache.pipelines.demo.render FOLDER --train 160 --val 80      # the same with larger numbers adds videos

    world/world.csv                        path,label,split, e.g. train/moves_left/00001.mp4,moves left,train
                                           or, labelled by appearance, train/red_star/00032.mp4,red star,train
    world/train/moves_left/00001.mp4
    world/val/...
    world/world.json                       the parameters; written last, so that it says the world is complete

The frames, before and after the encoder, are a function of the parameters alone, whatever the number of processes.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vcache.pipelines.demo.motions import LEVELS, MOTIONS, UnknownName, check_level, draw_clip, random_clip
from vcache.pipelines.demo.stills import COMBINATIONS, appearance

# The model that goes with the world, to be loaded as f"local-dir:{TINY_CLIP}".
TINY_CLIP = Path(__file__).with_name("tiny_clip")

SPLITS = ("train", "val")
CLASSES: dict[str, tuple[str, ...]] = {"motion": MOTIONS, "appearance": tuple(map(appearance, COMBINATIONS))}
"""What a clip is labelled by, and the names in the order in which the clips take turns."""
_RENDERER = 1  # goes up when the frames of the same parameters change, so that older folders are not taken for new ones
_CHUNK = 8  # clips per task of a worker
_CLIPS_WORTH_A_PROCESS = 150  # three seconds of rendering, which is what a process needs to start


class WorldMismatch(ValueError):
    """The folder holds a world of other parameters."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the files depend on."""

    train: int
    val: int
    level: str
    seed: int
    codec: str
    num_frames: int = 24
    height: int = 72
    width: int = 96
    frames_per_second: int = 12
    renderer: int = _RENDERER
    labels: str = "motion"


@dataclass(frozen=True)
class _Entry:
    split: str
    index: int
    labels: str

    @property
    def label(self) -> str:
        classes = CLASSES[self.labels]
        return classes[self.index % len(classes)]

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label.replace(' ', '_')}/{self.index:05d}.mp4"


def render_world(
    folder: Path,
    *,
    train: int = 400,
    val: int = 112,
    level: str = "easy",
    seed: int = 0,
    labels: str = "motion",
    num_processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render the clips that `folder` lacks and return the path of its CSV. About 20 ms of one core per clip.

    A world grows: with more clips and nothing else changed, those that are there stay as they are.

    Args:
        train, val: number of clips; the classes take turns.
        level: "easy", or "hard" with distracting objects and more shake.
        labels: "motion", the ten MOTIONS, each of any shape; or "appearance", the 64 colours and shapes as "red star", each in
            any motion. The tiny CLIP was trained without the captions of 16 of them, stills.HELD_OUT.
        num_processes: default: one per usable core, fewer for a small world.
        progress: called in this process with the number of clips that are there and the number of all.

    Raises:
        WorldMismatch: the folder holds a world of other parameters, or of more clips; nothing is changed.
        UnknownName: no such level or labels.
    """
    check_level(level)
    if labels not in CLASSES:
        raise UnknownName(f"no labels {labels!r}; the labels are {', '.join(CLASSES)}")
    world = World(train=train, val=val, level=level, seed=seed, codec=_codec(), labels=labels)
    finished = _is_finished(folder, world)
    entries = [
        _Entry(split, index, labels)
        for split, count in zip(SPLITS, (train, val), strict=True)
        for index in range(count)
    ]
    # Without world.json, what lies there is of an interrupted rendering, of whatever parameters.
    missing = [entry for entry in entries if not (finished and (folder / entry.path).is_file())]
    num_done = len(entries) - len(missing)
    if progress:
        progress(num_done, len(entries))
    for num_rendered in _render(folder, world, missing, num_processes):
        num_done += num_rendered
        if progress:
            progress(num_done, len(entries))
    _write_text(folder / "world.csv", _csv(entries))
    _write_text(folder / "world.json", json.dumps(asdict(world), indent=1) + "\n")
    return folder / "world.csv"


def clip_frames(world: World, split: str, index: int) -> UInt8[Tensor, "T height width 3"]:
    """The frames of one clip before they are encoded."""
    rng = np.random.default_rng([world.seed, SPLITS.index(split), index])
    if world.labels == "motion":
        combination = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]
        motion = _Entry(split, index, world.labels).label
    else:
        combination = COMBINATIONS[index % len(COMBINATIONS)]
        motion = MOTIONS[int(rng.integers(len(MOTIONS)))]
    clip = random_clip(rng, motion, combination, level=world.level, num_frames=world.num_frames)
    return draw_clip(clip, height=world.height, width=world.width)


def write_video(
    path: Path, frames: UInt8[Tensor, "T height width 3"], *, codec: str, frames_per_second: int = 12
) -> None:
    """Encode frames as MP4, equal bytes for equal frames and libraries; a half-written file never has the name `path`.

    x264's faster motion search and its rate control gave other pixels from run to run, even on one thread: the
    "ultrafast" preset at a constant quantiser did not, nor did mpeg4.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=frames_per_second)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "qp": "20"}
        else:
            stream.codec_context.qmin = stream.codec_context.qmax = 2  # its default rate would blur the small shapes
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def _codec() -> str:
    """x264 is under the GPL, so not every build of FFmpeg has it."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _is_finished(folder: Path, world: World) -> bool:
    """Whether the folder is complete with these parameters or fewer clips; raises WorldMismatch if it is so with others."""
    if not (folder / "world.json").is_file():
        return False
    # Older folders do not say what they are labelled by: there were motions alone.
    there, asked = {"labels": "motion", **json.loads((folder / "world.json").read_text())}, asdict(world)
    different = [name for name in asked if there.get(name) != asked[name]]
    if not all(name in SPLITS and there.get(name, 0) <= asked[name] for name in different):
        differences = ", ".join(f"{name} {there.get(name)} instead of {asked[name]}" for name in different)
        raise WorldMismatch(
            f"{folder} holds a world of moving shapes with {differences}.\n"
            f"Render into another folder, or remove this one first:  rm -r {folder}"
        )
    return True


def _render(folder: Path, world: World, entries: list[_Entry], num_processes: int | None) -> Iterator[int]:
    """Render, yielding how many clips have been added; in this process if one is enough."""
    chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
    if num_processes is None:
        num_processes = min(len(os.sched_getaffinity(0)), len(entries) // _CLIPS_WORTH_A_PROCESS)
    if num_processes <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            with _one_thread():
                yield _render_chunk(folder, world, chunk)
        return
    # Spawned, not forked: a fork of a process whose torch has threads can hang. An executor, not a Pool: if a worker
    # dies, its futures raise, where a Pool would wait for ever.
    executor = ProcessPoolExecutor(
        min(num_processes, len(chunks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        for future in as_completed([executor.submit(_render_chunk, folder, world, chunk) for chunk in chunks]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _render_chunk(folder: Path, world: World, entries: list[_Entry]) -> int:
    for entry in entries:
        frames = clip_frames(world, entry.split, entry.index)
        write_video(folder / entry.path, frames, codec=world.codec, frames_per_second=world.frames_per_second)
    return len(entries)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads than one only cost time on pictures of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _csv(entries: list[_Entry]) -> str:
    rows = [f"{entry.path},{entry.label},{entry.split}" for entry in entries]
    return "\n".join(["path,label,split", *rows]) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Render a world as the command line asks, and say what is there and which model knows it."""
    parser = argparse.ArgumentParser(
        prog="python -m vcache.pipelines.demo.render", description="Videos of moving shapes, to try vcache on."
    )
    parser.add_argument("folder", type=Path, help="gets train/CLASS/*.mp4, val/CLASS/*.mp4 and world.csv")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="videos to train on (default: 400)")
    parser.add_argument("--val", type=int, default=112, metavar="N", help="videos to validate on (default: 112)")
    parser.add_argument(
        "--level", choices=tuple(LEVELS), default="easy", help="hard: other shapes lie about, more shake"
    )
    parser.add_argument("--labels", choices=tuple(CLASSES), default="motion", help="what the classes are")
    parser.add_argument("--seed", type=int, default=0)
    asked = vars(parser.parse_args(argv))
    try:
        csv = render_world(**asked)
    except WorldMismatch as error:
        sys.exit(f"error: {error}")
    classes = len(CLASSES[asked["labels"]])
    print(f"{asked['folder']}  train {asked['train']}, val {asked['val']} videos of {classes} classes; listed in {csv}")


if __name__ == "__main__":
    main()
