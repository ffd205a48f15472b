"""Parameters and multiply-adds: the paper's numbers, and counts of the modules themselves."""

import json

import open_clip
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.evl import EVL
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import count, count_parameters, describe_count
from vcache.pipelines.counting_evl import computed_macs, head_macs

NO_TCA = {"temporal_cross_attention": False}
B16, L14, L14_336 = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"


def configuration(model: str, **fields: object) -> EVL.Config:
    tower = CLIP_TOWERS[model]
    sizes = {"width": tower.width, "num_heads": tower.num_heads, "grid": tower.grid, "num_classes": 400}
    return EVL.Config(**{**sizes, **fields})


@pytest.mark.parametrize(
    ("model", "settings", "parameters", "gmacs", "paper"),
    [
        (B16, {"layers": (-1,), **NO_TCA}, 7_408_528, 427.1, None),
        (B16, NO_TCA, 28_704_400, 444.0, 444),
        (B16, {"num_frames": 32, **NO_TCA}, 28_778_128, 1775.7, 1777),
        (B16, {}, 33_183_376, 453.9, 454),
        (B16, {"layers": (-1,)}, 8_528_272, 429.6, None),
        (B16, {"num_frames": 16}, 33_207_952, 909.1, None),
        (B16, {"num_frames": 32}, 33_257_104, 1819.6, None),
        (B16, {"layers": tuple(range(12)), "num_classes": 174}, 98_756_526, 518.6, None),
        (L14, {}, 58_727_824, 2018.8, 2022),
        (L14, {"num_frames": 32}, 58_826_128, 8084.6, 8088),
        (L14, NO_TCA, 50_855_312, 1996.3, None),
        (L14, {"layers": tuple(range(24)), "num_classes": 174}, 350_069_934, 2391.5, 2411),
        (L14_336, {"num_frames": 32}, 69_049_744, 19_303, None),
        (L14_336, {"num_frames": 32, **NO_TCA}, 50_953_616, 18_798, None),
    ],
)
def test_counts_are_those_of_the_official_code_and_within_a_percent_of_the_paper(
    model: str, settings: dict[str, object], parameters: int, gmacs: float, paper: float | None
) -> None:
    """`gmacs` are of the official modules with three views, by torch's own counter; the paper's where it can be reached."""
    counted = count("evl", configuration(model, **settings), CLIP_TOWERS[model], num_views=3)
    assert counted.parameters == parameters
    assert counted.total_gmacs == pytest.approx(gmacs, rel=2e-4)
    assert paper is None or counted.total_gmacs == pytest.approx(paper, rel=0.01)


@pytest.mark.parametrize("model", CLIP_TOWERS)
def test_towers_are_open_clips_and_count_as_its_own_module_does(model: str) -> None:
    config, tower = open_clip.get_model_config(model), CLIP_TOWERS[model]
    sizes = (tower.num_layers, tower.width, tower.patch_size, tower.image_size)
    vision = config["vision_cfg"]
    assert sizes == tuple(vision[name] for name in ("layers", "width", "patch_size", "image_size"))
    assert tower.embed_dim == config["embed_dim"] and tower.num_heads == tower.width // vision.get("head_width", 64)
    with torch.device("meta"), torch.no_grad():
        # Its blocks are all alike: two of them tell what one more costs.
        visual = open_clip.model.CLIP(config["embed_dim"], {**vision, "layers": 2}, config["text_cfg"]).visual
        with FlopCounterMode(display=False) as counter:
            visual(torch.empty(1, 3, tower.image_size, tower.image_size))
    blocks = type(tower)(**{**vars(tower), "num_layers": 2})
    assert counter.get_total_flops() == 2 * blocks.macs_per_frame


@pytest.mark.parametrize(
    "settings", [{}, NO_TCA, {"layers": (-2, -1, -2, -1)}, {"pooling": "temporal_mean", "qkv_dim": 384}]
)
def test_the_papers_formulas_count_what_the_plain_formulation_multiplies(settings: dict[str, object]) -> None:
    """By torch's counter on the meta device; the maps, which a head is given, come on top."""
    config = configuration(B16, **settings, formulation="plain")
    tokens, maps = torch.empty(1, 8, 197, 768, device="meta"), torch.empty(1, 7, 2, 196, 196, device="meta")
    asked = EVL.requires(config)
    features = ClipFeatures(tokens=dict.fromkeys(asked.tokens, tokens), maps=dict.fromkeys(asked.maps, maps))
    with torch.device("meta"):
        head = EVL(config).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(features)
    of_maps = len(config.layers) * 14 * 196 * 196 * 768 if config.temporal_cross_attention else 0
    assert counter.get_total_flops() == 2 * (head_macs(config) - of_maps)


SMALL = {"num_classes": 7, "num_frames": 4, "width": 24, "num_heads": 6, "grid": (3, 5), "layers": (-2, -1)}


@pytest.mark.parametrize("pooling", ["none", "spatial_mean", "temporal_mean", "cls"])
@pytest.mark.parametrize("qkv_dim", [None, 12])
def test_the_papers_formulas_count_what_its_modules_multiply(pooling: str, qkv_dim: int | None) -> None:
    config = EVL.Config(
        **SMALL, pooling=pooling, qkv_dim=qkv_dim, mlp_factor=2.5, temporal_cross_attention=pooling != "cls"
    )
    assert head_macs(config) == 2 * macs_of_a_plain_layer(config) + 24 * 7


