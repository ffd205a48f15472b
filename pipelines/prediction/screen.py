"""What `vcache predict` prints, writes, or gives as JSON."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.console import count
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.prediction.predict import Prediction
from vcache.pipelines.prediction.stream import VideoScores
from vcache.pipelines.prediction.timeline_sheets import clock, draw_timeline, write_timeline_csv
from vcache.pipelines.prediction.windows import Timeline
from vcache.pipelines.stored_views import ONE_VIEW, describe_grid, grid_word

_BAR = 24
_MOST_STRETCHES = 20
"""Lines of a timeline on the screen."""


def save_predictions(found: Prediction, out: Path) -> Path | None:
    """The predictions of the videos that could be read: an npz, a member for `vcache ensemble`, or a CSV.

    None, and no file, where no video could be read: the failures say why."""
    read = [one for one in found.whole if one.scores is not None]
    if not read:
        return None
    predictions = Predictions(
        scores=torch.stack([one.scores for one in read if one.scores is not None]).numpy(),
        kind="sigmoid" if found.model.multi_label else "softmax",
        video_ids=tuple(one.video.video_id for one in read),
        paths=tuple(one.video.path for one in read),
        class_names=found.model.class_names,
        views=grid_word(found.views),
        average=found.average,
        store_key=found.model.store_key,
        run=str(found.model.source.resolve()),
        of_classes="trained",
    )
    predictions.save(out) if out.suffix == ".npz" else predictions.save_csv(out)
    return out


class TimelineSheets:
    """A CSV and a picture of each timeline, named by its video and written as soon as it is there: a stop after hours of videos
    loses the one at hand."""

    def __init__(self, folder: Path, run: Path, num_top: int) -> None:
        self.folder, self.run, self.num_top = folder, run, num_top
        self.written: list[tuple[Path, Path]] = []
        """Both paths of each."""
        self._taken: set[str] = set()

    def add(self, timeline: Timeline) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = _free(Path(timeline.video.path).stem, self._taken)
        table, picture = self.folder / f"{stem}.csv", self.folder / f"{stem}.png"
        write_timeline_csv(timeline, table, self.num_top)
        draw_timeline(timeline, str(self.run)).save(picture)
        self.written.append((table, picture))


def _free(stem: str, taken: set[str]) -> str:
    """ "clip", and of other videos of that name "clip-2", "clip-3"."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def described(found: Prediction, num_top: int, saved: Path | None, sheets: list[tuple[Path, Path]]) -> dict[str, Any]:
    """All of it for a program."""
    return {
        "run": str(found.model.source),
        "views": grid_word(found.views),
        "average": found.average,
        "multi_label": found.model.multi_label,
        "class_names": list(found.model.class_names),
        "videos": [_described(found, one, num_top) for one in found.whole],
        "timelines": [
            _described_timeline(timeline, num_top, *(sheets[number] if sheets else (None, None)))
            for number, timeline in enumerate(found.timelines)
        ],
        "saved": None if saved is None else str(saved),
    }


def _described(found: Prediction, one: VideoScores, num_top: int) -> dict[str, Any]:
    told: dict[str, Any] = {"video": one.video.video_id, "path": one.video.path}
    if one.failure is not None:
        return told | {"failure": {"kind": one.failure.kind, "reason": one.failure.reason}}
    return told | {
        "frames": one.num_video_frames,
        "fps": one.fps,
        "top": [{"class": name, "probability": p} for name, p in _top(found, one, num_top)],
    }


def _described_timeline(timeline: Timeline, num_top: int, table: Path | None, picture: Path | None) -> dict[str, Any]:
    windows = []
    for window, failure in enumerate(timeline.failures):
        told: dict[str, Any] = {"start": timeline.starts[window].item(), "stop": timeline.stops[window].item()}
        if failure is not None:
            told["failure"] = {"kind": failure.kind, "reason": failure.reason}
        else:
            values = timeline.probabilities[window]
            best = np.argsort(-values, kind="stable")[:num_top]
            told["top"] = [{"class": timeline.class_names[k], "probability": values[k].item()} for k in best]
        windows.append(told)
    return {
        "video": timeline.video.video_id,
        "path": timeline.video.path,
        "windows": windows,
        "csv": None if table is None else str(table),
        "picture": None if picture is None else str(picture),
    }


def _top(found: Prediction, one: VideoScores, num_top: int) -> list[tuple[str, float]]:
    assert one.scores is not None
    probabilities = found.model.probabilities(one.scores.double().unsqueeze(0))[0]
    best = torch.argsort(probabilities, descending=True, stable=True)[:num_top].tolist()
    return [(found.model.class_names[k], probabilities[k].item()) for k in best]


