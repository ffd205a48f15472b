"""How much of a feature is lost in what is stored of it, in the numbers that matter to a head, and how much is allowed."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.query_key import QueryKeyProjection
from vcache.store.layout import ArraySpec
from vcache.store.quantise import ChannelMoments

MAX_ERROR = 0.03
"""Of the standardised features. Sound schemes stay far below it (int8 here 0.008, bfloat16 0.003, float16 0.0003); int8 without
channel statistics, which turns small channels into zeros, is at 0.2."""

Error = dict[str, float]

_BETTER = {"int8": "float16", "float16": "float32", "bfloat16": "float32"}


class PrecisionRefused(ValueError):
    """The dtype would lose more of a feature than is allowed; nothing was written."""


class ErrorSums:
    """Sums over vectors (..., C) and what came back of them. A channel of Q/K (T, H, N, d) is one dim of one head.

    relative                ||e|| / ||x||
    relative_standardised   the same after each channel is divided by its standard deviation: what a norm or a linear layer sees
    min_cosine              the smallest between a vector and what is stored of it
    maps_total_variation    of the attention maps made of it, averaged over queries: the share of the weight that moves
    videos                  on how many videos it was measured
    """

    def __init__(self, spec: ArraySpec) -> None:
        self.by_head = spec.dims[1:2] == ("head",)
        # A deviation of attention weights means nothing.
        self.has_channels = not spec.name.startswith("maps/")
        self.moments = ChannelMoments()
        self.squared_errors: np.ndarray | float = 0.0
        self.min_cosine = 1.0
        self.moved: list[float] = []
        self.videos = 0

    def add(self, exact: Tensor, back: Tensor, moved: float | None) -> None:
        """The features of one clip, and how far its attention maps moved."""
        x, y = self._vectors(exact), self._vectors(back)
        self.moments.add(x)
        self.squared_errors = self.squared_errors + ((y - x) ** 2).sum(axis=0)
        # np.minimum lets NaN through: it has to be noticed.
        self.min_cosine = float(np.minimum(self.min_cosine, _min_cosine(exact, back)))
        self.moved += [] if moved is None else [moved]
        self.videos += 1

    def result(self) -> Error:
        """The last digits say nothing and are left out."""
        variance, count = self.moments.variance, self.moments.count
        squares = count * (variance + self.moments.mean**2)
        error = {"relative": _ratio(self.squared_errors, squares)}
        if self.has_channels:
            divisor = np.where(variance > 0, variance, 1)
            error["relative_standardised"] = _ratio(self.squared_errors / divisor, squares / divisor)
        error["min_cosine"] = round(self.min_cosine, 7)
        if self.moved:
            error["maps_total_variation"] = _short(sum(self.moved) / len(self.moved))
        return {**error, "videos": self.videos}

    def _vectors(self, x: Tensor) -> np.ndarray:
        """(vectors, channels) in float64."""
        x = x.transpose(1, 2).flatten(2) if self.by_head else x
        return x.reshape(-1, x.shape[-1]).cpu().double().numpy()


def maps_moved(
    exact: Mapping[str, Tensor], back: Mapping[str, Tensor], projections: Mapping[str, QueryKeyProjection]
) -> dict[str, float]:
    """Total variation between the attention maps of one clip and those made of what is stored, by the arrays they are made of.

    `projections` make maps of arrays that enter a block.
    """
    moved: dict[str, float] = {}
    for name in back:
        kind, _, layer = name.partition("/")
        if kind == "maps":
            moved[name] = _total_variation(exact[name], back[name])
        elif kind == "q" and f"k/{layer}" in back and len(exact[name]) > 1:
            pairs = ((features[name], features[f"k/{layer}"]) for features in (exact, back))
            distance = _total_variation(*(cross_frame_maps(q[None], k[None]) for q, k in pairs))
            moved |= {name: distance, f"k/{layer}": distance}
        elif name in projections and len(exact[name]) > 1:
            moved[name] = _total_variation(
                *(projections[name].maps(features[name][None]) for features in (exact, back))
            )
    return moved


def check_error(spec: ArraySpec, error: Error, max_error: float) -> None:
    """Refuse an array that loses too much of its standardised features, or of which a vector turns by twice as large an angle.

    Raises:
        PrecisionRefused: with the measured numbers and what to do.
    """
    least_cosine = math.cos(min(2 * max_error, math.pi / 2))
    measured = error.get("relative_standardised", error["relative"])
    if measured <= max_error and error["min_cosine"] >= least_cosine:  # False of NaN
        return
    raise PrecisionRefused(
        f"{spec.name} would lose too much as {spec.dtype}: measured on {error['videos']:.0f} videos, a standardised error of "
        f"{measured:g} (allowed: {max_error:g}), a relative error of {error['relative']:g}, and a smallest cosine of "
        f"{error['min_cosine']:.7g} (allowed: {least_cosine:.4f}). No feature is written. Store it with --dtype "
        f"{_BETTER[spec.dtype]}, or allow more with --max-error."
    )


def _min_cosine(exact: Tensor, back: Tensor) -> float:
    """1 where all vectors are zero: those have no direction."""
    x, y = exact.double().flatten(0, -2), back.double().flatten(0, -2)
    x, y = x[x.any(dim=-1)], y[x.any(dim=-1)]
    cosines = torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-300)
    return cosines.min().item() if len(cosines) else 1.0


def _total_variation(a: Tensor, b: Tensor) -> float:
    return (0.5 * (a - b).abs().sum(dim=-1)).mean().item()


def _ratio(squared_errors: np.ndarray | float, squares: np.ndarray | float) -> float:
    total = float(np.sum(squares))
    return _short(math.sqrt(float(np.sum(squared_errors)) / total)) if total else 0.0


def _short(value: float) -> float:
    return float(f"{value:.4g}")
