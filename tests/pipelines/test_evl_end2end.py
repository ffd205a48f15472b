"""Official video -> official logits through our backbone, store and head (goldens/evl_end2end, EVL at b282e8b)."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from vcache.extract.backbone import FrozenBackbone, load_backbone
from vcache.heads.evl import EVL
from vcache.heads.official_evl import load_evl_state_dict
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.importing import ImportConfig, import_head
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import RunError
from vcache.pipelines.setup import array_specs
from vcache.store.key import cache_key
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

GOLDEN = Path(__file__).parents[1] / "goldens" / "evl_end2end"


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def backbone(golden: dict[str, torch.Tensor], tmp_path: Path) -> FrozenBackbone:
    """The official image tower as an open_clip model."""
    vision = {"image_size": 48, "patch_size": 16, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    document = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    state = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).state_dict()
    official = {name.removeprefix("w/clip."): x for name, x in golden.items() if name.startswith("w/clip.")}
    assert official.keys() <= state.keys()
    save_file(state | official, tmp_path / "open_clip_model.safetensors")
    return load_backbone(f"local-dir:{tmp_path}", None)


def write_store(path: Path, backbone: FrozenBackbone, video: torch.Tensor) -> FeatureStore:
    """A float32 store of the last two layers of clips (B, T, 3, S, S)."""
    B, T = video.shape[:2]
    config = ExtractionConfig(dataset="golden", frames=T, dtype="float32")
    specs = tuple(spec for spec in array_specs(backbone.facts, (1, 2), config) if "/" in spec.name)
    facts = {"backbone": vars(backbone.facts), "request": {"frames": T}}
    manifest = Manifest(
        key=cache_key({}),
        spec={},
        dataset="golden",
        class_names=tuple("abcde"),
        rows_per_shard=B,
        splits={"val": B},
        facts=json.loads(json.dumps(facts)),
    )
    names = tuple(f"video {b}" for b in range(B))
    create_store(path, manifest, {"val": VideoTable(names, names, np.zeros(B, dtype=np.int64))})
    store = FeatureStore.open(path)
    declare_arrays(store, "val", specs)
    with ShardWriter(store, "val", 0, specs) as writer:
        for b in range(B):
            taps = backbone(video[b], tokens=[1, 2], qk=[1, 2])
            named = {
                f"{kind}/{i}": values[i]
                for kind, values in (("tokens", taps.tokens), ("q", taps.q), ("k", taps.k))
                for i in (1, 2)
            }
            named |= {f"cls/{i}": taps.tokens[i][:, 0] for i in (1, 2)}
            writer.write(b, {name: np.ascontiguousarray(x.numpy()) for name, x in named.items()})
    return store


@pytest.mark.parametrize("formulation", ["absorbed", "plain"])
def test_official_logits_and_gradients_come_out_of_the_store(
    golden: dict[str, torch.Tensor], backbone: FrozenBackbone, tmp_path: Path, formulation: str
) -> None:
    video = golden["in/video"].permute(0, 2, 1, 3, 4)  # (B, T, 3, S, S)
    sizes = {"num_classes": 5, "num_frames": 4, "width": 64, "num_heads": 4, "grid": (3, 3), "layers": (-2, -1)}
    config = EVL.Config(**sizes, formulation=formulation)
    head = EVL(config).eval()
    weights = {name.removeprefix("w/"): x for name, x in golden.items() if name.startswith(("w/decoder", "w/proj"))}
    load_evl_state_dict(head, weights)
    with write_store(tmp_path / "golden.zarr", backbone, video) as store:
        plan = match("evl", EVL.requires(config), store, ["val"])
        (batch,) = ClipLoader(store, "val", plan, batch_size=2, device=torch.device("cpu")).in_order()
        logits = head(batch.features())
    torch.testing.assert_close(logits, golden["out/logits"], rtol=1e-5, atol=2e-5)
    logits.square().sum().backward()
    gradients = dict(head.named_parameters())
    for name, expected in golden.items():
        if name.startswith("grad/"):
            torch.testing.assert_close(gradients[name.removeprefix("grad/")].grad, expected, rtol=1e-5, atol=2e-5)


def test_an_imported_file_is_evaluated_to_the_loss_of_the_official_logits(
    golden: dict[str, torch.Tensor], backbone: FrozenBackbone, tmp_path: Path
) -> None:
    weights = {name.removeprefix("w/"): x for name, x in golden.items() if name.startswith(("w/decoder", "w/proj"))}
    torch.save({"model": {f"module.{name}": x for name, x in weights.items()}, "next_step": 3}, tmp_path / "file.pth")
    store = tmp_path / "golden.zarr"
    write_store(store, backbone, golden["in/video"].permute(0, 2, 1, 3, 4)).close()
    # By 64 channels to a head, width 64 has one; this backbone has four.
    import_head(ImportConfig(head="evl", file=tmp_path / "file.pth", out=tmp_path / "mistaken"))
    with pytest.raises(
        RunError,
        match="taken to have num_heads=1, one for 64 channels .* has 4. Import it again with --set num_heads=4",
    ):
        evaluate_run(tmp_path / "mistaken", store=store)
    import_head(ImportConfig(head="evl", file=tmp_path / "file.pth", settings={"num_heads": "4"}, out=tmp_path / "run"))
    labels = torch.zeros(len(golden["out/logits"]), dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(golden["out/logits"], labels).item()
    assert evaluate_run(tmp_path / "run", store=store).loss == pytest.approx(expected, rel=1e-5)
