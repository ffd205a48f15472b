"""Presets: rows of the paper that can be configured, extracted for and trained, and stores that do not fit them."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command

from vcache.extract.layers import absolute_layer, resolve_layers
from vcache.heads.evl import EVL
from vcache.heads.requirements import Recipe
from vcache.pipelines import evl_presets, head_presets
from vcache.pipelines.cli import app
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.counting import preset_config
from vcache.pipelines.demo.table8 import MODULES, TABLE_8A
from vcache.pipelines.fitting_store import NoFittingStore
from vcache.pipelines.head_presets import HeadPreset, UnknownPreset, find_preset, presets_of
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.presets import RECIPES
from vcache.pipelines.runs import Run
from vcache.pipelines.settings import SettingError
from vcache.pipelines.stored_views import parse_grid
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

EVL_PRESETS = presets_of("evl")

TINY = HeadPreset(
    name="tiny-5f",
    head="evl",
    source="Table 0",
    settings={"layers": (-2, -1, -2), "temporal_cross_attention": False},
    recipe={"steps": 3, "lr": 1e-3, "batch_size": 4},
    dataset="toy",
    num_classes=3,
    model="tiny",
    frames=5,
    stride=3,
    eval_views="3x1",
    augment="evl",
)


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> HeadPreset:
    """A preset for the tiny CLIP of the tests, beside the paper's."""
    tower = ClipTower(num_layers=3, width=48, num_heads=4, patch_size=8, image_size=32, embed_dim=20)
    monkeypatch.setattr(head_presets, "CLIP_TOWERS", {**CLIP_TOWERS, "tiny": tower})
    monkeypatch.setattr(evl_presets, "PRESETS", (*evl_presets.PRESETS, TINY))
    return TINY


def test_the_rows_of_the_papers_tables_are_there() -> None:
    names = {f"k400-{size}-{frames}f" for size in ("b16", "l14") for frames in (8, 16, 32)}
    names |= {f"ssv2-b16-{frames}f" for frames in (8, 16, 32)} | {"ssv2-l14-8f", "ssv2-l14-32f", "ssv2-l14-336-32f"}
    names |= {"k400-b16-8f-1layer", "k400-l14-336-32f", "ucf101-l14-32f", "hmdb51-l14-336-32f"}
    assert names <= EVL_PRESETS.keys()
    assert len(EVL_PRESETS) == len(evl_presets.PRESETS)  # no name twice
    k400, ssv2 = EVL_PRESETS["k400-b16-32f"], EVL_PRESETS["ssv2-l14-8f"]
    assert (k400.frames, k400.stride, k400.eval_views, k400.head_settings["num_frames"]) == (32, 8, "3x1", 32)
    assert (ssv2.stride, ssv2.eval_views, dict(ssv2.recipe)) == (None, "1x3", {"steps": 30_000})
    assert len(ssv2.settings["layers"]) == 24


