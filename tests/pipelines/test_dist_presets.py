"""DiST's presets: the rows of its tables, and stores that are made for them."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command

from vcache.extract.datasets.registry import list_datasets
from vcache.extract.layers import absolute_layer, resolve_layers
from vcache.heads.dist import DiST
from vcache.heads.requirements import Recipe
from vcache.pipelines import dist_presets, head_presets
from vcache.pipelines.cli import app
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.counting import preset_config
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.head_presets import HeadPreset, check_store, presets_of
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.presets import RECIPES
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.stored_views import parse_grid
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

PRESETS = presets_of("dist")
Vcache = Callable[..., tuple[int, str, str]]

# Qing et al. 2023: Tables 4 and A9, 6 and A11, by tower and frames.
MAIN = {
    "ssv2": {"b16": (68.7, 70.2, 70.9), "l14": (70.8, 72.5, 73.1), "l14-336": (71.2, 72.6, 73.3)},
    "k400": {"b16": (83.6, 84.4, 85.0), "l14": (86.9, 87.6, 88.0), "l14-336": (87.2, 87.9, 88.5)},
}
ABLATIONS = {  # on Something-Something and Kinetics: Tables 1a to 1f, A8, 2
    **{"spatial": (55.0, 79.9), "temporal": (63.2, 81.8), "integration": (65.9, 83.0)},
    **{"no-lateral": (67.5, 83.0), "up": (67.9, 83.4), "down": (67.7, 83.1)},
    **{"tada": (67.8, 82.4), "c3d": (67.8, 82.6), "joint": (67.6, 83.5)},
    **{"gamma1": (67.9, 83.4), "gamma4": (69.1, 83.3), "gamma8": (68.5, 83.6)},
    **{"alpha96": (62.6, 79.0), "alpha192": (66.7, 82.0), "alpha768": (68.7, 83.3)},
    **{"beta64": (67.9, 83.2), "beta128": (68.6, 83.3), "beta192": (68.9, 83.4)},
    **{"layers8": (66.0, 83.0), "layers4": (67.8, 83.3)},
    **{"avg": (68.3, None), "max": (68.4, None), "deconv": (67.8, None), "trilinear": (68.3, None)},
}


def test_the_rows_of_the_tables_are_there_with_their_accuracies() -> None:
    rows = {
        f"{dataset}-{size}-{frames}f": top1
        for dataset, of_dataset in MAIN.items()
        for size, of_size in of_dataset.items()
        for frames, top1 in zip((8, 16, 32), of_size, strict=True)
    }
    for name, accuracies in ABLATIONS.items():
        rows |= {f"{d}-b16-8f-{name}": x for d, x in zip(("ssv2", "k400"), accuracies, strict=True) if x}
    rows |= {"epic-b16-8f": 45.8, "epic-l14-8f": 48.9}  # Table 5b
    assert {name: preset.top1 for name, preset in PRESETS.items()} == rows
    assert len(PRESETS) == len(dist_presets.PRESETS)  # no name twice


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("spatial", {"temporal_encoder": False, "integration_branch": False}),
        ("temporal", {"integration_branch": False}),
        ("integration", {"temporal_encoder": False}),
        ("no-lateral", {"integration_to_temporal": False, "temporal_to_integration": False}),
        ("up", {"temporal_to_integration": False}),
        ("down", {"integration_to_temporal": False}),
        ("gamma4", {"gamma": 4}),
        ("alpha96", {"integration_dim": 96}),
        ("beta64", {"temporal_dim": 64}),
        ("layers8", {"layers": (8, 9, 10, 11)}),
        ("avg", {"down_sampling": "avg"}),
        ("trilinear", {"up_sampling": "trilinear"}),
        ("tada", {"temporal_block": "tada"}),
    ],
)
def test_a_variant_is_the_default_but_for_what_it_is_named_after(name: str, settings: dict[str, object]) -> None:
    default, variant = (
        preset_config("dist", CLIP_TOWERS[PRESETS[row].model], PRESETS[row], {})
        for row in ("ssv2-b16-8f", f"ssv2-b16-8f-{name}")
    )
    assert variant == replace(default, **settings)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_its_extract_line_makes_what_its_head_reads(name: str) -> None:
    preset = PRESETS[name]
    config = preset_config("dist", CLIP_TOWERS[preset.model], preset, {})
    assert isinstance(config, DiST.Config) and config.num_frames == preset.frames
    assert config.adaptive_pooling_layers == (4 if preset.dataset == "k400" else 2)
    assert "Table" in preset.source and preset.dataset in list_datasets()
    Recipe(**{**vars(DiST.recipe), **preset.recipe})
    _, command, dataset, *words = shlex.split(preset.extract_line)
    context = get_command(app).commands[command].make_context(command, [dataset, *words])  # type: ignore[attr-defined]
    asked, requires, num_layers = context.params, DiST.requires(config), CLIP_TOWERS[preset.model].num_layers
    wanted = {absolute_layer(layer, num_layers) for layer in requires.tokens}
    assert wanted <= set(resolve_layers(asked["layers"], num_layers))
    assert asked["pixels"] == requires.pixels * preset.frames
    assert (asked["frames"], asked["tsn"], asked["cross_frame"]) == (preset.frames, True, "none")
    assert (asked["model"] or ["ViT-B-16-quickgelu"]) == [preset.model]
    assert asked["augment"] == "dist" in RECIPES and parse_grid(asked["eval_views"]) == (3, 1)


def test_one_preset_is_shown_with_its_pixels_and_its_note(vcache: Vcache) -> None:
    status, printed, _ = vcache("heads dist --preset k400-b16-8f-joint")
    assert status == 0 and "Table 1c of the paper, top-1 83.5%" in printed
    assert "num_frames=8, adaptive_pooling_layers=4, temporal_block=joint\n" in printed
    assert "--layers 0: --tsn --views 8 --eval-views 3x1 --augment dist --pixels 16 --cross-frame none\n" in printed
    assert "165.0 GFLOPs are too few" in printed and "evl-flip" not in printed
    status, printed, _ = vcache("heads dist", columns=80)
    listed = printed[printed.index("--preset NAME") :].splitlines()[1:-2]
    assert status == 0 and max(map(len, listed)) <= 80 and [line.split()[0] for line in listed] == list(PRESETS)
    assert "reads      tokens of layers 0-11; pixels of 2 frames for each; text of the classes\n" in printed
    assert "layers=None  (list of int | None)" in printed
    described = json.loads(vcache("heads dist --json")[1])
    assert all(field["meaning"] for field in described["fields"].values() if not field["from_store"])
    assert described["fields"]["depth"]["default"] is None


TINY = HeadPreset(
    name="tiny-5f",
    head="dist",
    source="Table 0",
    settings={"gamma": 3, "integration_dim": 64},
    dataset="toy",
    num_classes=3,
    model="tiny",
    frames=5,
    eval_views="3x1",
    augment="dist",
)


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> HeadPreset:
    tower = ClipTower(num_layers=3, width=48, num_heads=4, patch_size=8, image_size=32, embed_dim=20)
    monkeypatch.setattr(head_presets, "CLIP_TOWERS", {**CLIP_TOWERS, "tiny": tower})
    monkeypatch.setattr(dist_presets, "PRESETS", (TINY,))
    return TINY


def test_a_store_of_other_clips_is_refused_with_the_line_that_makes_one(
    float32_store: Path, tmp_path: Path, tiny_preset: HeadPreset
) -> None:
    with FeatureStore.open(float32_store) as store, pytest.raises(HeadStoreMismatch) as refused:
        check_store(tiny_preset, store.manifest, {"num_frames": "4"}, "tiny.zarr")
    assert "clips of 4 frames, sampled as in TSN; tiny.zarr holds clips of 5 frames, stride 3." in str(refused.value)
    assert "--tsn --frames 4 " in str(refused.value) and "--pixels 12 " in str(refused.value)
    config = TrainingConfig(head="dist", preset="tiny-5f", store=float32_store, out=tmp_path / "run", device="cpu")
    with pytest.raises(HeadStoreMismatch, match="--pixels 15 "):
        train_head(config)


def test_a_store_of_the_same_clips_without_pixels_is_refused_with_the_line_that_adds_them(
    tiny_extraction: Callable[..., ExtractionConfig], tmp_path: Path, tiny_preset: HeadPreset
) -> None:
    path = tmp_path / "tsn.zarr"
    run_extraction(tiny_extraction(store=path, layers="0:", cross_frame="none", tsn=True, stride=16))
    config = TrainingConfig(head="dist", preset="tiny-5f", store=path, out=tmp_path / "run", device="cpu")
    with pytest.raises(HeadStoreMismatch, match=r"reads tokens of layers 0-2, pixels") as refused:
        train_head(config)
    assert "--pixels 15 " in str(refused.value) and f"--store {path}" in str(refused.value)
