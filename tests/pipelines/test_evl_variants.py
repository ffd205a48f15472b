"""Variants of EVL from one store: repeated layers, pooled tokens, and grids that are not square."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from viewed import fill_view

from vcache.extract.backbone import BackboneFacts
from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.loading import batch as loading
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run
from vcache.pipelines.setup import array_specs
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.reports import TrainingSummary
from vcache.pipelines.training.train_head import train_head
from vcache.store.key import cache_key
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import create_store


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arrays of each read, as they were asked of the store."""
    calls: list[list[str]] = []
    original = FeatureStore.read_many

    def spy(self, split, names, rows, **rest):
        calls.append(list(names))
        return original(self, split, names, rows, **rest)

    monkeypatch.setattr(FeatureStore, "read_many", spy)
    return calls


def train(store: Path, out: Path, **settings: object) -> TrainingSummary:
    short = {"steps": 3, "batch_size": 12}
    config = TrainingConfig(
        head="evl", store=store, out=out, device="cpu", resident="disk", settings={**short, **settings}
    )
    return train_head(config)


@pytest.mark.parametrize("layers", ["-1,-1,-1,-1", "-2,-1,-2,-1", "-1,2,-1"])
def test_repeated_layers_are_read_once_and_their_maps_made_once(
    float32_store: Path, tmp_path: Path, read: list[list[str]], monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    made = Counter[int]()
    original = loading.cross_frame_maps

    def count(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        made[len(read)] += 1
        return original(q, k)

    monkeypatch.setattr(loading, "cross_frame_maps", count)
    train(float32_store, tmp_path / "run", layers=layers)
    stored = {int(layer) % 3 for layer in layers.split(",")}
    for names in read:
        assert sorted(names) == sorted(f"{kind}/{layer}" for kind in ("tokens", "q", "k") for layer in stored)
    assert sum(made.values()) == len(stored) * len(read)
    head = Run.open(tmp_path / "run").load_head()
    assert len(head.decoder.decoder_layers) == len(layers.split(","))


@pytest.mark.parametrize(
    ("pooling", "kinds"), [("cls", {"cls"}), ("spatial_mean", {"tokens"}), ("temporal_mean", {"tokens"})]
)
def test_pooled_variants_train_from_the_arrays_that_they_need_alone(
    float32_store: Path, tmp_path: Path, read: list[list[str]], pooling: str, kinds: set[str]
) -> None:
    settings = {"layers": "-2:", "temporal_cross_attention": "false", "pooling": pooling}
    summary = train(float32_store, tmp_path / "run", **settings)
    assert np.isfinite(summary.last.train_loss)
    assert {name.split("/")[0] for names in read for name in names} == kinds
    assert Run.open(tmp_path / "run").load_head().config.pooling == pooling


def test_missing_cls_layers_are_extracted_by_the_command_that_the_refusal_prints(
    float32_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    store = tmp_path / "tiny.zarr"
    shutil.copytree(float32_store, store)
    settings = {"layers": "0,-1", "temporal_cross_attention": "false", "pooling": "cls"}
    with pytest.raises(HeadStoreMismatch) as refused:
        train(store, tmp_path / "run", **settings)
    first, line, size = str(refused.value).splitlines()
    assert first.startswith(
        "head 'evl' reads cls of layers 0, 2; split 'train' of tiny.zarr holds tokens of layers 1-2, "
    )
    assert "cls of layers 1-2" in first and size == "(adds 960 B per clip; what is stored is kept)"
    command = line.removeprefix("Extract the rest with:  ")
    assert "--layers 0,2" in command and "--cross-frame none" in command
    status, _, said = vcache(command.removeprefix("vcache ") + " --device cpu")
    assert status == 0, said
    assert np.isfinite(train(store, tmp_path / "run", **settings).last.train_loss)


def facts(grid: tuple[int, int], **sizes: int) -> BackboneFacts:
    num_tokens = 1 + grid[0] * grid[1]
    rest = {"num_layers": 3, "width": 24, "num_heads": 6, "head_dim": 4, "embed_dim": 10} | sizes
    return BackboneFacts(
        model="oblong", patch_size=8, image_size=32, grid=grid, num_tokens=num_tokens, layer_norm_eps=1e-5, **rest
    )


def manifest_of(backbone: BackboneFacts, frames: int, splits: dict[str, int]) -> Manifest:
    stored = {"backbone": vars(backbone), "request": {"frames": frames, "dtype": "float32"}}
    return Manifest(
        key=cache_key({}),
        spec={},
        dataset="toy",
        class_names=("clap", "jump", "wave"),
        rows_per_shard=4,
        splits=splits,
        facts=json.loads(json.dumps(stored)),
    )


@pytest.fixture
def oblong_store(tmp_path: Path) -> Path:
    """8 clips of 4 frames of 3 x 5 patches, which `vcache extract` cannot make so far: it takes square crops."""
    path, backbone = tmp_path / "oblong.zarr", facts((3, 5))
    config = ExtractionConfig(dataset="toy", frames=4, dtype="float32", cross_frame="maps")
    specs = tuple(spec for spec in array_specs(backbone, (1, 2), config) if "/" in spec.name)
    names = tuple(f"video {row}" for row in range(8))
    create_store(path, manifest_of(backbone, 4, {"train": 8}), {"train": VideoTable(names, names, np.arange(8) % 3)})
    with FeatureStore.open(path) as store:
        fill_view(store, "train", 0, specs)
    return path


def test_a_head_takes_a_grid_that_is_not_square_from_the_store_and_trains(oblong_store: Path, tmp_path: Path) -> None:
    summary = train(oblong_store, tmp_path / "run", layers="-2:", steps=60, lr=5e-3, mlp_dropout=0.0, cls_dropout=0.0)
    head = Run.open(tmp_path / "run").load_head()
    assert head.config.grid == (3, 5) and head.decoder.cross_attention[0].w1.shape == (5 * 9, 24)
    assert head.decoder.cross_attention[0].w1.any()
    assert summary.last.train_loss < 0.1  # eight clips of noise, learnt by heart


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        ("ViT-B-32-quickgelu", (7, 7)),
        ("ViT-B-16-quickgelu", (14, 14)),
        ("ViT-L-14-quickgelu", (16, 16)),
        ("ViT-L-14-336-quickgelu", (24, 24)),
        ("ViT-B-32-quickgelu", (4, 9)),
    ],
)
def test_heads_are_built_from_the_facts_of_a_store_for_every_grid(model: str, grid: tuple[int, int]) -> None:
    tower = CLIP_TOWERS[model]
    backbone = facts(grid, num_layers=tower.num_layers, width=tower.width, num_heads=tower.num_heads)
    config = build_head_config("evl", {"layers": "-1:"}, manifest_of(backbone, 2, {"train": 1}))
    assert grid in (tower.grid, (4, 9))
    (layer,), P = config.layers, grid[0] * grid[1]
    head = EVL(config)
    tokens, maps = torch.rand(1, 2, 1 + P, tower.width), torch.rand(1, 1, 2, P, P)
    logits = head(ClipFeatures(tokens={layer: tokens}, maps={layer: maps}))
    logits.square().sum().backward()
    gradient = head.decoder.cross_attention[0].w1.grad
    assert logits.shape == (1, 3)
    assert gradient.shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1), tower.width) and gradient.any(dim=1).all()