# Lin et al. 2022: accuracy, and how clips are sampled (appendix A and B); of Something-Something the centres of segments.
ACCURACY = {
    **{"k400-b16-8f": 82.9, "k400-b16-16f": 83.6, "k400-b16-32f": 84.2, "k400-b16-8f-tca": 82.9},  # Tables 1 and 3
    **{"k400-l14-8f": 86.3, "k400-l14-16f": 87.0, "k400-l14-32f": 87.3, "k400-l14-336-32f": 87.7},
    **{"k400-b16-8f-1layer": 81.1, "k400-b16-8f-2layers": 82.1},  # Table 6a
    **{"k400-b16-8f-3layers": 82.6, "k400-b16-8f-5layers": 83.0},
    **{"k400-b16-8f-features-2211": 82.7, "k400-b16-8f-features-1111": 82.1},  # Table 6b
    **{"k400-b16-8f-features-2121": 82.4, "k400-b16-8f-features-7531": 82.0},
    **{"k400-b16-8f-cls": 79.8, "k400-b16-8f-spatial-mean": 75.8, "k400-b16-8f-temporal-mean": 80.1},  # Table 6c
    **{"ssv2-b16-8f": 61.0, "ssv2-b16-16f": 61.7, "ssv2-b16-32f": 62.4},  # Table 9
    **{"ssv2-l14-8f": 65.1, "ssv2-l14-32f": 66.7, "ssv2-l14-336-32f": 68.0},
    **{f"ssv2-b16-8f-{depth}layers": top1 for depth, top1 in ((4, 58.6), (6, 60.1), (8, 60.2), (10, 60.5))},  # Table 8b
    **{
        "ucf101-l14-32f": 98.5,
        "ucf101-l14-336-32f": 98.6,
        "hmdb51-l14-32f": 83.6,
        "hmdb51-l14-336-32f": 83.2,
    },  # Table 12
}
STRIDES = {("k400", 8): 16, ("k400", 16): 16, ("k400", 32): 8, ("ucf101", 32): 2, ("hmdb51", 32): 2}
MODULES_OF = {  # T-Conv, T-PE, T-CA of Table 8a
    "none": (False, False, False),
    "conv": (True, False, False),
    "pe": (False, True, False),
    "tca-only": (False, False, True),
    "conv-pe": (True, True, False),
    "conv-tca": (True, False, True),
    "pe-tca": (False, True, True),
}


def test_accuracies_and_strides_are_the_papers() -> None:
    of_modules = {
        f"{dataset}-b16-8f-{name}" for dataset in ("k400", "ssv2") for name in MODULES_OF
    }  # the next test has them
    assert {name: preset.top1 for name, preset in EVL_PRESETS.items() if name not in of_modules} == ACCURACY
    for preset in EVL_PRESETS.values():
        assert preset.stride == STRIDES.get((preset.dataset, preset.frames))


@pytest.mark.parametrize("name", MODULES_OF)
def test_rows_of_table_8a_have_the_modules_they_are_named_after_and_the_numbers_of_the_demos_table(name: str) -> None:
    (row,) = [row for row in TABLE_8A if tuple(getattr(row.variant, module) for module in MODULES) == MODULES_OF[name]]
    for dataset, top1, depth in (("k400", row.k400, 4), ("ssv2", row.ssv2, 12)):
        preset = EVL_PRESETS[f"{dataset}-b16-8f-{name}"]
        config = preset_config("evl", CLIP_TOWERS[preset.model], preset, {})
        assert tuple(getattr(config, module) for module in MODULES) == MODULES_OF[name]
        assert config.layers == tuple(range(-depth, 0))
        assert preset.top1 == top1


@pytest.mark.parametrize("name", EVL_PRESETS)
def test_every_preset_can_be_built_and_says_where_it_comes_from(name: str) -> None:
    preset = EVL_PRESETS[name]
    config = preset_config("evl", CLIP_TOWERS[preset.model], preset, {})
    assert isinstance(config, EVL.Config) and config.num_frames == preset.frames
    Recipe(**{**vars(EVL.recipe), **preset.recipe})
    assert "Table" in preset.source and preset.top1 is not None


@pytest.mark.parametrize("name", EVL_PRESETS)
def test_the_extract_line_of_a_preset_makes_what_its_head_reads(name: str) -> None:
    preset = EVL_PRESETS[name]
    _, command, dataset, *words = shlex.split(preset.extract_line)
    context = get_command(app).commands[command].make_context(command, [dataset, *words])  # type: ignore[attr-defined]
    asked, num_layers = context.params, CLIP_TOWERS[preset.model].num_layers
    config = preset_config("evl", CLIP_TOWERS[preset.model], preset, {})
    wanted = {absolute_layer(layer, num_layers) for layer in config.layers}
    assert set(resolve_layers(asked["layers"], num_layers)) == wanted
    assert (asked["cross_frame"] == "none") == (not config.temporal_cross_attention)
    assert (asked["frames"], asked["tsn"]) == (preset.frames, preset.stride is None)
    assert preset.stride in (None, asked["stride"])
    assert (asked["model"] or ["ViT-B-16-quickgelu"]) == [preset.model]
    assert asked["augment"] in RECIPES and parse_grid(asked["eval_views"])


