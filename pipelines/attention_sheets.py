"""What a query attends to, as pictures, as numbers and on the screen."""

import math
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vcache.pipelines.explanation import Attention, CrossFrame, Explanation, LayerAttention
from vcache.pipelines.pictures import (
    COLUMNS,
    Row,
    Scale,
    blocks,
    enlarged,
    enlargement,
    marked,
    overlay,
    percent,
    sheet,
)

_SMALLEST, _SMALLEST_OF_THREE = 160, 224
"""Pixels that a frame is at least drawn with: it is enlarged by a whole number."""


def attention_pictures(explanation: Explanation, attention: Attention) -> dict[str, Image.Image]:
    pictures = {"attention": attention_sheet(explanation, attention)}
    if attention.cross_frame:
        pictures["cross_frame"] = cross_frame_sheet(explanation, attention.cross_frame)
    return pictures


def attention_numbers(explanation: Explanation, attention: Attention) -> dict[str, Any]:
    """In types that JSON has."""
    cross = attention.cross_frame
    return {
        "layers": [_describe_layer(one, explanation.tiling.grid) for one in attention.layers],
        "cross_frame": cross and _describe_cross_frame(cross),
    }


def attention_lines(numbers: dict[str, Any]) -> list[str]:
    """What a person reads of these numbers."""
    lines = []
    for layer in numbers["layers"]:
        frame, (row, column) = layer["most_attended"]["frame"], layer["most_attended"]["patch"]
        shares = " ".join(percent(share) for share in layer["frame_share"])
        most = f"most at frame {frame}, patch {row},{column}: {percent(layer['most_attended']['weight'])}"
        lines.append(f"layer {layer['layer']}: share of each frame {shares}; {most}")
    return lines


def attention_sheet(explanation: Explanation, attention: Attention) -> Image.Image:
    """The frames, CLIP's CLS over the patches of each, and the head's query over all of them (figure 4 of the paper).

    A row has one scale, whatever the frame. What lies on CLS is no part of a map, and told below it.
    """
    factor = enlargement(explanation.images.shape[1], _SMALLEST)
    frames = [enlarged(image, factor) for image in explanation.images]
    rows: list[Row] = []
    for block in blocks(len(frames)):
        rows.append(Row(words=["frames"], pictures=frames[block], captions=explanation.headers[block]))
        for one in attention.layers:
            rows += [_cls_row(explanation, one, block, factor), _query_row(explanation, one, block, factor)]
    return sheet(explanation.title, [""] * min(COLUMNS, len(frames)), rows)


def cross_frame_sheet(explanation: Explanation, cross: CrossFrame) -> Image.Image:
    """The marked patch, and its attention over the frame before and the frame after on one scale (figure 6)."""
    factor, image_of = enlargement(explanation.images.shape[1], _SMALLEST_OF_THREE), explanation.images
    box = explanation.tiling.box(*cross.patch, factor)
    sides = {cross.frame - 1: cross.previous, cross.frame: None, cross.frame + 1: cross.next}
    shown = {t: weights for t, weights in sides.items() if t == cross.frame or weights is not None}
    largest = max(float(weights.max()) for weights in shown.values() if weights is not None)
    plain = [marked(enlarged(image_of[t], factor), box, width=2) for t in shown]
    maps = [_cross_map(explanation, t, weights, largest, factor) for t, weights in shown.items()]
    captions = [_cross_caption(cross, weights) for weights in shown.values()]
    words_of = {cross.frame - 1: "before:  ", cross.frame + 1: "after:  "}
    headers = [f"{words_of.get(t, '')}{explanation.headers[t]}" for t in shown]
    scale = Scale(largest=largest, even=1 / math.prod(explanation.tiling.grid))
    words = ["its attention", f"in layer {cross.layer}", "", "below: the patch", "that gets most"]
    row, column = cross.patch
    title = [
        f"{explanation.video_id}: where patch {row},{column} of frame {cross.frame} looks in the frames beside it",
        *explanation.title[1:],
    ]
    rows = [
        Row(words=["frames", "red: the patch", "and its place"], pictures=plain),
        Row(words=words, pictures=maps, captions=captions, scale=scale),
    ]
    return sheet(title, headers, rows)


def _describe_layer(one: LayerAttention, grid: tuple[int, int]) -> dict[str, Any]:
    frame, patch = one.most_attended
    return {
        "decoder_layer": one.number,
        "layer": one.layer,
        "frame_share": one.query.sum(axis=1).tolist(),
        "cls_share": one.query[:, 0].tolist(),
        "most_attended": {
            "frame": frame,
            "patch": list(divmod(patch, grid[1])),
            "weight": float(one.query[frame, 1 + patch]),
        },
        "clip_cls_to_itself": one.cls[:, 0].tolist(),
    }


def _describe_cross_frame(cross: CrossFrame) -> dict[str, Any]:
    described: dict[str, Any] = {"layer": cross.layer, "frame": cross.frame, "patch": list(cross.patch)}
    for side, weights in (("previous", cross.previous), ("next", cross.next)):
        described[side] = None
        if weights is not None:
            row, column = (int(i) for i in np.unravel_index(weights.argmax(), weights.shape))
            described[side] = {"most_attended": [row, column], "weight": float(weights[row, column])}
    return described


def _cls_row(explanation: Explanation, one: LayerAttention, block: slice, factor: int) -> Row:
    words = ["CLIP [CLS]", f"in layer {one.layer}", "", "below: what it", "gives to itself"]
    captions = [f"itself {percent(float(w))}" for w in one.cls[block, 0]]
    return _map_row(explanation, words, one.cls, block, captions, 1 / one.cls.shape[1], factor)


def _query_row(explanation: Explanation, one: LayerAttention, block: slice, factor: int) -> Row:
    words = [
        f"{explanation.head} query",
        f"on layer {one.layer}",
        f"(decoder {one.number})",
        "",
        "below: share of",
        "the frame, of it",
        "on its CLS",
    ]
    shares = one.query.sum(axis=1)
    captions = [
        f"{percent(float(share))} (CLS {percent(float(cls))})"
        for share, cls in zip(shares[block], one.query[block, 0], strict=True)
    ]
    return _map_row(explanation, words, one.query, block, captions, 1 / one.query.size, factor)


def _map_row(
    explanation: Explanation,
    words: list[str],
    weights: np.ndarray,
    block: slice,
    captions: list[str],
    even: float,
    factor: int,
) -> Row:
    """`weights` (T, N) of all frames, which have one scale."""
    maps = weights[:, 1:].reshape(-1, *explanation.tiling.grid)
    largest = float(maps.max())
    pictures = [
        overlay(image, patches, largest, explanation.tiling, factor)
        for image, patches in zip(explanation.images[block], maps[block], strict=True)
    ]
    return Row(words=words, pictures=pictures, captions=captions, scale=Scale(largest=largest, even=even))


def _cross_map(
    explanation: Explanation, t: int, weights: np.ndarray | None, largest: float, factor: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The overlay of a neighbour; the patch's own frame is dimmed as they are."""
    nothing = np.zeros(explanation.tiling.grid, dtype=np.float32)
    image = explanation.images[t]
    return overlay(image, nothing if weights is None else weights, largest, explanation.tiling, factor)


def _cross_caption(cross: CrossFrame, weights: np.ndarray | None) -> str:
    if weights is None:
        return ""
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    return f"{row},{column}:  {percent(float(weights.max()))}"
