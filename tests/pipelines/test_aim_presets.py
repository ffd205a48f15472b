"""AIM's presets: the rows of its tables, the stores that they read, and how they are listed."""

import json
import shlex
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from typer.main import get_command

from vcache.extract.datasets.registry import list_datasets
from vcache.extract.layers import resolve_layers
from vcache.heads.aim import AIM
from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import Recipe
from vcache.heads.tail_head import TailConfig
from vcache.pipelines import aim_presets
from vcache.pipelines.cli import app
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import preset_config
from vcache.pipelines.head_presets import presets_of
from vcache.pipelines.presets import RECIPES
from vcache.pipelines.stored_views import parse_grid

PRESETS = presets_of("aim")
Vcache = Callable[..., tuple[int, str, str]]

# Yang et al. 2023: Tables 2 and 3 by tower and frames, 4, 5, 7 and 8.
MAIN = {
    ("k400", "b16"): (83.9, 84.5, 84.7),
    ("k400", "l14"): (86.8, 87.3, 87.5),
    ("ssv2", "b16"): (66.4, 68.1, 69.1),
    ("ssv2", "l14"): (67.6, 69.4, 70.6),
}
OTHERS = {"k700-b16-32f": 76.9, "k700-l14-32f": 80.4, "diving48-b16-32f": 88.9, "diving48-l14-32f": 90.6}
ABLATIONS = {"top6": 83.3, "bottom6": 80.7, "skip": 83.2, "sixteenth": 83.3, "eighth": 83.4, "half": 83.8}
WITHOUT = {"ssv2-b16-8f-spatial", "ssv2-b16-8f-spatial-temporal"}  # Table 1, ImageNet-21k alone
OURS = {"k400-b16-8f-top1", "k400-b16-8f-top2", "k400-b16-8f-top3", "ssv2-b16-8f-top6", "k400-l14-8f-top12"}


def config_of(name: str) -> AIM.Config:
    config = preset_config("aim", CLIP_TOWERS[PRESETS[name].model], PRESETS[name], {})
    assert isinstance(config, AIM.Config)
    return config


def test_the_rows_of_the_tables_are_there_with_their_accuracies() -> None:
    rows = {
        f"{dataset}-{size}-{frames}f": top1
        for (dataset, size), accuracies in MAIN.items()
        for frames, top1 in zip((8, 16, 32), accuracies, strict=True)
    }
    rows |= OTHERS | {f"k400-b16-8f-{name}": top1 for name, top1 in ABLATIONS.items()}
    assert {name: one.top1 for name, one in PRESETS.items() if one.top1} == rows
    assert {name for name, one in PRESETS.items() if not one.top1} == WITHOUT | OURS
    assert {name for name, one in PRESETS.items() if one.source == "ours"} == OURS
    assert len(PRESETS) == len(aim_presets.PRESETS)  # no name twice


@pytest.mark.parametrize(
    ("name", "of", "settings"),
    [
        ("ssv2-b16-8f-spatial", "ssv2-b16-8f", {"temporal": False, "joint": False}),
        ("ssv2-b16-8f-spatial-temporal", "ssv2-b16-8f", {"joint": False}),
        ("k400-b16-8f-top6", "k400-b16-8f", {"blocks": 6}),
        ("k400-b16-8f-bottom6", "k400-b16-8f", {"positions": "lower_half"}),
        ("k400-b16-8f-half", "k400-b16-8f", {"bottleneck": 0.5}),
        ("ssv2-b16-8f", "k400-b16-8f", {"num_classes": 174, "temporal_adapters": 2, "adapter_scale": 1.0}),
        ("k700-b16-32f", "k400-b16-32f", {"num_classes": 700}),
        ("diving48-l14-32f", "k400-l14-32f", {"num_classes": 48}),
    ],
)
def test_a_variant_is_another_row_but_for_what_it_is_named_after(
    name: str, of: str, settings: dict[str, object]
) -> None:
    assert config_of(name) == replace(config_of(of), **settings)


def test_positions_of_table_7_adapt_six_blocks_of_twelve() -> None:
    adapted = {name: config_of(f"k400-b16-8f-{name}").adapted_layers for name in ("top6", "bottom6", "skip")}
    assert adapted == {"top6": tuple(range(6, 12)), "bottom6": tuple(range(6)), "skip": tuple(range(1, 12, 2))}
    assert config_of("k400-b16-8f").adapted_layers == tuple(range(12))


