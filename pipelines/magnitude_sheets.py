"""How large features are, as pictures, as numbers and on the screen."""

from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vcache.pipelines.explanation import Explanation, LayerMagnitude, Magnitudes, frame_headers
from vcache.pipelines.pictures import (
    COLUMNS,
    Range,
    Row,
    blocks,
    enlarged,
    enlargement,
    ranged_overlay,
    sheet,
)

_SMALLEST = 128
"""Pixels that a frame is at least drawn with: it is enlarged by a whole number."""
_BEYOND = 0.01
"""Share of the patches beyond each end of a row's colours. CLIP has patches of many times the norm of the others, in which it
keeps what concerns the whole picture (Darcet et al. 2024): a scale up to the largest would show these and nothing else."""
_HIGH = 2.0
"""Times the median: norms above it are counted."""


def magnitude_pictures(explanation: Explanation, magnitudes: Magnitudes) -> dict[str, Image.Image]:
    return {"magnitude": magnitude_sheet(explanation, magnitudes)}


def magnitude_sheet(explanation: Explanation, magnitudes: Magnitudes) -> Image.Image:
    """The pixel frames, how much each patch changed, and the norms of temporal and spatial features (figure 5b of DiST).

    A row has one scale over all frames, from blue, where 1% of the patches are smaller, to red, where 1% are larger. Frames
    that the backbone does not see have no spatial features.
    """
    factor = enlargement(magnitudes.pixels.shape[1], _SMALLEST)
    frames = [enlarged(image, factor) for image in magnitudes.pixels]
    headers = frame_headers(magnitudes.pixel_index)
    rows: list[Row] = []
    for block in blocks(len(frames)):
        rows.append(Row(words=["frames"], pictures=frames[block], captions=headers[block]))
        rows.append(_motion_row(explanation, magnitudes, block, factor))
        for one in magnitudes.layers:
            step = len(one.temporal) // len(one.spatial)
            temporal = dict(enumerate(one.temporal))
            spatial = {step * t: norms for t, norms in enumerate(one.spatial)}
            words = _words(f"{explanation.head} temporal", one.layer, one.correlation.temporal)
            rows.append(_norm_row(explanation, magnitudes, words, temporal, block, factor))
            words = _words("CLIP spatial", one.layer, one.correlation.spatial)
            rows.append(_norm_row(explanation, magnitudes, words, spatial, block, factor))
    return sheet(explanation.title, [""] * min(COLUMNS, len(frames)), rows)


def magnitude_numbers(explanation: Explanation, magnitudes: Magnitudes) -> dict[str, Any]:
    """In types that JSON has."""
    return {
        "pixel_index": list(magnitudes.pixel_index),
        "motion": [None, *(float(x) for x in magnitudes.motion.mean(axis=(1, 2)))],
        "layers": [_describe_layer(one) for one in magnitudes.layers],
    }


def magnitude_lines(numbers: dict[str, Any]) -> list[str]:
    """What a person reads of these numbers."""
    lines = []
    for layer in numbers["layers"]:
        follows = layer["correlation_with_motion"]
        lines.append(
            f"layer {layer['layer']}: rank correlation of the norm with |x_t - x_(t-1)| of the patch: temporal "
            f"{_number(follows['temporal'])} (at CLIP's frames {_number(follows['temporal_at_clip_frames'])}), spatial "
            f"{_number(follows['spatial'])}"
        )
    return lines


def _describe_layer(one: LayerMagnitude) -> dict[str, Any]:
    follows = one.correlation
    return {
        "layer": one.layer,
        "correlation_with_motion": {
            "temporal": follows.temporal,
            "temporal_at_clip_frames": follows.temporal_at_clip_frames,
            "spatial": follows.spatial,
        },
        "temporal": _describe_norms(one.temporal),
        "spatial": _describe_norms(one.spatial),
    }


def _describe_norms(norms: Float[np.ndarray, "F h w"]) -> dict[str, Any]:
    scale, median = Range.of(norms, beyond=_BEYOND), float(np.median(norms))
    return {
        "frame_mean": norms.mean(axis=(1, 2)).tolist(),
        "median": median,
        "largest": float(norms.max()),
        "colours": [scale.low, scale.high],
        "above_twice_the_median": int((norms > _HIGH * median).sum()),
        "patches": int(norms.size),
    }


def _motion_row(explanation: Explanation, magnitudes: Magnitudes, block: slice, factor: int) -> Row:
    """From 0 to what 1% of the patches exceed."""
    motion = magnitudes.motion
    high = float(np.quantile(motion, 1 - _BEYOND)) if motion.size else 0.0
    words = ["change since", "the frame before:", "|x_t - x_(t-1)|", "of the patch"]
    maps = dict(enumerate(motion, start=1))
    return _row(explanation, magnitudes, words, maps, Range(low=0.0, high=high, sequential=True), block, factor)


def _norm_row(
    explanation: Explanation,
    magnitudes: Magnitudes,
    words: list[str],
    norms: dict[int, Float[np.ndarray, "h w"]],
    block: slice,
    factor: int,
) -> Row:
    """`norms` by pixel frame."""
    scale = Range.of(np.stack(list(norms.values())), beyond=_BEYOND)
    return _row(explanation, magnitudes, words, norms, scale, block, factor)


def _row(
    explanation: Explanation,
    magnitudes: Magnitudes,
    words: list[str],
    maps: dict[int, Float[np.ndarray, "h w"]],
    scale: Range,
    block: slice,
    factor: int,
) -> Row:
    frames, tiling = range(*block.indices(len(magnitudes.pixels))), explanation.tiling
    pictures = [
        ranged_overlay(magnitudes.pixels[t], maps[t], scale, tiling, factor) if t in maps else None for t in frames
    ]
    captions = [f"mean {maps[t].mean():.3g}" if t in maps else "" for t in frames]
    return Row(words=words, pictures=pictures, captions=captions, scale=scale)


def _words(what: str, layer: int, correlation: float | None) -> list[str]:
    return [what, f"at layer {layer}", "L2 norm", "", "correlation", f"with change {_number(correlation)}"]


def _number(correlation: float | None) -> str:
    return "none" if correlation is None else f"{correlation:.2f}"
