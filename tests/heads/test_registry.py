"""Finding heads by name, and the small dataclasses of the contract."""

import dataclasses

import pytest
import torch

from vcache.heads.registry import UnknownHead, get_head, list_heads, register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe


def test_heads_are_found_in_the_folder_and_listed_by_name():
    assert list(list_heads()) == sorted(list_heads())
    assert {"evl", "linear"} <= set(list_heads())
    assert get_head("linear").__name__ == "LinearHead"


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(UnknownHead, match=r"unknown head 'elv'. Did you mean 'evl'\? There are: .*evl, .*linear"):
        get_head("elv")
    with pytest.raises(UnknownHead, match=r"unknown head 'zzz'. There are: "):
        get_head("zzz")


def test_a_class_that_lacks_a_part_of_the_contract_is_refused():
    with pytest.raises(TypeError, match=r"head 'half' \(.*Half\) must have requires, recipe, summary"):

        @register_head("half")
        class Half(torch.nn.Module):
            Config = None

    assert "half" not in list_heads()


def test_a_name_can_be_taken_only_once():
    class Other(get_head("linear")):
        pass

    with pytest.raises(ValueError, match="head name 'linear' must be unique; LinearHead has it already"):
        register_head("linear")(Other)


def test_features_know_their_number_of_clips_and_move_together():
    features = ClipFeatures(cls={-1: torch.zeros(3, 2, 4)}, embed=torch.zeros(3, 2, 5))
    moved = features.to("meta")
    assert len(features) == 3
    assert moved.cls[-1].is_meta and moved.embed is not None and moved.embed.is_meta
    with pytest.raises(ValueError, match="hold no feature"):
        len(ClipFeatures())


def test_requirements_name_each_layer_once():
    with pytest.raises(ValueError, match=r"maps \(\(-1, -1\)\) must name each layer once"):
        HeadRequirements(maps=(-1, -1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 5, "epochs": 5}, r"one of steps \(5\) and epochs \(5\) must be set"),
        ({}, r"one of steps \(None\) and epochs \(None\) must be set"),
        ({"epochs": 0}, r"epochs \(0\) must be at least 1"),
        ({"epochs": 1, "lr": 0.0}, r"lr \(0.0\) must be above 0"),
        ({"epochs": 1, "lr": float("nan")}, r"lr \(nan\) must be above 0"),
        ({"epochs": 1, "label_smoothing": 1.0}, r"label_smoothing \(1.0\) must be in \[0, 1\)"),
        ({"epochs": 1, "warmup_steps": 3, "warmup_epochs": 1.5}, r"warmup_steps \(3\) and warmup_epochs \(1.5\) both"),
        ({"epochs": 1, "warmup_epochs": float("inf")}, r"warmup_epochs \(inf\) must be at least 0"),
        ({"epochs": 1, "warmup_start": 1.5}, r"warmup_start \(1.5\) must be in \[0, 1\]"),
        ({"epochs": 1, "mix_switch": -0.5}, r"mix_switch \(-0.5\) must be in \[0, 1\]"),
        ({"epochs": 1, "min_lr": 2.0}, r"min_lr \(2.0\) must be in \[0, lr\], and lr is 1.0"),
        ({"epochs": 1, "schedule_every": 0}, r"schedule_every \(0\) must be at least 1"),
        ({"epochs": 1, "clip_grad": 0.0}, r"clip_grad \(0.0\) must be above 0"),
        ({"epochs": 1, "ema_decay": 1.0}, r"ema_decay \(1.0\) must be between 0 and 1"),
        ({"epochs": 1, "mixup": -0.1}, r"mixup \(-0.1\) must be at least 0"),
        ({"epochs": 1, "cutmix": float("nan")}, r"cutmix \(nan\) must be at least 0"),
        ({"epochs": 1, "betas": (0.9, 1.0)}, r"betas \(\(0.9, 1.0\)\) must be two numbers in \[0, 1\)"),
        (
            {"epochs": 1, "lr_multipliers": (("a.*", 0.0),)},
            r"factor of 'a.\*' in lr_multipliers \(0.0\) must be above 0",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**{"lr": 1.0, "weight_decay": 0.0, "batch_size": 1, **settings})


def test_linear_is_the_mean_of_cls_over_frames_and_a_linear_layer(sizes):
    linear = get_head("linear")
    config = linear.Config(num_classes=sizes.K, width=sizes.D, layer=-2, norm=False)
    head = linear(config)
    cls = torch.randn(sizes.B, sizes.T, sizes.D, generator=torch.Generator().manual_seed(0))
    assert linear.requires(config) == HeadRequirements(cls=(-2,))
    torch.testing.assert_close(head(ClipFeatures(cls={-2: cls})), head.classify(cls.mean(dim=1)))
    normed = linear(dataclasses.replace(config, norm=True))
    expected = normed.classify(torch.nn.functional.layer_norm(cls.mean(dim=1), (sizes.D,)))
    torch.testing.assert_close(normed(ClipFeatures(cls={-2: cls})), expected)
