"""Stores of EVA-CLIP and SigLIP: made, shown, trained on and evaluated as those of CLIP; what cannot be is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_timm
import torch

from vcache.extract.weights import UnsupportedBackbone
from vcache.heads.registry import get_head
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import build_head_config, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction, prepare_extractions
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


@pytest.fixture
def timm_folder(tmp_path: Path) -> Callable[[str], str]:
    """timm_folder(name): the folder of a tiny tower, without weights."""

    def make(name: str) -> str:
        folder, embed = tmp_path / name, tiny_timm.WIDTH if name == "tiny_siglip" else tiny_timm.EMBED
        folder.mkdir()
        text = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "context_length": 6, "vocab_size": 64}
        config = {"embed_dim": embed, "vision_cfg": tiny_timm.vision(name), "text_cfg": text}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return f"local-dir:{folder}"

    return make


def evl_logits(path: Path) -> torch.Tensor:
    with FeatureStore.open(path) as store:
        torch.manual_seed(3)
        config = build_head_config("evl", {"layers": "-2:"}, store.manifest)
        head = get_head("evl")(config).eval()
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plan = match("evl", head.requires(config), store, store.manifest.splits)
        with torch.no_grad():
            batches = ClipLoader(store, "val", plan, batch_size=4, device=torch.device("cpu")).in_order()
            return torch.cat([head(batch.features()) for batch in batches])


def test_a_store_without_a_class_token_serves_heads_and_says_so(
    config: MakeConfig, timm_folder: Callable[[str], str], tmp_path: Path, vcache: Callable[..., tuple[int, str, str]]
) -> None:
    model, logits = timm_folder("tiny_siglip"), {}
    for way in ("qk", "maps", "derive"):
        store = tmp_path / f"{way}.zarr"
        run_extraction(config(model=model, random_weights=True, cross_frame=way, store=store))
        logits[way] = evl_logits(store)
    for way in ("maps", "derive"):
        torch.testing.assert_close(logits[way], logits["qk"], rtol=1e-5, atol=1e-5)
    with FeatureStore.open(tmp_path / "qk.zarr") as opened:
        assert opened.manifest.facts["backbone"]["class_token"] == "mean of patches"
        assert "timm" in opened.manifest.spec["versions"]
    status, out, _ = vcache(f"info {tmp_path / 'qk.zarr'}")
    assert status == 0 and "17 tokens a frame, the mean of patches first" in out


@pytest.mark.parametrize(
    ("name", "blocks"), [("tiny_siglip", 3), ("tiny_eva02", 2)]
)  # of 3: with the stem, and above a cut
def test_a_head_on_the_top_blocks_trains_and_is_evaluated_from_its_run_alone(
    name: str,
    blocks: int,
    config: MakeConfig,
    timm_folder: Callable[[str], str],
    tmp_path: Path,
    vcache: Callable[..., tuple[int, str, str]],
) -> None:
    store, run = str(tmp_path / "store.zarr"), str(tmp_path / "run")
    run_extraction(config(model=timm_folder(name), random_weights=True, cross_frame="none", layers="stem,-3:"))
    words = f"--set blocks={blocks} --epochs 1 --batch-size 4 --device cpu"
    status, _, err = vcache(f"train-head aim --store {store} --out {run} {words}")
    assert status == 0, err
    (tmp_path / name / "open_clip_config.json").unlink()
    status, _, err = vcache(f"eval {run} --device cpu")
    assert status == 0, err


@pytest.mark.parametrize(
    ("model", "cross_frame", "reason"),
    [
        ("tiny_registers", "qk", r"a TimmModel \(tiny_registers\) with register tokens"),
        ("tiny_eva02", "derive", "--cross-frame derive: tiny_eva02-.* Say --cross-frame qk"),
    ],
)
def test_what_cannot_be_tapped_is_refused_before_videos_are_listed_and_weights_looked_for(
    model: str, cross_frame: str, reason: str, config: MakeConfig, timm_folder: Callable[[str], str], tmp_path: Path
) -> None:
    asked = config(model=timm_folder(model), cross_frame=cross_frame, dataset=str(tmp_path / "no such folder"))
    with pytest.raises(UnsupportedBackbone, match=reason):
        prepare_extraction(asked)
    stages: list[str] = []
    with pytest.raises(UnsupportedBackbone, match=reason):
        prepare_extractions([asked], stages.append)
    assert not stages
