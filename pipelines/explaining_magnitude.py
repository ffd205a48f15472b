"""How large the features of a head's temporal encoder are, patch by patch, beside those of the frozen backbone.

Qing et al. 2023 (DiST), figure 5b, with its claim as a number: the temporal features follow the motion between frames more than
the spatial ones do.
"""

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from vcache.heads.requirements import InnerFeatures
from vcache.pipelines.explained_clip import ExplainedClip, chosen_layers
from vcache.pipelines.explanation import ExplainError, LayerMagnitude, Magnitudes, MotionCorrelation
from vcache.pipelines.pictures import Tiling
from vcache.pipelines.rank_correlation import rank_correlation


def explain_magnitudes(shown: ExplainedClip) -> Magnitudes:
    """
    Raises:
        ExplainError: the head has no temporal encoder, there is no such layer, or a frame or a patch was asked for.
    """
    question = shown.question
    if question.frame is not None or question.patch is not None:
        raise ExplainError(f"the head of {shown.run} has no query that attends: leave out --frame and --patch.")
    inner: list[InnerFeatures] = shown.head.inner_features(shown.features)
    if any(one.temporal is None for one in inner):
        raise ExplainError(
            f"the head of {shown.run} was trained without a temporal encoder, so there is nothing beside CLIP's own features "
            "to show. Choose a run with one."
        )
    pixels = shown.clip.record["pixels"]
    motion = patch_motion(pixels, shown.tiling)
    layers = chosen_layers([_magnitude(one, shown, motion) for one in inner], question.layer, shown.facts.num_layers)
    index = tuple(shown.clip.record["pixel_index"].tolist())
    return Magnitudes(layers=layers, pixels=pixels, pixel_index=index, motion=motion)


def patch_motion(pixels: UInt8[np.ndarray, "F S S 3"], tiling: Tiling) -> Float[np.ndarray, "F-1 h w"]:
    """Mean |x_t - x_(t-1)| over the pixels and colours of each patch, of values from 0 to 1; a border without patches is cut."""
    (h, w), (tall, wide) = tiling.grid, tiling.patch
    inside = pixels[:, : h * tall, : w * wide].astype(np.float32) / 255
    change = np.abs(np.diff(inside, axis=0))
    return change.reshape(len(change), h, tall, w, wide, 3).mean(axis=(2, 4, 5))


def _magnitude(one: InnerFeatures, shown: ExplainedClip, motion: Float[np.ndarray, "changes h w"]) -> LayerMagnitude:
    assert one.temporal is not None
    spatial, temporal = (_norms(x, shown.tiling.grid) for x in (one.spatial, one.temporal))
    step = len(temporal) // len(spatial)
    # motion[t - 1] is that of frame t, and frame 0 has none
    at_clip_frames = motion[step - 1 :: step]
    # Of ranks, as the norms of CLIP's patches have outliers that alone would decide a correlation of the values.
    correlation = MotionCorrelation(
        temporal=rank_correlation(temporal[1:], motion),
        temporal_at_clip_frames=rank_correlation(temporal[::step][1:], at_clip_frames),
        spatial=rank_correlation(spatial[1:], at_clip_frames),
    )
    return LayerMagnitude(layer=shown.absolute(one.layer), spatial=spatial, temporal=temporal, correlation=correlation)


def _norms(features: Float[Tensor, "1 F P c"], grid: tuple[int, int]) -> Float[np.ndarray, "F h w"]:
    norms = features[0].float().norm(dim=-1)
    return norms.unflatten(1, grid).cpu().numpy()
