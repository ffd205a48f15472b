"""Official checkpoints of EVL into our head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.heads.evl import EVL
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_evl import (
    check_evl_config,
    evl_state_dict,
    infer_evl_config,
    load_evl_state_dict,
)

CONFIG = EVL.Config(num_classes=3, num_frames=4, width=12, num_heads=2, grid=(2, 3), layers=(-2, -1))


def official_checkpoint() -> dict:
    """As the official training script writes it: keys of distributed training, other states beside the model."""
    torch.manual_seed(5)
    model = {f"module.{name}": torch.randn_like(x) for name, x in EVL(CONFIG).state_dict().items()}
    return {"model": model, "optimizer": {}, "lr_sched": {}, "loss_scaler": {}, "next_step": 50_001}


@pytest.mark.parametrize("wrapping", ["file", "state dict", "without module."])
def test_every_wrapping_of_a_checkpoint_loads_all_parameters(wrapping):
    checkpoint = official_checkpoint()
    plain = {name.removeprefix("module."): x for name, x in checkpoint["model"].items()}
    given = {"file": checkpoint, "state dict": checkpoint["model"], "without module.": plain}[wrapping]
    head = EVL(CONFIG)
    load_evl_state_dict(head, given)
    torch.testing.assert_close(dict(head.state_dict()), plain, rtol=0, atol=0)


def test_what_is_missing_unknown_or_of_another_shape_is_named_and_nothing_is_loaded():
    checkpoint = official_checkpoint()
    model = checkpoint["model"]
    del model["module.proj.2.bias"]
    model["module.backbone.cls_token"] = torch.zeros(12)
    model["module.decoder.temporal_pos_embed.0"] = torch.zeros(8, 12)
    head = EVL(CONFIG)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as error:
        load_evl_state_dict(head, checkpoint)
    for words in (
        "the checkpoint lacks proj.2.bias",
        "the head has no backbone.cls_token",
        "decoder.temporal_pos_embed.0 is (8, 12), the head's is (4, 12)",
        "Set layers, width, qkv_dim, grid, num_frames, num_classes",
    ):
        assert words in str(error.value)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)


def test_long_lists_of_names_are_cut():
    with pytest.raises(CheckpointMismatch, match=r"the checkpoint lacks \S+, \S+, \S+ and \d+ more\. Set"):
        load_evl_state_dict(EVL(CONFIG), {})


@settings(max_examples=25, deadline=None)
@given(
    num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 8),
    num_layers=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sizes=st.fixed_dictionaries(
        {
            "num_classes": st.integers(1, 7),
            "num_frames": st.integers(1, 9),
            "width": st.sampled_from([6, 10, 64, 128]),
            "mlp_factor": st.sampled_from([0.5, 1.0, 4.0]),
            "temporal_conv": st.booleans(),
            "temporal_pos_embed": st.booleans(),
            "temporal_cross_attention": st.booleans(),
        }
    ),
)
def test_the_shapes_give_the_configuration_back_and_what_they_cannot_tell_is_said(
    num_heads: int, head_dim: int, num_layers: int, grid: tuple[int, int], sizes: dict[str, Any]
) -> None:
    """Also with heads, grids and widths that CLIP does not have."""
    own = {
        "num_heads": num_heads,
        "qkv_dim": num_heads * head_dim,
        "grid": grid,
        "layers": tuple(range(-num_layers, 0)),
    }
    config = EVL.Config(**own, **sizes)
    with torch.device("meta"):
        state = EVL(config).state_dict()
    inferred = infer_evl_config(state)
    told = {name: getattr(config, name) for name in inferred.unknown}
    assert ("num_frames" in told) is not config.temporal_pos_embed
    guesses = {"num_heads": config.num_heads, "grid": config.grid}  # a square T-CA may be that of another grid
    rebuilt = EVL.Config(**{**inferred.fields, **told, **guesses})
    assert rebuilt == config
    check_evl_config(rebuilt, state)
    if config.grid[0] == config.grid[1] and config.temporal_cross_attention:
        assert inferred.fields["grid"] == config.grid
    if not config.temporal_cross_attention or "grid" in inferred.unknown:
        assert "grid" not in inferred.fields


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_frames": 5}, "num_frames is set to 5, and its weights say 4"),
        ({"num_classes": 4}, "num_classes is set to 4, and its weights say 3"),
        ({"width": 24}, "width is set to 24, and its weights say 12"),
        ({"qkv_dim": 6}, "qkv_dim is set to 6, and its weights say 12"),
        ({"mlp_factor": 2.0}, "mlp_factor is set to 2.0, and its weights say 4.0"),
        ({"temporal_conv": False}, "temporal_conv is set to False, and its weights say True"),
        ({"layers": (-1,)}, "layers is set to .-1,., and it has 2 decoder layers"),
        ({"grid": (4, 4)}, "grid is set to 4x4, and its T-CA fits 1x8, 2x3, 3x2, 8x1"),
    ],
)
def test_a_configuration_that_the_weights_contradict_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        check_evl_config(replace(CONFIG, **settings), evl_state_dict(official_checkpoint()))


def test_what_weights_do_not_tell_may_be_set_freely() -> None:
    state = evl_state_dict(official_checkpoint())
    free = replace(CONFIG, num_heads=3, grid=(3, 2), layers=(0, 5), qkv_dim=None, mlp_dropout=0.1)
    check_evl_config(free, state)


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ([X], "it holds a list, where a checkpoint is a dict of weights"),
        ({"model_state": {"backbone.base_encoder.dist_net.proj": X, "backbone.base_encoder.visual.proj": X}}, "of DiST"),
        ({"state_dict": {"backbone.transformer.resblocks.0.S_Adapter.D_fc1.bias": X, "cls_head.fc_cls.bias": X}}, "of AIM"),
        ({"state_dict": {"backbone.conv1.weight": X, "cls_head.fc_cls.bias": X}}, "of mmaction"),
        (
            {"model_state_dict": {"module.visual.proj": X, "module.fusion_model.transformer.resblocks.0.ln_1.bias": X}},
            "a checkpoint of Text4Vis, whose image tower was trained along",
        ),
        ({"model_state_dict": {"visual.proj": X}, "fusion_model_state_dict": {"module.x": X}}, "of ActionCLIP"),
        ({"visual.proj": X, "token_embedding.weight": X}, "CLIP's own weights: a backbone"),
        ({"optimizer": {"state": {}}, "lr_sched": {}, "next_step": 3}, "no weights, only lr_sched, next_step, optimizer"),
        ({}, "it holds no weights, only an empty dict"),
        ({"classify.weight": X, "norm.bias": X}, "it holds no EVL decoder .* but classify.weight, norm.bias"),
    ],
)  # fmt: skip
def test_what_another_file_is_is_said(checkpoint: Any, words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        evl_state_dict(checkpoint)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("backbone.blocks.0.norm1.weight", X, "trained with --finetune_backbone, whose image tower was trained along"),
        ("proj.2.bias", torch.zeros(3, dtype=torch.int64), "these are no weights: proj.2.bias"),
        ("proj.2.bias", "a text", "these are no weights: proj.2.bias"),
        ("proj.2.bias", torch.tensor([0.0, torch.nan, 1.0]), "NaN or infinite weights in proj.2.bias"),
    ],
)
def test_an_evl_checkpoint_with_something_wrong_in_it_is_refused(name: str, value: Any, words: str) -> None:
    checkpoint = official_checkpoint()
    checkpoint["model"][f"module.{name}"] = value
    with pytest.raises(CheckpointMismatch, match=words):
        evl_state_dict(checkpoint)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("decoder.cls_token", None, "it is not whole: there is no decoder.cls_token"),
        ("decoder.cls_token", torch.zeros(1, 12), "decoder.cls_token is .1, 12., not 1 axes"),
        ("proj.2.weight", torch.zeros(0, 12), "proj.2.weight is .0, 12., not 2 axes of 1 or more"),
        ("decoder.cross_attention.0.w1", torch.zeros(14, 12), "14 displacements, and no grid of patches has so many"),
    ],
)
def test_no_configuration_is_inferred_from_a_damaged_state(name: str, value: torch.Tensor | None, words: str) -> None:
    state = evl_state_dict(official_checkpoint())
    del state[name]
    with pytest.raises(CheckpointMismatch, match=words):
        infer_evl_config(state if value is None else {**state, name: value})
