"""Whether stored tokens and the blocks that are run on them belong together: one clip of the store, replayed.

With nothing added, the top blocks must make of the stored tokens the embedding that the whole backbone made when the store was
written. That holds for any checkpoint, layer and cut, so it finds what digests cannot: tokens of another layer or another video,
blocks that are not computed as the backbone's.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vcache.heads.tail import FrozenTail
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.tail_file import kept_in
from vcache.store.reader import FeatureStore

BOUNDS = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.1, "int8": 0.14}
"""On ||replayed - stored|| / ||stored||, by the coarsest dtype of tokens, weights and arithmetic; 0.14 is a cosine of 0.99.

Measured on the demo's CLIP, 1 to 3 blocks: 3e-4 with float16 tokens, 1.4e-3 with bfloat16 weights. Far above that on purpose, as
deep towers add more and TF32 is 1e-3; far below what is to be found: tokens of another layer are 0.24 to 0.64 off, other videos
about 1. The wrong GELU is 0.01 to 0.02, and found in float32 alone.
"""


def check_tail(
    head: Any, tail: FrozenTail, plan: ReadPlan, store: FeatureStore, split: str, device: torch.device
) -> float | None:
    """Replay the first readable clip of view 0 of a split through the blocks that the head runs.

    Returns:
        The relative difference from the stored embedding; None where the store has no such clip.

    Raises:
        HeadStoreMismatch: it is above the rounding of what is stored.
    """
    plan = replace(plan, embed=True, text=None, pixels=0)
    if plan.features == ("embed",) or set(plan.arrays) - set(store.arrays(split)):
        return None  # of a head that reads pixels, no stored tokens are run
    loader = ClipLoader(store, split, plan, batch_size=1, device=device, allow_incomplete=True)
    loader.rows = loader.rows[:1]
    for batch in loader.in_order():
        features, num_blocks = batch.features(plan), head.requires(head.config).tail
        assert features.embed is not None
        found = _relative(tail.embed(head.read(features), num_blocks), features.embed)
        if not found <= (bound := _bound(store, tail)):  # NaN is not
            raise HeadStoreMismatch(
                f"{store.path}: of the tokens that it holds, the top {num_blocks} of {tail.shape.num_layers} blocks of its "
                f"backbone make an embedding that is {found:.1%} off the stored one, and rounding makes at most {bound:.1%} "
                f"(split {split!r}, row {int(batch.rows[0])}). Tokens and weights do not belong together; see what differs "
                f"with:  vcache verify {store.path} --deep"
            )
        return found
    return None


def _relative(replayed: Tensor, stored: Tensor) -> float:
    return float((replayed.float() - stored.float()).norm() / stored.float().norm())


def _bound(store: FeatureStore, tail: FrozenTail) -> float:
    spec = store.manifest.spec
    dtypes = {spec.get("dtype"), spec.get("precision"), kept_in(tail)}
    return max(bound for dtype, bound in BOUNDS.items() if dtype in dtypes or dtype == "float32")
