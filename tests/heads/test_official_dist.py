"""Official checkpoints of DiST into our head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vcache.heads.dist import DiST
from vcache.heads.official import CheckpointMismatch
from vcache.heads.official_dist import check_dist_config, dist_checkpoint, infer_dist_config, load_dist_state_dict

CONFIG = DiST.Config(
    num_classes=3,
    num_frames=4,
    num_layers=2,
    width=12,
    grid=(3, 3),
    patch_size=5,
    embed_dim=7,
    integration_dim=16,
    temporal_dim=6,
    gamma=3,
    adaptive_pooling_layers=2,
)
PREFIX = "backbone.base_encoder."
OLD_NAMES = {
    "input_linears": "input_map_feat_nets",
    "integration2temporal_nets": "s2t_fuse_nets",
    "temporal2integration_nets": "t2s_fuse_nets",
    "integration_nets": "spatial_nets",
    "adapooling_nets": "final_temporal_nets",
}


def state_of(config: DiST.Config = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(x.shape, generator=generator)
        for name, x in DiST(config).state_dict().items()
        if not name.startswith("text.")
    }


def clip_beside(config: DiST.Config = CONFIG) -> dict[str, Tensor]:
    """Enough of CLIP's own weights to tell its blocks and its grid."""
    blocks = {f"visual.transformer.resblocks.{i}.ln_1.bias": torch.zeros(3) for i in range(config.num_layers)}
    positions = torch.zeros(1 + config.grid[0] * config.grid[1], config.width)
    return {**blocks, "visual.positional_embedding": positions, "logit_scale": torch.tensor(4.6)}


def official_file(config: DiST.Config = CONFIG, *, clip: bool = True) -> dict[str, Any]:
    beside = clip_beside(config) if clip else {}
    state = {f"dist_net.{name}": x for name, x in state_of(config).items()} | beside
    return {"model_state": {f"{PREFIX}{name}": x for name, x in state.items()}}


def as_ladder_net(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, x in state.items():
        module, dot, rest = name.partition(".")
        renamed[f"module.{PREFIX}ladder_net.{OLD_NAMES.get(module, module)}{dot}{rest}"] = x
    return renamed


@pytest.mark.parametrize("wrapping", ["file", "state dict", "before it was renamed", "the head alone"])
def test_every_wrapping_of_a_checkpoint_loads_all_parameters_and_no_text(wrapping: str) -> None:
    state = state_of()
    given_as: dict[str, Any] = {
        "file": official_file(),
        "state dict": official_file()["model_state"],
        "before it was renamed": {"model_state": as_ladder_net(state), "epoch": 35},
        "the head alone": state,
    }
    head = DiST(CONFIG)
    checkpoint = dist_checkpoint(given_as[wrapping])
    load_dist_state_dict(head, checkpoint)
    loaded = head.state_dict()
    assert loaded.pop("text.embeddings").isnan().all() and loaded.pop("text.logit_scale").isnan()
    torch.testing.assert_close(dict(loaded), state, rtol=0, atol=0)
    beside = wrapping in ("file", "state dict")
    assert checkpoint.logit_scale == (pytest.approx(4.6) if beside else None)
    assert ("positional_embedding" in checkpoint.visual) is beside


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "num_frames": st.integers(1, 5),
            "gamma": st.integers(1, 4),
            "num_layers": st.integers(1, 3),
            "width": st.sampled_from([6, 10]),
            "patch_size": st.integers(1, 4),
            "embed_dim": st.integers(1, 6),
            "integration_dim": st.sampled_from([4, 8, 128]),
            "temporal_dim": st.integers(1, 7),
            "adaptive_pooling_layers": st.integers(1, 3),
        }
    ),
    side=st.integers(1, 5),
)
def test_the_weights_give_the_configuration_back(sizes: dict[str, int], side: int) -> None:
    config = DiST.Config(num_classes=2, grid=(side, side), **sizes)
    checkpoint = dist_checkpoint(official_file(config))
    inferred = infer_dist_config(checkpoint)
    assert inferred.unknown == {}
    assert DiST.Config(num_classes=2, **inferred.fields) == config
    check_dist_config(config, checkpoint)


