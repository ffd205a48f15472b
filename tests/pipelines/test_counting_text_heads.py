"""Parameters and multiply-adds of Text4Vis and ActionCLIP: the official modules' counts, and torch's counter on the heads."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.actionclip import ActionCLIP
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines import counting_actionclip, counting_text4vis
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import count, count_parameters, describe_count, preset_config
from vcache.pipelines.head_presets import presets_of
from vcache.pipelines.settings import SettingError

B16, B32, L14, L14_336 = (f"ViT-{name}-quickgelu" for name in ("B-16", "B-32", "L-14", "L-14-336"))
SCALE = 1  # the logit scale, a parameter of both heads
Vcache = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("kinds", "of_base", "of_large"),
    [
        ({"t_trans", "transf"}, 18_953_728, 42_586_368),
        ({"transf_cls"}, 18_959_872, 33_152_256),
        ({"t1d", "conv1d"}, 40_960, 61_440),
        ({"lstm"}, 2_140_672, 4_783_872),
        ({"tap", "meanp"}, 0, 0),
    ],
)
def test_parameters_are_those_of_the_official_modules(kinds: set[str], of_base: int, of_large: int) -> None:
    """Tables of positions that nothing reads are counted, as the official modules have them."""
    for model, parameters in ((B16, of_base), (L14, of_large)):
        for kind in kinds:
            head, name = ("text4vis", "temporal") if kind in ("t_trans", "tap", "t1d") else ("actionclip", "prompt")
            config = preset_config(head, CLIP_TOWERS[model], None, {name: kind})
            assert count_parameters(head, config) == parameters + SCALE


@pytest.mark.parametrize(
    ("model", "parameters", "with_tower"),
    [
        (B16, 86_192_640, 105_146_368),
        (B32, 87_849_216, None),
        (L14, 303_966_208, 346_552_576),
        (L14_336, 304_293_888, None),
    ],
)
def test_with_the_image_tower_they_are_those_of_the_whole_network(
    model: str, parameters: int, with_tower: int | None
) -> None:
    tower = CLIP_TOWERS[model]
    assert tower.num_parameters == parameters
    if with_tower is not None:
        config = preset_config("text4vis", tower, None, {})
        assert count_parameters("text4vis", config) + tower.num_parameters == with_tower + SCALE


@pytest.mark.parametrize("classifier", ["text", "random", "orthogonal"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_classifier_counts_where_it_is_trained(classifier: str, frozen: bool) -> None:
    settings = {"classifier": classifier, "frozen": frozen, "temporal": "tap"}
    config = preset_config("text4vis", CLIP_TOWERS[B16], None, settings)
    assert count_parameters("text4vis", config) == SCALE + (0 if frozen else 400 * 512)


def counted_macs(head: Any, embed_dim: int, num_classes: int, num_templates: int, num_frames: int) -> int:
    """By torch's counter, of the head as it runs; attention and LSTM (in float64) are written out: it knows no fused kernel."""
    torch.manual_seed(0)
    head = head.eval().requires_grad_(False).double()
    if hasattr(head, "set_text"):
        head.set_text(ClassText(torch.randn(num_classes, num_templates, embed_dim), 1.0))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            head(ClipFeatures(embed=torch.randn(1, num_frames, embed_dim)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def last_product(of_a_transformer: bool, num_frames: int) -> int:
    """MACs of the last product, of 24 channels, that are left out as the frames are averaged before it."""
    return (num_frames - 1) * 4 * 24**2 if of_a_transformer else 0


@pytest.mark.parametrize("num_frames", [3, 5])
@pytest.mark.parametrize("temporal", ["t_trans", "tap", "t1d"])
def test_text4vis_multiplies_what_the_formulas_say(temporal: Any, num_frames: int) -> None:
    config = Text4Vis.Config(num_classes=7, embed_dim=24, temporal=temporal)
    macs, saved = counted_macs(Text4Vis(config), 24, 7, 1, num_frames), last_product(temporal == "t_trans", num_frames)
    assert macs == counting_text4vis.computed_macs(config, num_frames)
    assert macs + saved == counting_text4vis.head_macs(config, num_frames)


@pytest.mark.parametrize("num_frames", [3, 5])
@pytest.mark.parametrize("prompt", ["meanp", "conv1d", "lstm", "transf", "transf_cls"])
def test_actionclip_multiplies_what_the_formulas_say(prompt: Any, num_frames: int) -> None:
    config = ActionCLIP.Config(num_classes=7, embed_dim=24, prompt=prompt, num_frames=num_frames)
    macs, saved = counted_macs(ActionCLIP(config), 24, 7, 16, num_frames), last_product(prompt == "transf", num_frames)
    assert macs == counting_actionclip.computed_macs(config)
    assert macs + saved == counting_actionclip.head_macs(config)


def test_a_set_of_templates_in_a_file_is_counted_as_one() -> None:
    config = ActionCLIP.Config(num_classes=7, embed_dim=24, prompt="meanp", templates="of_my_own")
    assert counting_actionclip.head_macs(config) == 24 * 7


def test_text4vis_papers_numbers_are_what_is_left_without_attention() -> None:
    rows = {row["name"]: row for row in describe_count("text4vis", {}, None)}
    assert len(rows) == 10 and all(row["num_views"] == 1 for row in rows.values())
    largest = rows["k400-l14-32f"]
    assert round(largest["profiled_millions"], 1) == largest["paper_millions"] == 230.7
    assert round(largest["profiled_gmacs"]) == largest["paper_gmacs"] == 1662
    assert largest["with_tower"] == 346_552_577 and largest["total_gmacs"] == pytest.approx(2593.8, abs=0.05)
    assert rows["k400-l14-336-32f"]["deviation"] == pytest.approx(-0.026, abs=5e-4)


def test_linear_layers_of_a_tower_are_table_12s_parameters() -> None:
    """Image models of ImageNet with no temporal modelling: 57.3 M with ViT-B/16 and 202.1 M with ViT-L/14."""
    for model, paper in ((B16, 57.3), (L14, 202.1)):
        D, E = CLIP_TOWERS[model].width, CLIP_TOWERS[model].embed_dim
        millions, _ = counting_text4vis._profiled(CLIP_TOWERS[model], 0, 1)
        assert round(millions - 6 * (8 * E**2 + 5 * E) / 1e6, 1) == paper
        assert D > E


def test_actionclips_gmacs_are_the_papers_and_its_parameters_are_the_sum_of_the_parts() -> None:
    rows = {row["name"]: row for row in describe_count("actionclip", {}, None)}
    assert set(rows) == {"k400-b32-8f", "k400-b16-8f", "k400-b16-16f", "k400-b16-32f"}
    assert all(abs(row["deviation"]) < 0.0015 for row in rows.values())
    assert rows["k400-b16-8f"]["with_towers"] == 86_192_640 + 18_953_728 + SCALE + 37_828_608  # the last: "37.8M" there
    assert [round(rows[name]["with_towers"] / 1e6, 2) for name in ("k400-b16-8f", "k400-b32-8f")] == [142.97, 144.63]


@pytest.mark.parametrize("head", ["text4vis", "actionclip"])
def test_every_preset_is_counted_with_its_own_frames_and_views(head: str) -> None:
    for preset in presets_of(head).values():
        tower = CLIP_TOWERS[preset.model]
        (row,) = describe_count(head, {}, preset.name)
        assert row["config"]["num_frames"] == preset.frames
        assert row["config"]["num_classes"] == preset.num_classes
        assert row["backbone_macs"] == preset.frames * tower.macs_per_frame
        assert row["num_views"] == {"1x1": 1, "4x3": 12, "10x3": 30}[preset.eval_views]
        assert 0 < row["computed_macs"] <= row["head_macs"] < row["backbone_macs"]


def test_frames_may_be_set_of_a_head_whose_config_has_none(vcache: Vcache) -> None:
    assert "num_frames" not in {field.name for field in dataclasses.fields(get_head("text4vis").Config)}
    status, printed, _ = vcache("heads text4vis --count --set num_frames=16 --set temporal=t1d --json")
    (row,) = json.loads(printed)
    config = preset_config("text4vis", CLIP_TOWERS[B16], None, {"temporal": "t1d"})
    counted = count("text4vis", config, CLIP_TOWERS[B16], num_views=1, num_frames=16)
    assert status == 0 and row["head_macs"] == counted.head_macs == 16 * 3 * 512 + 512 * 400
    assert (row["config"]["num_frames"], row["backbone_macs"]) == (16, counted.backbone_macs)
    for wrong in ("0", "many"):
        with pytest.raises(SettingError, match="num_frames"):
            describe_count("text4vis", {"num_frames": wrong}, None)


@pytest.mark.parametrize("head", ["text4vis", "actionclip"])
def test_the_table_holds_every_number_whole_at_80_columns(vcache: Vcache, head: str) -> None:
    status, printed, _ = vcache(f"heads {head} --count", columns=80)
    assert status == 0 and "…" not in printed
    for row in describe_count(head, {}, None):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['name']} ")]
        together = row["with_tower" if head == "text4vis" else "with_towers"]
        assert len(line) <= 80
        for number in (f"{row['parameters']:,}", f"{together / 1e6:.2f} M", f"{row['total_gmacs']:,.1f}"):
            assert number in line
        assert row["paper_gmacs"] is None or f" {row['paper_gmacs']:,}" in line
