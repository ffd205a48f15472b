"""Official checkpoints of AIM into our head."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vcache.heads.aim import AIM
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_aim import aim_checkpoint, check_aim_config, infer_aim_config, load_aim_checkpoint

X = torch.zeros(3)


def official_state(
    *,
    width: int = 64,
    layers: int = 2,
    frames: int = 3,
    side: int = 2,
    patch: int = 5,
    hidden: int = 16,
    two: bool = False,
) -> dict[str, Tensor]:
    """The names and shapes of a file, drawn at random."""
    adapter = {
        "D_fc1.weight": (hidden, width),
        "D_fc1.bias": (hidden,),
        "D_fc2.weight": (width, hidden),
        "D_fc2.bias": (width,),
    }
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    norm = {"weight": (width,), "bias": (width,)}
    block |= {f"{name}.{part}": shape for name in ("ln_1", "ln_2") for part, shape in norm.items()}
    names = ["T_Adapter", "S_Adapter", "MLP_Adapter", *(["T_Adapter_in"] if two else [])]
    block |= {f"{name}.{part}": shape for name in names for part, shape in adapter.items()}
    backbone: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (1 + side**2, width),
        "temporal_embedding": (1, frames, width),
        "conv1.weight": (width, 3, patch, patch),
        **{f"{name}.{part}": shape for name in ("ln_pre", "ln_post") for part, shape in norm.items()},
        **{f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
    }
    shapes = {f"backbone.{name}": shape for name, shape in backbone.items()}
    shapes |= {"cls_head.fc_cls.weight": (7, width), "cls_head.fc_cls.bias": (7,)}
    generator = torch.Generator().manual_seed(4)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loaded(state: dict[str, Tensor], **fields: Any) -> AIM:
    checkpoint = aim_checkpoint({"meta": {"epoch": 30}, "state_dict": state, "optimizer": {"state": {}}})
    head = AIM(AIM.Config(**{**infer_aim_config(checkpoint), **fields}))
    load_aim_checkpoint(head, checkpoint)
    return head


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    frames=st.integers(1, 9),
    side=st.integers(1, 4),
    patch=st.integers(1, 6),
    hidden=st.integers(1, 70),
    two=st.booleans(),
    module=st.sampled_from(["", "module."]),
)
def test_the_config_is_read_off_the_shapes_and_every_weight_is_taken(
    layers: int, frames: int, side: int, patch: int, hidden: int, two: bool, module: str
) -> None:
    state = official_state(layers=layers, frames=frames, side=side, patch=patch, hidden=hidden, two=two)
    head = loaded({f"{module}{name}": x for name, x in state.items()})
    config = head.config
    assert (config.num_layers, config.num_blocks, config.num_frames, config.num_classes) == (layers, layers, frames, 7)
    assert (config.grid, config.patch_size, config.temporal_adapters) == ((side, side), patch, 1 + two)
    assert int(config.bottleneck * 64) == hidden
    assert config.temporal_embedding == "stem" and head.requires(config).pixels == 1
    taken = [*head.state_dict().values(), *head.tail.state_dict().values()]
    # ln_post is in both: it is trained, and the tail's last.
    assert sum(x.numel() for x in taken) == sum(x.numel() for x in state.values()) + 2 * 64
    last = f"backbone.transformer.resblocks.{layers - 1}"
    for ours, theirs in (
        (head.adapters[str(layers - 1)].T_Adapter.D_fc2.weight, f"{last}.T_Adapter.D_fc2.weight"),
        (head.temporal_embedding, "backbone.temporal_embedding"),
        (head.ln_post.bias, "backbone.ln_post.bias"),
        (head.classifier.fc_cls.weight, "cls_head.fc_cls.weight"),
        (head.tail.blocks[str(layers - 1)].mlp.c_proj.weight, f"{last}.mlp.c_proj.weight"),
        (head.tail.stem.conv1.weight, "backbone.conv1.weight"),
    ):
        torch.testing.assert_close(ours, state[theirs], rtol=0, atol=0)


@pytest.mark.parametrize(("hidden", "width"), [(15, 26), (13, 23), (31, 39)])
def test_a_bottleneck_whose_quotient_rounds_down_is_told_with_all_its_channels(hidden: int, width: int) -> None:
    assert int(hidden / width * width) == hidden - 1
    head = loaded(official_state(width=width, layers=1, hidden=hidden))
    assert head.adapters["0"].S_Adapter.D_fc1.weight.shape == (hidden, width)


def test_the_frozen_weights_may_be_kept_in_half_precision() -> None:
    head = loaded(official_state(), frozen_dtype="float16")
    assert head.tail.blocks["1"].attn.in_proj_weight.dtype == torch.float16
    assert head.tail.blocks["1"].ln_1.weight.dtype == head.adapters["1"].S_Adapter.D_fc1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"backbone.temporal_embedding": None}, "it is not whole: there is no temporal_embedding"),
        ({"backbone.conv1.weight": None}, "it is not whole: there is no stem.conv1.weight"),
        ({"backbone.transformer.resblocks.1.ln_2.bias": None}, r"the checkpoint lacks blocks\.1\.ln_2\.bias"),
        ({"backbone.transformer.resblocks.0.MLP_Adapter.D_fc1.bias": None}, r"lacks adapters\.0\.MLP_Adapter"),
        ({"cls_head.fc_cls.bias": torch.zeros(6)}, r"classifier\.fc_cls\.bias is \(6,\), the head's is \(7,\)"),
        ({"backbone.time_embedding": X}, "the official AIM has no backbone.time_embedding"),
        ({"backbone.positional_embedding": torch.zeros(4, 64)}, "is for 3 patches, no square"),
        ({"backbone.transformer.resblocks.3.ln_1.bias": X}, "there is no backbone.transformer.resblocks.2"),
        ({"backbone.ln_post.bias": torch.full((64,), torch.nan)}, "NaN or infinite weights in backbone.ln_post.bias"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(changed: dict[str, Tensor | None], words: str) -> None:
    state = {**official_state(), **changed}
    with pytest.raises(CheckpointMismatch, match=words):
        loaded({name: x for name, x in state.items() if x is not None})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"backbone.conv1.weight": X, "cls_head.fc_cls.weight": X}}, "it is a checkpoint of mmaction"),
        ({"model_state": {"backbone.dist_net.x": X}}, "it is a checkpoint of DiST"),
        ({"visual.conv1.weight": X}, "CLIP's own weights: a backbone, not a head"),
        ({"layer.weight": X}, r"it holds no AIM \(backbone.\*_Adapter.\*\), but layer.weight"),
        (3, "it holds a int"),
    ],
)
def test_another_file_is_named(content: object, words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        aim_checkpoint(content)


@pytest.mark.parametrize(("field", "value"), [("num_frames", 4), ("temporal_adapters", 2), ("bottleneck", 0.5)])
def test_a_setting_that_the_weights_contradict_is_refused(field: str, value: float) -> None:
    checkpoint = aim_checkpoint(official_state())
    config = AIM.Config(**{**infer_aim_config(checkpoint), field: value})
    with pytest.raises(CheckpointMismatch, match=f"{field} is set to {value}, and its weights say "):
        check_aim_config(config, checkpoint)