def test_a_run_takes_the_presets_settings_and_keeps_its_name(
    float32_store: Path, tmp_path: Path, tiny_preset: HeadPreset
) -> None:
    run = tmp_path / "run"
    train_head(TrainingConfig(head="evl", preset="tiny-5f", store=float32_store, out=run, device="cpu"))
    config = Run.open(run).config
    assert config["preset"] == "tiny-5f"
    assert tuple(config["head_config"]["layers"]) == (-2, -1, -2)
    assert not config["head_config"]["temporal_cross_attention"]
    assert (config["recipe"]["steps"], config["recipe"]["lr"], config["recipe"]["weight_decay"]) == (3, 1e-3, 0.05)


def test_what_is_set_goes_before_the_preset(
    float32_store: Path, tmp_path: Path, tiny_preset: HeadPreset, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    line = f"train-head evl --preset tiny-5f --store {float32_store} --out {tmp_path / 'run'} --device cpu"
    status, _, said = vcache(f"{line} --epochs 1 --lr 0.002 --set layers=-1: --set query_init=normal")
    assert status == 0, said
    config = Run.open(tmp_path / "run").config
    assert (config["recipe"]["epochs"], config["recipe"]["steps"], config["recipe"]["lr"]) == (1, None, 0.002)
    assert (tuple(config["head_config"]["layers"]), config["head_config"]["query_init"]) == ((2,), "normal")
    assert not config["head_config"]["temporal_cross_attention"]


def test_a_number_of_frames_that_is_none_is_refused_by_name(
    float32_store: Path, tmp_path: Path, tiny_preset: HeadPreset
) -> None:
    given = {"preset": "tiny-5f", "settings": {"num_frames": "five"}}
    with pytest.raises(SettingError, match="--set num_frames=five: int expected"):
        train_head(TrainingConfig(head="evl", store=float32_store, out=tmp_path / "run", device="cpu", **given))


def test_a_run_without_a_preset_says_so(float32_store: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "layers": "-1:", "batch_size": 4}
    train_head(TrainingConfig(head="evl", store=float32_store, out=tmp_path / "run", device="cpu", settings=settings))
    assert Run.open(tmp_path / "run").config["preset"] is None


def test_a_store_of_another_backbone_is_refused_with_the_line_that_makes_one(
    float32_store: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(head="evl", preset="ssv2-l14-8f", store=float32_store, out=tmp_path / "run", device="cpu")
    with pytest.raises(HeadStoreMismatch) as refused:
        train_head(config)
    first, line = str(refused.value).splitlines()
    assert "backbone ViT-L-14-quickgelu (24 blocks of width 1024, 16x16 patches)" in first
    assert "clips of 8 frames, sampled as in TSN; tiny.zarr holds backbone " in first
    assert first.endswith("(3 blocks of width 48, 4x4 patches) and clips of 5 frames, stride 3.")
    assert line.startswith("Extract a store of its own with:  vcache extract ")
    assert "--layers 0: --model ViT-L-14-quickgelu --tsn" in line
    assert "--views 8 --eval-views 1x3 --augment evl" in line and "--store" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frames": 4}, "clips of 4 frames, stride 3"),
        ({"stride": 2}, "clips of 5 frames, stride 2"),
        ({"stride": None}, "TSN"),
    ],
)
def test_a_store_of_other_clips_is_refused(
    float32_store: Path,
    tmp_path: Path,
    tiny_preset: HeadPreset,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, int | None],
    words: str,
) -> None:
    monkeypatch.setattr(evl_presets, "PRESETS", (replace(TINY, **fields),))
    config = TrainingConfig(head="evl", preset="tiny-5f", store=float32_store, out=tmp_path / "run", device="cpu")
    with pytest.raises(
        HeadStoreMismatch, match=f"is trained from clips of .*{words.split()[-1]}; tiny.zarr holds clips of 5"
    ):
        train_head(config)