def print_prediction(found: Prediction, num_top: int, saved: Path | None, sheets: list[tuple[Path, Path]]) -> None:
    """Of one video its classes with bars, of several a line each, of windows what is when."""
    read = [one for one in found.whole if one.failure is None]
    if len(read) == 1:
        _print_one(found, read[0], num_top)
    elif read:
        _print_several(found, read, num_top)
    for number, timeline in enumerate(found.timelines):
        _print_timeline(timeline)
        for path in sheets[number] if sheets else ():
            console.out.print(f"  {path}", soft_wrap=True, markup=False, highlight=False)
    if found.views != ONE_VIEW:
        console.out.print(f"  {describe_grid(grid_word(found.views))}, {found.average}", highlight=False)
    if found.num_others:
        console.out.print(f"  {count(found.num_others, 'other file')} in the folders left out", highlight=False)
    if saved is not None:
        console.out.print(f"  saved  {saved}", soft_wrap=True, markup=False, highlight=False)
    _print_failures(found)


def _print_one(found: Prediction, one: VideoScores, num_top: int) -> None:
    console.out.print(one.video.video_id, style="bold", soft_wrap=True, markup=False, highlight=False)
    top = _top(found, one, num_top)
    room = max(10, console.out.width - _BAR - 14)
    wide = min(room, max(cell_len(name) for name, _ in top))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column("", width=1)
    table.add_column("class", width=wide, overflow="ellipsis", no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("bar", no_wrap=True)
    for name, probability in top:
        table.add_row("", escape(name), f"{probability:.1%}", bar(probability))
    console.out.print(table)


def bar(share: float, width: int = _BAR) -> str:
    """A bar of eighths of a letter, at most so many letters long."""
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _print_several(found: Prediction, read: list[VideoScores], num_top: int) -> None:
    """The names without the folder that all have in common, which is told above."""
    names = [one.video.video_id for one in read]
    folder = common_folder(names)
    if folder:
        console.out.print(f"{folder}/", style="bold", soft_wrap=True, markup=False, highlight=False)
        names = [str(Path(name).relative_to(folder)) for name in names]
    table = Table(box=None, pad_edge=False, expand=num_top > 1)
    table.add_column("video", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    if num_top > 1:
        table.add_column("then", style="dim", overflow="ellipsis", no_wrap=True, ratio=1)
    for name, one in zip(names, read, strict=True):
        (best, probability), *others = _top(found, one, num_top)
        then = ", ".join(f"{other} {p:.0%}" for other, p in others)
        row = (escape(name), escape(best), f"{probability:.1%}", escape(then))
        table.add_row(*row[: 4 if num_top > 1 else 3])
    console.out.print(table)


def common_folder(names: list[str]) -> str:
    """Empty where they have none: of absolute and relative names, and of files of the working directory."""
    paths = [Path(name) for name in names]
    if len({path.is_absolute() for path in paths}) > 1:
        return ""
    common = os.path.commonpath([path.parent for path in paths])
    return "" if common in (".", "/") else common


def _print_timeline(timeline: Timeline) -> None:
    console.out.print(timeline.video.video_id, style="bold", soft_wrap=True, markup=False, highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column("")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    stretches = timeline.stretches
    tenths = bool((timeline.stops[-1] - timeline.starts[0]) / len(timeline.starts) < 2)
    for first, last, best in stretches[:_MOST_STRETCHES]:
        # Windows may overlap, and a stretch then ends where the next one begins.
        stop = timeline.stops[last] if last + 1 == len(timeline.starts) else timeline.starts[last + 1]
        time = f"{clock(timeline.starts[first], tenths=tenths)} - {clock(stop, tenths=tenths)}"
        if best is None:
            failure = timeline.failures[first]
            table.add_row("", time, f"[red]could not be decoded[/red]: {escape(str(failure))}", "")
            continue
        mean = timeline.probabilities[first : last + 1, best].mean()
        table.add_row("", time, escape(timeline.class_names[best]), f"{mean:.1%}")
    console.out.print(table)
    if len(stretches) > _MOST_STRETCHES:
        console.out.print(f"  ... and {len(stretches) - _MOST_STRETCHES} more stretches", highlight=False)


def _print_failures(found: Prediction) -> None:
    failures = found.failures
    if not failures:
        return
    table = Table(title=f"{count(len(failures), 'video')} could not be read", title_justify="left", box=None)
    for column in ("kind", "video", "reason"):
        table.add_column(column, overflow="fold")
    for one in failures:
        assert one.failure is not None
        table.add_row(one.failure.kind, escape(one.video.video_id), escape(one.failure.reason))
    console.err.print(table)
