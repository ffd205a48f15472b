"""The promise under the whole design: a head sees from the cache what it would see with the backbone in the loop."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vcache.extract.backbone import load_backbone
from vcache.extract.decode import decode_clip
from vcache.extract.preprocess import from_open_clip_config
from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import build_head_config, match
from vcache.pipelines.request import ExtractionConfig
from vcache.store.reader import FeatureStore

HEADS = {
    "linear": ("linear", {}),
    "evl": ("evl", {"layers": "-2:"}),
    "evl, repeated": ("evl", {"layers": "2,1,2", "temporal_conv": "false"}),
    "evl, pooled": ("evl", {"layers": "-2:", "temporal_cross_attention": "false", "pooling": "cls"}),
}


def online_features(config: ExtractionConfig, paths: list[Path]) -> ClipFeatures:
    """Features of these videos with the backbone in the loop, for layers 1 and 2 asked by their absolute numbers and as -1."""
    backbone = load_backbone(config.model, None)
    prepare = from_open_clip_config(backbone.preprocess_config, mode=config.preprocess)
    taps = [backbone(prepare(decode_clip(path, config.sampling).frames), tokens=[1, 2], qk=[1, 2]) for path in paths]
    tokens = {layer: torch.stack([tap.tokens[layer] for tap in taps]) for layer in (1, 2)}
    q = {layer: torch.stack([tap.q[layer] for tap in taps]) for layer in (1, 2)}
    k = {layer: torch.stack([tap.k[layer] for tap in taps]) for layer in (1, 2)}
    return ClipFeatures(
        tokens=tokens,
        cls={-1: tokens[2][:, :, 0], 1: tokens[1][:, :, 0], 2: tokens[2][:, :, 0]},
        maps={layer: cross_frame_maps(q[layer], k[layer]) for layer in (1, 2)},
        embed=torch.stack([tap.embed for tap in taps]),
    )


@pytest.fixture(scope="module")
def online(tiny_extraction: Callable[..., ExtractionConfig], video_folder: Path) -> Callable[..., ClipFeatures]:
    """online(*paths): the same for every store, so that it is computed once."""
    made = tiny_extraction(store=Path("none"))
    return cache(lambda *paths: online_features(made, [video_folder / path for path in paths]))


def logits_and_gradients(head: torch.nn.Module, features: ClipFeatures, labels: Tensor) -> dict[str, Tensor]:
    head.zero_grad()
    logits = head(features)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return {"logits": logits.detach()} | {
        name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None
    }


BOUNDS = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": 1.6e-2}
WAYS = [("linear", "none"), ("evl", "qk"), ("evl", "maps"), ("evl", "derive")]


@pytest.mark.parametrize(
    ("name", "cross_frame", "dtype"),
    [(*way, dtype) for way in WAYS for dtype in BOUNDS]
    + [("evl, repeated", "derive", "float32"), ("evl, pooled", "none", "float32")],
)
def test_logits_and_every_gradient_from_the_cache_equal_those_online(
    config: Callable[..., ExtractionConfig],
    video_folder: Path,
    online: Callable[..., ClipFeatures],
    tmp_path: Path,
    name: str,
    cross_frame: str,
    dtype: str,
) -> None:
    """Of the largest value of each tensor. float32: 1e-6; float16: 2e-3 (11 bits of mantissa in, two layers of them); bfloat16
    has three bits less, and int8 about as many."""
    videos = tmp_path / "videos"
    shutil.copytree(video_folder, videos)
    made = config(dataset=str(videos), dtype=dtype, cross_frame=cross_frame)
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        expected_features = online(*store.videos("train").paths)
        shutil.rmtree(videos)
        torch.manual_seed(3)
        kind, settings = HEADS[name]
        head_config = build_head_config(kind, settings, store.manifest)
        head = get_head(kind)(head_config).eval()
        for parameter in head.parameters():  # what starts at zero would hide what flows through it
            torch.nn.init.normal_(parameter, std=0.3)
        plan = match(kind, head.requires(head_config), store, ["train"])
        loader = ClipLoader(store, "train", plan, batch_size=12, device=torch.device("cpu"))
        (batch,) = loader.in_order()
        np.testing.assert_array_equal(batch.rows, np.arange(12))
        cached = logits_and_gradients(head, batch.features(), batch.targets)
        expected = logits_and_gradients(head, expected_features, batch.targets)
    assert cached.keys() == expected.keys()
    assert len(cached) == 1 + len(list(head.parameters()))
    for key, value in expected.items():
        error = (cached[key] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error <= BOUNDS[dtype], f"{key}: {error:.2e}"