@pytest.mark.parametrize("blocks", range(2, 13))
def test_every_second_block_is_the_same_above_any_cut_that_has_it(blocks: int) -> None:
    """So the lowest of them says where to cut: nothing below it is trained."""
    whole = replace(config_of("k400-b16-8f"), positions="every_second")
    cut = replace(whole, blocks=blocks)
    assert cut.adapted_layers == tuple(layer for layer in whole.adapted_layers if layer in cut.layers_run)


def test_recipes_are_those_of_the_official_configs() -> None:
    own = {
        name: Recipe(**{**{field.name: getattr(AIM.recipe, field.name) for field in fields(Recipe)}, **one.recipe})
        for name, one in PRESETS.items()
    }
    for name, recipe in own.items():
        dataset, large = PRESETS[name].dataset, "-l14-" in name
        assert (recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.warmup_epochs) == (3e-4, 0.05, 64, 2.5)
        assert recipe.epochs == (30 if dataset.startswith("k") else 50)
        assert recipe.label_smoothing == (0.1 if dataset == "ssv2" else 0)
        slow = large and dataset in ("k400", "ssv2")
        assert recipe.lr_multipliers == ((("classifier.*", 1.0), ("*", 0.1)) if slow else AIM.recipe.lr_multipliers)
        assert recipe.no_decay == (() if slow else ("ln_post.*",))


@pytest.mark.parametrize("name", PRESETS)
def test_the_extract_line_of_a_preset_makes_what_its_head_reads(name: str) -> None:
    preset, config = PRESETS[name], config_of(name)
    _, command, dataset, *words = shlex.split(preset.extract_line)
    asked = get_command(app).commands[command].make_context(command, [dataset, *words]).params  # type: ignore[attr-defined]
    if config.num_blocks == config.num_layers:
        assert asked["layers"] == "stem" and preset.layers_and_cross_frame == ("stem", "none")
    else:
        assert asked["cross_frame"] == "none"
        assert resolve_layers(asked["layers"], config.num_layers) == (config.num_layers - config.num_blocks - 1,)
    stride = {8: 16, 16: 8, 32: 4}[preset.frames]
    kinetics = preset.dataset in ("k400", "k700")
    assert (asked["tsn"], preset.stride) == (not kinetics, stride if kinetics else None)
    assert not kinetics or asked["stride"] == stride
    assert (asked["frames"], asked["pixels"]) == (preset.frames, 0)
    assert (asked["model"] or ["ViT-B-16-quickgelu"]) == [preset.model]
    views = {"k400": (3, 1), "k700": (3, 3), "ssv2": (1, 3), "diving48": (1, 1)}[preset.dataset]
    assert asked["augment"] == "aim" in RECIPES and parse_grid(asked["eval_views"]) == views
    assert preset.dataset in list_datasets()


def test_presets_are_listed_and_shown(vcache: Vcache) -> None:
    status, printed, _ = vcache("heads aim", columns=80)
    listed = printed[printed.index("--preset NAME") :].splitlines()[1:-2]
    assert status == 0 and max(map(len, listed)) <= 80 and [line.split()[0] for line in listed] == list(PRESETS)
    assert "reads      tokens of layers -7; the top 6 blocks of the backbone\n" in printed
    status, printed, _ = vcache("heads aim --preset k400-b16-8f-top6")
    assert status == 0 and "Table 7 of the paper, top-1 83.3% there" in printed
    assert "--layers 5 --views 8 --eval-views 3x1 --augment aim --cross-frame none\n" in printed
    status, printed, _ = vcache("heads aim --preset k400-b16-8f-top2")
    assert status == 0 and "ours, no row of the paper\n" in printed and "--layers 9 " in printed


@pytest.mark.parametrize("head", [name for name in list_heads() if issubclass(get_head(name).Config, TailConfig)])
def test_heads_on_a_tail_are_listed_with_the_meaning_of_every_setting(vcache: Vcache, head: str) -> None:
    status, printed, _ = vcache(f"heads {head} --json")
    described = json.loads(printed)
    assert status == 0 and {"blocks", "frozen_dtype", "checkpointing"} <= described["fields"].keys()
    assert all(field["meaning"] for field in described["fields"].values() if not field["from_store"])
    assert described["reads"].endswith("the top 6 blocks of the backbone")
    assert described["num_presets"] == len(presets_of(head))