def macs_of_a_plain_layer(config: EVL.Config) -> int:
    """By torch's counter, on modules that project every key and value and weigh a vector per pair of patches."""
    T, D, Q, H, P = config.num_frames, config.width, config.attention_dim, config.num_heads, 15
    N = 1 if config.pooling == "cls" else 1 + P
    keys = {"none": T * N, "cls": T, "spatial_mean": T, "temporal_mean": N}[config.pooling]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        nn.Conv1d(D, D, 3, padding=1, groups=D).requires_grad_(False)(torch.empty(N, D, T))
        if config.temporal_cross_attention:
            for _ in range(2 * (T - 1)):
                torch.empty(H, P, D // H) @ torch.empty(H, D // H, P)
                torch.einsum("qk,qkd->qd", torch.empty(P, P), torch.empty(P, P, D))
        for linear, rows in (((D, Q), 1), ((D, Q), keys), ((D, Q), keys), ((Q, D), 1), ((D, 60), 1), ((60, D), 1)):
            nn.Linear(*linear).requires_grad_(False)(torch.empty(rows, linear[0]))
        torch.empty(H, 1, Q // H) @ torch.empty(H, Q // H, keys)
        torch.empty(H, 1, keys) @ torch.empty(H, keys, Q // H)
    return counter.get_total_flops() // 2


def test_one_traced_layer_counts_for_all_of_them() -> None:
    config = EVL.Config(**{**SMALL, "layers": (-2, -1, -2)}, temporal_cross_attention=False)
    features = ClipFeatures(tokens={-1: torch.rand(1, 4, 16, 24), -2: torch.rand(1, 4, 16, 24)})
    head = EVL(config).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(features)
    assert counter.get_total_flops() == 2 * computed_macs(config)


def test_what_is_computed_is_a_fraction_of_the_papers_formulation() -> None:
    assert head_macs(configuration(B16, **NO_TCA)) > 50 * computed_macs(configuration(B16, **NO_TCA))
    assert head_macs(configuration(B16)) > 2.5 * computed_macs(configuration(B16))


def test_rows_of_the_paper_are_counted_with_and_without_cross_attention() -> None:
    rows = {row["name"]: row for row in describe_count("evl", {}, None)}
    b16, l14 = rows["k400-b16-8f"], rows["k400-l14-8f"]
    assert (b16["without_tca"]["parameters"], b16["with_tca"]["parameters"]) == (28_704_400, 33_183_376)
    assert (l14["without_tca"]["parameters"], l14["parameters"]) == (50_855_312, 58_727_824)
    off = {name: row["deviation"] for name, row in rows.items() if row["deviation"] and abs(row["deviation"]) > 0.01}
    assert off == {  # as the remarks under the table say
        "k400-l14-336-32f": pytest.approx(0.061, abs=5e-4),
        "ssv2-b16-8f": pytest.approx(0.013, abs=5e-4),
        "ssv2-b16-16f": pytest.approx(0.018, abs=5e-4),
        "ssv2-b16-32f": pytest.approx(0.019, abs=5e-4),
    }
    assert all(
        round(row["parameters"] / 1e6, 2) == row["paper_millions"] for row in rows.values() if row["paper_millions"]
    )


def test_the_table_holds_every_number_whole_at_80_columns(vcache) -> None:
    status, printed, _ = vcache("heads evl --count", columns=80)
    assert status == 0 and "…" not in printed
    for row in describe_count("evl", {}, None):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['name']} ")]
        assert f"{row['parameters']:,}" in line and f"{row['total_gmacs']:,.1f}" in line
        assert f"{row['with_tca']['parameters']:,}" in printed and f"{row['without_tca']['parameters']:,}" in printed
        assert row["paper_gmacs"] is None or f" {row['paper_gmacs']:,} " in line
    assert "the backbone alone takes 18,332" in printed


def test_one_configuration_is_counted_on_the_command_line(vcache) -> None:
    status, printed, _ = vcache("heads evl --count --set layers=-2: --set qkv_dim=512 --set num_heads=8 --json")
    (row,) = json.loads(printed)
    config = configuration(B16, layers=(10, 11), qkv_dim=512, num_heads=8)
    assert (
        status == 0 and row["parameters"] == count_parameters("evl", config) and row["head_macs"] == head_macs(config)
    )
    status, printed, _ = vcache("heads evl --count --preset ssv2-l14-8f --set num_frames=16 --json")
    (row,) = json.loads(printed)
    assert (row["num_views"], row["backbone_macs"]) == (3, 16 * CLIP_TOWERS[L14].macs_per_frame)
    assert row["config"]["layers"] == list(range(-24, 0)) and row["config"]["num_classes"] == 174
    status, printed, _ = vcache("heads evl --count --preset ssv2-l14-8f")
    assert status == 0 and "350,069,934" in printed and "2,391.6 GMACs, views: 3" in printed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("heads linear --count", "--count knows actionclip, aim, dist, evl, st-adapter, text4vis, and not 'linear'"),
        ("heads evl --count --set model=ViT-B-15", "--set model=ViT-B-15: there are ViT-B-32-quickgelu, "),
        ("heads evl --count --set layers=-13", "layers -13: asked of a backbone with 12 blocks (0-11, or -12 to -1)"),
        (
            "heads evl --count --preset ssv2-b16-8f --set layers=-1,12,-1",
            "layers 12: asked of a backbone with 12 blocks",
        ),
        ("heads evl --count --set qkv_dim=500", "qkv_dim (500) must be a positive multiple of num_heads (12)"),
        ("heads evl --count --preset k400-b16-8", "Did you mean 'k400-b16-8f'?"),
    ],
)
def test_what_cannot_be_counted_is_refused(vcache, line: str, words: str) -> None:
    status, _, said = vcache(line)
    assert status == 1 and words in said
