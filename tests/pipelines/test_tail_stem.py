"""AIM below every block: the patch embedding of a store's backbone, run on the store's pixels."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vcache.extract.backbone import load_backbone
from vcache.heads.aim import AIM
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail_stem import normalised
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.frozen_tail import tail_of_store
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run
from vcache.pipelines.tail_file import read_tail, tail_bytes
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last layer, the embedding, and the pixels of each frame."""
    path = tmp_path_factory.mktemp("pixels") / "pixels.zarr"
    run_extraction(tiny_extraction(store=path, layers="-1", cross_frame="none", pixels=5))
    return path


def test_pixels_through_the_stem_and_all_blocks_give_the_embedding_that_was_stored(store: Path, tmp_path: Path) -> None:
    with FeatureStore.open(store) as opened:
        tail = tail_of_store(opened, 3, "auto", CPU, stem=True)
        config = build_head_config("aim", {"blocks": 3, "temporal_embedding": "stem"}, opened.manifest)
        rows = np.arange(2)
        pixels, stored = (torch.tensor(opened.read("train", name, rows)) for name in ("pixels", "embed"))
        without = tail_of_store(opened, 3, "auto", CPU)
    (tmp_path / "tail").write_bytes(tail_bytes(tail))
    again = read_tail(tmp_path / "tail")
    assert again.shape == tail.shape and tail.shape.stem is not None
    assert without.stem is None
    for one in (tail, again):
        assert one.stem is not None
        images = normalised(pixels, config.pixel_mean, config.pixel_std)
        got = one.embed(one.stem.ln_pre(one.stem.embed_patches(images)), 3)
        torch.testing.assert_close(got, stored, rtol=1e-5, atol=1e-5)


def test_a_tower_without_a_norm_before_its_blocks_has_none_in_its_stem(
    tiny_clip: Path, config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    told = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    told["model_cfg"]["vision_cfg"]["no_ln_pre"] = True
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(told))
    weights = load_file(tmp_path / "clip" / "open_clip_model.safetensors")
    kept = {name: x for name, x in weights.items() if ".ln_pre." not in name}
    save_file(kept, tmp_path / "clip" / "open_clip_model.safetensors")
    run_extraction(config(model=f"local-dir:{tmp_path / 'clip'}", layers="-1", cross_frame="none", pixels=5))
    with FeatureStore.open(tmp_path / "store.zarr") as opened:
        head = AIM(build_head_config("aim", {"blocks": 3, "temporal_embedding": "stem"}, opened.manifest))
        head.set_tail(tail_of_store(opened, 3, "auto", CPU, stem=True))
        pixels, stored = (torch.tensor(opened.read("val", name, np.arange(2))) for name in ("pixels", "embed"))
    entering = head.enter(head.read(ClipFeatures(pixels=pixels)))
    torch.testing.assert_close(head.tail.embed(entering, 3), stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_stem_is_that_of_the_backbone_in_its_precision(tiny_clip: Path, store: Path, precision: str) -> None:
    with FeatureStore.open(store) as opened:
        tail = tail_of_store(opened, 3, precision, CPU, stem=True)
    backbone = load_backbone(f"local-dir:{tiny_clip}", None, precision=precision)
    images = torch.randn(2, 1, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    assert tail.stem is not None
    entering = tail.stem.ln_pre(tail.stem.embed_patches(images))
    wanted = backbone(images[:, 0].permute(0, 3, 1, 2), inputs=[0]).inputs[0]
    error = (entering[:, 0] - wanted).norm() / wanted.norm()
    assert error < 4 * torch.finfo(getattr(torch, precision)).eps


def test_a_head_with_the_papers_temporal_embedding_is_trained_from_mixed_pixels(store: Path, tmp_path: Path) -> None:
    settings = {"blocks": "3", "temporal_embedding": "stem", "epochs": "2", "batch_size": "3", "lr": "0.01"}
    settings |= {"mixup": "0.8", "cutmix": "1"}
    train_head(TrainingConfig(head="aim", store=store, settings=settings, device="cpu", out=tmp_path / "run"))
    run = Run.open(tmp_path / "run")
    assert run.requirements().tail_stem and run.requirements().tokens == ()
    head = run.load_head()
    assert head.temporal_embedding.any() and head.adapters["0"].T_Adapter.D_fc2.weight.any()


def test_a_store_without_pixels_is_refused_with_the_command_that_adds_them(
    config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    run_extraction(config(cross_frame="none"))
    training = TrainingConfig(
        head="aim",
        store=tmp_path / "store.zarr",
        settings={"blocks": "3", "temporal_embedding": "stem"},
        device="cpu",
        out=tmp_path / "run",
    )
    with pytest.raises(HeadStoreMismatch, match=r"head 'aim' reads pixels; (.|\n)* --pixels 5"):
        train_head(training)
