"""Parameters and multiply-adds of DiST: the paper's numbers, and counts of the module itself."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.dist import DiST
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import count, describe_count, preset_config
from vcache.pipelines.counting_dist import computed_macs, embedded_for_nothing_macs, head_macs
from vcache.pipelines.head_presets import presets_of

B16, L14, L14_336 = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"
Vcache = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("model", "frames", "pooling", "parameters", "with_tower", "head_gmacs", "tmacs"),
    [
        (B16, 8, 2, 19_001_184, 104.80, 21.43, 0.162),
        (B16, 8, 4, 26_105_184, 111.90, 22.40, 0.163),
        (B16, 32, 4, 26_252_640, 112.05, 89.57, 0.652),
        (L14, 32, 2, 32_745_312, 335.92, 230.66, 2.823),
        (L14, 8, 4, 39_609_696, 342.79, 58.92, 0.707),
        (L14, 32, 4, 39_867_744, 343.05, 235.64, 2.828),
    ],
)
def test_counts_are_those_of_the_official_network(
    model: str, frames: int, pooling: int, parameters: int, with_tower: float, head_gmacs: float, tmacs: float
) -> None:
    """By torch's own counter on the official modules; with the tower they round to the paper's numbers."""
    tower = CLIP_TOWERS[model]
    settings = {"num_frames": frames, "adaptive_pooling_layers": pooling}
    counted = count("dist", preset_config("dist", tower, None, settings), tower, num_views=1)
    assert counted.parameters == parameters
    assert (counted.parameters + tower.num_trunk_parameters) / 1e6 == pytest.approx(with_tower, abs=0.005)
    assert counted.head_macs / 1e9 == pytest.approx(head_gmacs, abs=0.01)
    assert counted.total_gmacs / 1e3 == pytest.approx(tmacs, abs=6e-4)


@pytest.mark.parametrize(("model", "parameters"), [(B16, 86_192_640), (L14, 303_966_208), (L14_336, 304_293_888)])
def test_a_trunk_is_a_tower_without_ln_post_and_projection(model: str, parameters: int) -> None:
    tower = CLIP_TOWERS[model]
    assert tower.num_trunk_parameters == parameters - 2 * tower.width - tower.width * tower.embed_dim


SMALL = DiST.Config(
    num_classes=7,
    num_frames=4,
    num_layers=3,
    width=24,
    grid=(3, 5),
    patch_size=2,
    embed_dim=10,
    integration_dim=128,
    temporal_dim=32,
    adaptive_pooling_layers=3,
)


def counted_macs(config: DiST.Config) -> int:
    """By torch's counter, of the head as it runs."""
    torch.manual_seed(0)
    head = DiST(config).eval().requires_grad_(False)
    head.set_text(ClassText(torch.randn(config.num_classes, 1, config.embed_dim), 1.0))
    (rows, columns), p, T = config.grid, config.patch_size, config.num_frames
    asked = DiST.requires(config)
    features = ClipFeatures(
        tokens={layer: torch.rand(1, T, 1 + rows * columns, config.width) for layer in asked.tokens},
        pixels=torch.zeros(1, T * asked.pixels, rows * p, columns * p, 3, dtype=torch.uint8) if asked.pixels else None,
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(features)
    return counter.get_total_flops() // 2


SETTINGS: list[dict[str, Any]] = [
    *({"gamma": gamma} for gamma in (1, 2, 4)),
    *({"temporal_block": block} for block in ("c3d", "tada", "joint")),
    *({"down_sampling": way} for way in ("avg", "max")),
    *({"up_sampling": way} for way in ("trilinear", "deconv")),
    {"up_sampling": "deconv", "gamma": 4},
    {"temporal_encoder": False},
    {"integration_branch": False},
    {"temporal_encoder": False, "integration_branch": False},
    {"integration_to_temporal": False},
    {"temporal_to_integration": False},
    {"integration_to_temporal": False, "temporal_to_integration": False},
    {"integration_dim": 64, "temporal_dim": 64},
]


@pytest.mark.parametrize(
    ("settings", "layers"),
    # One layer is first and last at once. Of two and three, each setting has one.
    [(settings, layers) for i, settings in enumerate(SETTINGS) for layers in ((1,), (None, (0, 2))[i % 2])],
)
def test_the_formulas_count_what_every_variant_multiplies(
    settings: dict[str, Any], layers: tuple[int, ...] | None
) -> None:
    config = replace(SMALL, layers=layers, **settings)
    has_up = config.temporal_encoder and config.integration_branch and config.integration_to_temporal
    taps = config.gamma + 2 * max(1, config.gamma // 2) if config.up_sampling == "deconv" else 0
    last_up = 4 * 15 * config.temporal_dim * (config.integration_dim + taps * config.temporal_dim)
    # The official code computes it, and nothing comes of it.
    assert counted_macs(replace(config, formulation="plain")) == head_macs(config) - has_up * last_up
    assert counted_macs(config) == computed_macs(config)


def test_rows_of_the_paper_are_within_a_few_per_cent_but_for_full_attention() -> None:
    rows = {row["name"]: row for row in describe_count("dist", {}, None)}
    for row in rows.values():
        assert row["paper_millions"] is None or round(row["with_tower"] / 1e6) == row["paper_millions"]
    off = {name: row["deviation"] for name, row in rows.items() if row["deviation"] and abs(row["deviation"]) > 0.01}
    assert off == {  # as the remarks under the table say
        "ssv2-b16-8f": pytest.approx(0.018, abs=5e-4),
        "ssv2-b16-16f": pytest.approx(0.018, abs=5e-4),
        "k400-b16-16f": pytest.approx(0.024, abs=5e-4),
        "k400-b16-8f-joint": pytest.approx(0.130, abs=5e-4),
        "k400-b16-8f-alpha768": pytest.approx(0.0185, abs=5e-4),
    }
    gmacs = {name: rows[f"k400-b16-8f{name}"]["clip_gmacs"] for name in ("", "-joint")}
    assert gmacs["-joint"] - gmacs[""] == pytest.approx(22.7, abs=0.05)  # attention's own products


def test_table_1_is_met_by_2_pooling_layers_and_the_patch_embedding_of_all_frames() -> None:
    tower, off = CLIP_TOWERS[B16], {}
    for preset in presets_of("dist").values():
        if preset.name.startswith("k400-b16-8f") and preset.gmacs:
            config = preset_config("dist", tower, preset, {"adaptive_pooling_layers": 2})
            macs = count("dist", config, tower, num_views=1).total_gmacs + embedded_for_nothing_macs(config) / 1e9
            off[preset.name.removeprefix("k400-b16-8f-")] = macs - preset.gmacs
    assert off.pop("joint") > 20
    assert len(off) == 12 and all(-0.3 < difference < -0.1 for difference in off.values()), off


@pytest.mark.parametrize("gamma", [1, 4])
def test_frames_of_the_temporal_encoder_alone_are_embedded_for_nothing(gamma: int) -> None:
    patch_embedding = 4 * 15 * (3 * 2 * 2) * 24  # frames, patches, numbers of each, width
    assert embedded_for_nothing_macs(replace(SMALL, gamma=gamma)) == (gamma - 1) * patch_embedding
    assert embedded_for_nothing_macs(replace(SMALL, temporal_encoder=False)) == 0


def test_every_row_of_table_1_that_has_gflops_is_counted() -> None:
    paper = {row["name"].removeprefix("k400-b16-8f"): row["paper_gmacs"] for row in describe_count("dist", {}, None)}
    of_table_1 = {
        **{"": 163.1, "-tada": 162.0, "-c3d": 168.2, "-joint": 165.0},  # 1c
        **{"-gamma1": 158.7, "-gamma4": 171.6, "-gamma8": 188.8},  # 1d
        **{"-alpha96": 149.4, "-alpha192": 152.8, "-alpha768": 196.1},  # 1e
        **{"-beta64": 159.7, "-beta128": 167.4, "-beta192": 178.7},  # 1f
    }
    assert {name: gmacs for name, gmacs in paper.items() if name in of_table_1} == of_table_1


def test_the_table_holds_every_number_whole_at_80_columns(vcache: Vcache) -> None:
    status, printed, _ = vcache("heads dist --count", columns=80)
    assert status == 0 and "…" not in printed
    for row in describe_count("dist", {}, None):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['name']} ")]
        assert len(line) <= 80
        for number in (f"{row['parameters']:,}", f"{row['with_tower'] / 1e6:.2f} M", f"{row['clip_gmacs']:,.1f}"):
            assert number in line
        assert row["paper_gmacs"] is None or f" {row['paper_gmacs']:,} " in line
    assert "165.0 cannot be those of attention" in printed


def test_one_configuration_is_counted_on_the_command_line(vcache: Vcache) -> None:
    status, printed, _ = vcache("heads dist --count --set gamma=4 --set layers=8: --json")
    (row,) = json.loads(printed)
    config = preset_config("dist", CLIP_TOWERS[B16], None, {"gamma": 4, "layers": "8:"})
    assert status == 0 and config.layers == (8, 9, 10, 11)
    assert (row["head_macs"], row["config"]["layers"], row["num_views"]) == (head_macs(config), [8, 9, 10, 11], 1)
    status, printed, _ = vcache("heads dist --count --preset k400-l14-32f")
    assert status == 0 and "39,867,744" in printed and "235.64 GMACs a clip as the paper has it" in printed
    status, _, said = vcache("heads dist --count --set layers=12")
    assert status == 1 and "asked of a backbone with 12 blocks" in said


def test_presets_are_counted_with_their_own_settings() -> None:
    for preset in presets_of("dist").values():
        (row,) = describe_count("dist", {}, preset.name)
        assert row["config"]["num_classes"] == preset.num_classes
        assert row["config"]["adaptive_pooling_layers"] == (4 if preset.dataset == "k400" else 2)
        assert 0 < row["computed_macs"] <= row["head_macs"]