def test_without_clip_beside_it_all_blocks_are_read_and_frames_are_224_pixels_wide_unless_set() -> None:
    config = replace(CONFIG, patch_size=14)
    checkpoint = dist_checkpoint(official_file(config, clip=False))
    inferred = infer_dist_config(checkpoint)
    assert (inferred.fields["num_layers"], inferred.fields["grid"]) == (2, (16, 16))
    check_dist_config(replace(config, grid=(2, 7), num_layers=5, layers=(1, 4)), checkpoint)


def test_which_layers_are_read_has_to_be_said_where_clip_has_more() -> None:
    file = official_file()
    file["model_state"][f"{PREFIX}visual.transformer.resblocks.2.ln_1.bias"] = torch.zeros(3)
    checkpoint = dist_checkpoint(file)
    assert infer_dist_config(checkpoint).unknown == {
        "layers": "it reads 2 of the 3 blocks of its CLIP, and no weight says which"
    }
    check_dist_config(replace(CONFIG, num_layers=3, layers=(0, 2)), checkpoint)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 5}, "num_frames is set to 5, and its weights say 4"),
        ({"gamma": 2}, "gamma is set to 2, and its weights say 3"),
        ({"grid": (3, 4)}, "grid is set to 3,4, and its weights say 3,3"),
        ({"num_layers": 4, "layers": (0, 1)}, "num_layers is set to 4, and its weights say 2"),
        ({"layers": (1,)}, "1 layers are set to be read, 1, and it has weights for 2"),
        ({"patch_size": 7}, "patch_size is set to 7, and its weights say 5"),
        ({"embed_dim": 8}, "embed_dim is set to 8, and its weights say 7"),
        ({"adaptive_pooling_layers": 4}, "adaptive_pooling_layers is set to 4, and its weights say 2"),
    ],
)
def test_a_configuration_that_the_weights_contradict_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        check_dist_config(replace(CONFIG, **fields), dist_checkpoint(official_file()))


def test_a_file_whose_weights_are_for_different_numbers_of_frames_is_refused() -> None:
    file = official_file()
    file["model_state"][f"{PREFIX}dist_net.adapooling_nets.1.positional_embedding"] = torch.zeros(1, 8, 16)
    with pytest.raises(
        CheckpointMismatch,
        match=r"different numbers of frames, 4 \(adapooling_nets.0.positional_embedding\) and 8 \(adapooling_nets.1.pos",
    ):
        infer_dist_config(dist_checkpoint(file))


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ([X], "it holds a list, where a checkpoint is a dict of weights"),
        ({"model": {"module.decoder.decoder_layers.0.norm1.bias": X, "module.proj.2.bias": X}}, "it is a checkpoint of EVL"),
        ({"state_dict": {"backbone.transformer.resblocks.0.S_Adapter.D_fc1.bias": X}}, "of AIM"),
        ({"visual.proj": X, "token_embedding.weight": X}, "CLIP's own weights: a backbone"),
        ({"classify.weight": X}, "it holds no DiST .* but classify.weight"),
    ],
)  # fmt: skip
def test_what_another_file_is_is_said(checkpoint: Any, words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        dist_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ln_post.bias", torch.full((16,), torch.nan), "NaN or infinite weights in ln_post.bias"),
        ("ln_post.bias", "a text", "these are no weights: ln_post.bias"),
        ("temporal_stem.weight", None, "it is not whole: there is no temporal_stem.weight"),
        ("temporal_stem.weight", torch.zeros(6, 3, 5), r"temporal_stem.weight is \(6, 3, 5\), not 5 axes"),
        ("ln_post.bias", None, "the checkpoint lacks ln_post.bias"),
        ("ln_post.bias", torch.zeros(17), r"ln_post.bias is \(17,\), the head's is \(16,\)"),
        ("classify.bias", torch.zeros(3), "the head has no classify.bias"),
    ],
)
def test_a_checkpoint_with_something_wrong_in_it_is_refused_and_the_head_stays(
    name: str, value: Any, words: str
) -> None:
    file = official_file()
    file["model_state"].pop(f"{PREFIX}dist_net.{name}", None)
    if value is not None:
        file["model_state"][f"{PREFIX}dist_net.{name}"] = value
    head = DiST(CONFIG)
    before = {key: x.clone() for key, x in head.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=words):
        checkpoint = dist_checkpoint(file)
        infer_dist_config(checkpoint)
        load_dist_state_dict(head, checkpoint)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0, equal_nan=True)
