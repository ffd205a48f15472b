"""What a head looks at in some videos, as strips of heat maps over frames: of explaining.py, drawn for a page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vcache.extract.video import VideoError
from vcache.pipelines.explaining import can_explain, explain_each
from vcache.pipelines.explanation import Attention, ExplainError, Explanation, Magnitudes, Question
from vcache.pipelines.finding import UnknownVideo
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.pictures import Range, enlarged, enlargement, overlay, ranged_overlay
from vcache.pipelines.reporting.examples import Example
from vcache.pipelines.reporting.frames import evenly, strip
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.runs import RunError
from vcache.store.errors import StoreError
from vcache.store.object_path import StorePath

FRAMES = 8
"""Of a clip at most."""
_HIGH = 96
_EXPECTED = (ExplainError, RunError, UnknownVideo, HeadStoreMismatch, StoreError, VideoError, OSError)


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """One video."""

    video_id: str
    labels: tuple[str, ...]
    predictions: tuple[tuple[str, float], ...]
    rows: tuple[tuple[str, Image.Image], ...]
    """(what it is, a strip of frames)."""
    notes: tuple[str, ...]


def draw_overlays(
    record: RunRecord,
    split: str,
    videos: Sequence[Example],
    *,
    store: StorePath,
    root: Path | None,
    device: str,
    on_note: Callable[[str], None],
    on_video: Callable[[int], None] = lambda done: None,
) -> list[Overlay]:
    """Of these videos of a split, while it works: what stops it is told to `on_note`, and what was drawn until then is returned.

    Heads that offer nothing to look at give nothing, without a word.
    """
    if not can_explain(record.run):
        return []
    drawn: list[Overlay] = []
    questions = [Question(video=video.video_id, split=split) for video in videos]
    try:
        found = explain_each(record.path, questions, store=store, root=root, device=device)
        for video, explanation in zip(videos, found, strict=True):
            drawn.append(_overlay(explanation, video.labels))
            on_video(len(drawn))
    except _EXPECTED as error:
        on_note(f"Attention is not drawn for {len(videos) - len(drawn)} of {len(videos)} videos: {error}")
    return drawn


def _overlay(explanation: Explanation, labels: tuple[str, ...]) -> Overlay:
    found = explanation.found
    rows = _attention_rows(explanation, found) if isinstance(found, Attention) else _magnitude_rows(explanation, found)
    return Overlay(
        video_id=explanation.video_id,
        labels=labels,
        predictions=explanation.predictions,
        rows=tuple(rows),
        notes=explanation.notes,
    )


def _attention_rows(explanation: Explanation, found: Attention) -> list[tuple[str, Image.Image]]:
    """The frames, CLIP's CLS and the head's query, each with one scale over all frames (figure 4 of EVL)."""
    shown, layer = evenly(len(explanation.images), FRAMES), found.layers[-1]
    rows = [("frames", strip([explanation.images[t] for t in shown], _HIGH))]
    for words, weights in (
        (f"CLIP's [CLS], layer {layer.layer}", layer.cls),
        (f"head's query, layer {layer.layer}", layer.query),
    ):
        maps = weights[:, 1:].reshape(-1, *explanation.tiling.grid)
        rows.append((words, strip([_tinted(explanation, t, maps[t], float(maps.max())) for t in shown], _HIGH)))
    return rows


def _tinted(explanation: Explanation, frame: int, weights: np.ndarray, largest: float) -> np.ndarray:
    image = explanation.images[frame]
    return overlay(image, weights, largest, explanation.tiling, enlargement(image.shape[0], _HIGH))


def _magnitude_rows(explanation: Explanation, found: Magnitudes) -> list[tuple[str, Image.Image]]:
    """The pixel frames, and the norms of the temporal encoder's features and of CLIP's (figure 5b of DiST)."""
    layer = found.layers[-1]
    step = len(layer.temporal) // len(layer.spatial)
    frames = [step * t for t in evenly(len(layer.spatial), FRAMES)]  # those that the backbone sees too
    factor = enlargement(found.pixels.shape[1], _HIGH)
    rows = [("frames", strip([enlarged(found.pixels[t], factor) for t in frames], _HIGH))]
    for words, norms, places in (
        (f"CLIP's features, layer {layer.layer}", layer.spatial, [t // step for t in frames]),
        (f"head's temporal features, layer {layer.layer}", layer.temporal, frames),
    ):
        scale = Range.of(norms)
        tinted = [
            ranged_overlay(found.pixels[t], norms[place], scale, explanation.tiling, factor)
            for t, place in zip(frames, places, strict=True)
        ]
        rows.append((words, strip(tinted, _HIGH)))
    return rows
