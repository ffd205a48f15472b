"""Official checkpoints into our heads."""

import pytest
import torch

from vcache.heads.evl import EVL
from vcache.heads.official import CheckpointMismatch, load_evl_state_dict

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