def test_without_any_store_the_preset_says_how_to_make_one(tmp_path: Path) -> None:
    line = EVL_PRESETS["k400-b16-8f"].extract_line
    with pytest.raises(NoFittingStore, match=f"Make one with:  {line}"):
        train_head(TrainingConfig(head="evl", preset="k400-b16-8f", out=tmp_path / "run", device="cpu"))


def test_an_unknown_preset_names_the_nearest_and_how_to_see_all() -> None:
    with pytest.raises(UnknownPreset, match=r"Did you mean 'k400-b16-8f'\? See all with:  vcache heads evl"):
        find_preset("evl", "k400-b16-8")
    with pytest.raises(UnknownPreset, match="head 'linear' has no presets"):
        find_preset("linear", "k400")


def test_heads_evl_shows_settings_presets_and_extract_lines(vcache: Callable[[str], tuple[int, str, str]]) -> None:
    status, printed, _ = vcache("heads evl --json")
    described = json.loads(printed)
    assert status == 0 and len(described["presets"]) == len(EVL_PRESETS)
    assert all(field["meaning"] for name, field in described["fields"].items() if not field["from_store"])
    assert described["fields"]["pooling"]["type"] == "none | cls | spatial_mean | temporal_mean"
    assert described["fields"]["depth"]["default"] == 4  # of the fields of a Config there is none
    status, printed, _ = vcache("heads")
    assert status == 0 and f"{len(EVL_PRESETS)}, see:  vcache heads evl" in printed


def test_heads_evl_lists_each_preset_on_one_line_of_a_narrow_terminal(
    vcache: Callable[..., tuple[int, str, str]],
) -> None:
    status, printed, _ = vcache("heads evl", columns=80)
    listed = printed[printed.index("--preset NAME") :].splitlines()[1:-2]
    assert status == 0 and max(map(len, listed)) <= 80
    assert [line.split()[:2] for line in listed] == [[one.name, f"{one.top1}"] for one in EVL_PRESETS.values()]
    assert all(line.endswith(one.source) for line, one in zip(listed, EVL_PRESETS.values(), strict=True))


def test_one_preset_is_shown_with_its_note_settings_recipe_and_extract_line(
    vcache: Callable[[str], tuple[int, str, str]],
) -> None:
    preset = EVL_PRESETS["ssv2-b16-8f-4layers"]
    status, printed, _ = vcache(f"heads evl --preset {preset.name}")
    assert status == 0 and "Table 8b of the paper, top-1 58.6%" in printed and preset.note in printed
    assert "num_frames=8, layers=-4,-3,-2,-1\n" in printed and "steps=30000, batch_size=256" in printed
    assert preset.extract_line in printed and "evl-flip" in printed
    assert "vcache train-head evl --preset ssv2-b16-8f-4layers\n" in printed
    status, printed, _ = vcache(f"heads evl --preset {preset.name} --json")
    described = json.loads(printed)
    assert status == 0 and described["extract"] == preset.extract_line
    assert (described["recipe"]["steps"], described["recipe"]["lr"]) == (30_000, 4e-4)


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("heads evl --preset k400-b16-8", 1, "Did you mean 'k400-b16-8f'?"),
        ("heads linear --preset k400-b16-8f", 1, "head 'linear' has no presets."),
        ("heads --preset k400-b16-8f", 2, "go with a HEAD"),
        ("heads evl --set layers=-1", 2, "--set with --count"),
    ],
)
def test_a_preset_that_cannot_be_shown_is_refused(
    vcache: Callable[[str], tuple[int, str, str]], line: str, status: int, words: str
) -> None:
    assert vcache(line)[0] == status and words in " ".join(vcache(line)[2].replace("│", " ").split())
