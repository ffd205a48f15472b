"""What the temporal modelling of frames' embeddings costs (heads/temporal_fusion.py); Text4Vis and ActionCLIP share it."""

from vcache.heads.temporal_fusion import NUM_BLOCKS

_CLS_MLP = 2048
"""Channels in the middle of the MLPs of FrameTransformerCls, whatever the width."""


def fusion_macs(kind: str, width: int, num_frames: int) -> int:
    """MACs of one clip. `kind` is as either head calls it; a mean has none."""
    E, T = width, num_frames
    if kind in ("t_trans", "transf"):
        return NUM_BLOCKS * _block_macs(E, T, 4 * E)
    if kind == "transf_cls":
        return NUM_BLOCKS * _block_macs(E, T + 1, _CLS_MLP)
    per_frame = {"tap": 0, "meanp": 0, "t1d": 3 * E, "conv1d": 3 * E, "lstm": 8 * E**2}
    return T * per_frame[kind]


def averaged_first_macs(kind: str, width: int, num_frames: int) -> int:
    """MACs that are saved by averaging over the frames before the last product of the last block, which is linear."""
    return (num_frames - 1) * 4 * width**2 if kind in ("t_trans", "transf") else 0


def _block_macs(width: int, num_tokens: int, mlp: int) -> int:
    """Q, K, V and output; the MLP; scores and the weighted sum."""
    return num_tokens * (4 * width**2 + 2 * mlp * width) + 2 * num_tokens**2 * width
