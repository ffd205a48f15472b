"""ST-Adapter's presets and what they cost: the official scripts, and torch's counter on the head."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.main import get_command

from vcache.extract.layers import resolve_layers
from vcache.heads.requirements import ClipFeatures
from vcache.heads.st_adapter import STAdapter
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.pipelines.cli import app
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.counting import count_parameters, describe_count, preset_config
from vcache.pipelines.counting_st_adapter import computed_macs, head_macs
from vcache.pipelines.head_presets import presets_of
from vcache.pipelines.presets import RECIPES, recipe

B16 = CLIP_TOWERS["ViT-B-16-quickgelu"]
PRESETS = presets_of("st-adapter")
Vcache = Callable[..., tuple[int, str, str]]


def config_of(name: str) -> STAdapter.Config:
    config = preset_config("st-adapter", B16, PRESETS[name], {})
    assert isinstance(config, STAdapter.Config)
    return config


def test_presets_are_the_official_models_and_smaller_cuts() -> None:
    assert {name: one.top1 for name, one in PRESETS.items() if one.top1} == {"k400-b16-8f": 82.2, "ssv2-b16-8f": 66.9}
    assert [name for name, one in PRESETS.items() if one.source == "ours"] == [
        "k400-b16-8f-top2", "k400-b16-8f-top6", "ssv2-b16-8f-top6"
    ]  # fmt: skip
    k400, ssv2 = config_of("k400-b16-8f"), config_of("ssv2-b16-8f")
    assert (k400.hidden, k400.num_blocks, k400.before_attention, k400.before_mlp) == (384, 12, False, True)
    assert ssv2 == replace(k400, num_classes=174, before_attention=True)
    rates = {name: one.recipe.get("lr", STAdapter.recipe.lr) for name, one in PRESETS.items()}
    sizes = {name: one.recipe.get("batch_size", STAdapter.recipe.batch_size) for name, one in PRESETS.items()}
    assert all(rate == 1e-3 * sizes[name] / 256 for name, rate in rates.items())  # 3 and 4 GPUs of 64 clips


@pytest.mark.parametrize("name", PRESETS)
def test_the_extract_line_of_a_preset_makes_what_its_head_reads(name: str) -> None:
    preset, config = PRESETS[name], config_of(name)
    _, command, dataset, *words = shlex.split(preset.extract_line)
    asked = get_command(app).commands[command].make_context(command, [dataset, *words]).params  # type: ignore[attr-defined]
    if config.num_blocks == config.num_layers:
        assert asked["layers"] == "stem"
    else:
        assert resolve_layers(asked["layers"], 12) == (11 - config.num_blocks,) and asked["cross_frame"] == "none"
    assert (asked["tsn"], asked["eval_views"]) == ((True, "1x3") if preset.dataset == "ssv2" else (False, "3x1"))
    assert asked["augment"] == "st-adapter" and asked["frames"] == 8


def test_on_something_something_the_augmentation_is_evls_but_for_the_interpolation() -> None:
    assert recipe("st-adapter", "ssv2") == replace(RECIPES["evl"], interpolation="bicubic")
    assert recipe("st-adapter", "k400").flip == 0.5


@pytest.mark.parametrize(("name", "parameters"), [("k400-b16-8f", 7_417_744), ("ssv2-b16-8f", 14_354_094)])
def test_trained_parameters_are_those_of_the_official_models(name: str, parameters: int) -> None:
    """Counted on VisionTransformer of models_adapter.py: adapters and classifier."""
    assert count_parameters("st-adapter", config_of(name)) == parameters


SMALL = {"num_classes": 7, "width": 24, "num_heads": 4, "num_layers": 3, "embed_dim": 10, "grid": (2, 3)}
SETTINGS = st.fixed_dictionaries(  # and no Config: type checks of tuples draw random numbers, which no strategy may
    {
        "num_frames": st.integers(2, 5),
        "blocks": st.integers(1, 3),
        "before_attention": st.booleans(),
        "adapter_width": st.sampled_from([None, 5]),
        "kernel": st.sampled_from([(3, 1, 1), (1, 3, 3), (5, 1, 3)]),
    }
)


def traced_macs(config: STAdapter.Config) -> int:
    """By torch's counter, to which the convolution over time alone is neither a product of matrices nor a convolution."""
    head = STAdapter(config).eval().requires_grad_(False)
    block = BlockShape(width=24, num_heads=4, mlp_dim=96)
    head.set_tail(FrozenTail(TailShape(num_layers=3, num_blocks=3, block=block, embed_dim=10)))
    x = torch.zeros(1, config.num_frames, 7, 24)
    features = ClipFeatures(tokens=dict.fromkeys(head.requires(config).tokens, x), stem=x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        head(features)
    adapters = config.num_blocks * (1 + config.before_attention)
    over_time = adapters * 3 * config.num_frames * 6 * config.hidden if config.kernel == (3, 1, 1) else 0
    return counter.get_total_flops() // 2 + over_time


@settings(deadline=None, max_examples=20)
@given(SETTINGS)
def test_a_forward_pass_above_the_cut_multiplies_what_the_formulas_say(drawn: dict[str, Any]) -> None:
    config = STAdapter.Config(**SMALL, **drawn)
    assert traced_macs(config) == computed_macs(config)


@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_evls_decoder_is_counted_as_a_classifier(decoder_layers: int) -> None:
    config = STAdapter.Config(**SMALL, num_frames=5, blocks=2, classifier="evl", decoder_layers=decoder_layers)
    assert traced_macs(config) == computed_macs(config)


def test_presets_are_listed_and_counted(vcache: Vcache) -> None:
    status, printed, _ = vcache("heads st-adapter --preset ssv2-b16-8f")
    assert status == 0 and "Official models of the paper, top-1 66.9% there" in printed
    status, printed, _ = vcache("heads st-adapter --count", columns=80)
    assert status == 0
    for row in describe_count("st-adapter", {}, None):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['name']} ")]
        assert len(line) <= 80 and f" {row['parameters']:,} " in line and f"{row['total_gmacs']:,.1f}" in line
    status, printed, _ = vcache("heads st-adapter --count --set kernel=3,3,3 --set blocks=1 --json")
    (row,) = json.loads(printed)
    config = replace(config_of("k400-b16-8f"), blocks=1, kernel=(3, 3, 3))
    assert status == 0 and row["head_macs"] == head_macs(config) and row["config"]["kernel"] == [3, 3, 3]
