"""What every registered head must do, run over all of them; a new head is tested by being registered."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe, each_layer

SMALL_DIST = {"integration_dim": 12, "temporal_dim": 8}
"""Of the other forms of DiST, whose sizes do not come from the store."""
HEADS: dict[str, tuple[str, dict[str, object]]] = {name: (name, {}) for name in list_heads()} | {
    f"dist {settings}": ("dist", settings | SMALL_DIST)
    for settings in (
        {"temporal_block": "c3d"},
        {"temporal_block": "tada"},
        {"temporal_block": "joint"},
        {"down_sampling": "avg", "up_sampling": "trilinear"},
        {"down_sampling": "max", "up_sampling": "deconv"},
        {"temporal_encoder": False},
        {"integration_branch": False},
        {"temporal_encoder": False, "integration_branch": False},
        {"integration_to_temporal": False, "temporal_to_integration": False},
        {"layers": (-2, 0)},
    )
}
HEADS |= {
    f"text4vis {settings}": ("text4vis", {"classifier": "coop"} | settings)
    for settings in ({}, {"class_specific_context": True})
}
HEADS |= {"aim stem": ("aim", {"temporal_embedding": "stem", "blocks": 3})}
_ON_TAIL: dict[str, tuple[dict[str, object], ...]] = {
    "aim": (
        {"classifier": "evl"},
        {"classifier": "text"},
        {"train_blocks": True},
        {"checkpointing": True, "drop_path": 0.0},
    ),
    "st-adapter": (
        {"before_attention": True, "classifier": "text"},
        {"kernel": (1, 3, 3)},
        {"kernel": (3, 3, 5), "classifier": "evl"},
    ),
    "finetune-top": (
        {"classifier": "evl", "blocks": 3, "decoder_layers": 2},
        {"classifier": "text"},
        {"checkpointing": True},
        {"train_blocks": False},
    ),
    "tokent1d": ({"init": "identity", "classifier": "text"}, {"blocks": 3}),
    "shift": ({"tokens": "cls", "blocks": 2}, {"classifier": "evl", "train_blocks": False}),
}
HEADS |= {f"{name} {settings}": (name, settings) for name, several in _ON_TAIL.items() for settings in several}


@pytest.fixture(params=HEADS)
def head(request, sizes, class_text, class_prompts, frozen_tail) -> nn.Module:
    """The head as a user would get it from a store of these sizes, with no parameter left at zero."""
    from_store = {
        "num_classes": sizes.K,
        "num_frames": sizes.T,
        "width": sizes.D,
        "num_heads": sizes.H,
        "num_layers": sizes.L,
        "grid": (sizes.h, sizes.w),
        "patch_size": sizes.p,
        "embed_dim": sizes.E,
    }
    name, settings = HEADS[request.param]
    head_class = get_head(name)
    names = {field.name for field in dataclasses.fields(head_class.Config)}
    torch.manual_seed(1)
    of_store = {name: value for name, value in from_store.items() if name in names}
    head = head_class(head_class.Config(**(of_store | settings)))
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    if head.requires(head.config).tail:
        head.set_tail(frozen_tail)
    if head.requires(head.config).text:
        head.set_text(class_text)
    if head.requires(head.config).prompts:
        head.set_prompts(class_prompts)
    return head


@pytest.fixture
def features(head, make_features) -> ClipFeatures:
    """Exactly what the head asks for and nothing else."""
    asked: HeadRequirements = head.requires(head.config)
    everything = make_features({*asked.tokens, *asked.cls, *asked.maps})
    return ClipFeatures(
        tokens={layer: everything.tokens[layer] for layer in asked.tokens},
        cls={layer: everything.cls[layer] for layer in asked.cls},
        maps={layer: everything.maps[layer] for layer in asked.maps},
        stem=everything.stem if asked.stem else None,
        embed=everything.embed if asked.embed else None,
        pixels=everything.pixels[:, :: 2 // asked.pixels] if asked.pixels else None,
    )


def changed(features: ClipFeatures, change: Callable[[torch.Tensor], torch.Tensor]) -> ClipFeatures:
    return ClipFeatures(
        tokens=each_layer(features.tokens, change),
        cls={layer: change(x) for layer, x in features.cls.items()},
        maps={layer: change(x) for layer, x in features.maps.items()},
        stem=None if features.stem is None else change(features.stem),
        embed=None if features.embed is None else change(features.embed),
        pixels=None if features.pixels is None else change(features.pixels),
    )


def tensors_of(features: ClipFeatures) -> dict[str, torch.Tensor]:
    named = {f"{kind}/{layer}": x for kind in ("tokens", "cls", "maps") for layer, x in getattr(features, kind).items()}
    rest = {"stem": features.stem, "embed": features.embed, "pixels": features.pixels}
    return named | {name: x for name, x in rest.items() if x is not None}


def test_forward_and_backward_leave_the_cached_features_untouched(head, features):  # EVL upstream adds in place
    before = {name: x.clone() for name, x in tensors_of(features).items()}
    head(features).sum().backward()
    torch.testing.assert_close(tensors_of(features), before, rtol=0, atol=0)


def test_forward_gives_one_row_of_logits_per_clip(head, features, sizes):
    assert head(features).shape == (sizes.B, sizes.K)


def test_clips_do_not_mix(head, features, sizes):
    head.eval()
    last = changed(features, lambda x: x[-1:])
    torch.testing.assert_close(head(last), head(features)[-1:], rtol=1e-5, atol=1e-5)


def test_an_embedding_classified_is_what_forward_gives(head, features, sizes):
    assert hasattr(head, "embed") == hasattr(head, "classify_embedding")
    if not hasattr(head, "embed"):
        pytest.skip("the head names no embedding")
    head.eval()
    embedding = head.embed(features)
    assert embedding.ndim == 2 and len(embedding) == sizes.B
    torch.testing.assert_close(head.classify_embedding(embedding), head(features), rtol=0, atol=0)


def test_inner_features_are_those_of_every_layer_that_is_read_without_cls(head, features, sizes):
    if not hasattr(head, "inner_features"):
        pytest.skip("the head shows nothing of what it makes")
    head.eval()
    inner, pixels = head.inner_features(features), head.requires(head.config).pixels
    assert [one.layer for one in inner] == list(features.tokens)
    for one in inner:
        torch.testing.assert_close(one.spatial, features.tokens[one.layer][:, :, 1:], rtol=0, atol=0)
        assert one.integrated is None or one.integrated.shape[:3] == (sizes.B, sizes.T, sizes.P)
        assert (one.temporal is None) == (not pixels)
        assert one.temporal is None or one.temporal.shape[:3] == (sizes.B, sizes.T * pixels, sizes.P)
        assert not any(x.requires_grad for x in (one.integrated, one.temporal) if x is not None)


def test_a_paper_averages_views_in_a_way_that_there_is(head):
    ways = ("softmax", "logits", *(("embeddings",) if hasattr(head, "embed") else ()))
    assert getattr(head, "view_average", "softmax") in ways


def test_gradients_reach_every_trainable_parameter(head, features):
    if hasattr(head, "training_loss"):
        classes = torch.arange(len(features))
        head.training_loss(features, classes, lambda own: own)[0].sum().backward()
    else:
        head(features).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.requires_grad and p.grad is None] == []


def test_evaluation_is_deterministic(head, features):
    head.eval()
    torch.testing.assert_close(head(features), head(features), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features_are_cast_to_the_parameters(head, features, dtype):
    def cast(to: torch.dtype) -> ClipFeatures:
        return changed(features, lambda x: x.to(dtype).to(to) if x.is_floating_point() else x)

    def run(half_or_single: ClipFeatures) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = head(half_or_single)
        # A scale that is trained is not what a head is evaluated with.
        trained = [p for p in head.parameters() if p.requires_grad and p.ndim]
        return logits, list(torch.autograd.grad(logits.square().sum(), trained))

    head.eval()
    got = run(cast(dtype))
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, run(cast(torch.float32)), rtol=1e-4, atol=1e-4)


def test_config_is_frozen_keyword_only_and_kept(head):
    config = head.config
    assert isinstance(config, type(head).Config)
    assert all(field.kw_only for field in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 1


def test_says_what_it_is_and_how_it_is_trained(head):
    assert isinstance(type(head).recipe, Recipe)
    assert type(head).summary and "\n" not in type(head).summary
    assert type(head).__doc__
