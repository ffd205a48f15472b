"""Weight decay and rates by parameter: every parameter once, in the group that its name and shape say."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.parameter_groups import parameter_groups

RECIPE = Recipe(lr=0.02, weight_decay=0.05, steps=9, batch_size=4)


class Toy(nn.Module):
    recipe = replace(RECIPE, no_decay=("*positional_embedding",))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(2)])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))
        self.scale = nn.Parameter(torch.zeros(()))
        self.odd_bias = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def settings(head: nn.Module, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Parameter -> (weight decay, rate multiplier)."""
    names = {id(p): name for name, p in head.named_parameters()}
    groups = parameter_groups(head, recipe)
    pairs = [
        (names[id(p)], (group["weight_decay"], group["lr_multiplier"])) for group in groups for p in group["params"]
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_by_default_all_trainable_parameters_are_one_group_in_their_order() -> None:
    """EVL has no exclusions."""
    head = get_head("evl")(get_head("evl").Config(num_classes=3, width=8, num_heads=2, grid=(2, 3)))
    (group,) = parameter_groups(head, get_head("evl").recipe)
    assert [id(p) for p in group["params"]] == [id(p) for p in head.parameters()]
    assert (group["weight_decay"], group["lr_multiplier"]) == (0.05, 1.0)
    assert "frozen" not in settings(Toy(), RECIPE)


def test_dist_does_not_decay_biases_vectors_and_tokens_by_name() -> None:
    found = settings(Toy(), replace(RECIPE, no_decay_1d=True, no_decay=("*cls_token", "*positional_embedding")))
    assert {name for name, (decay, _) in found.items() if decay} == {"blocks.0.0.weight", "blocks.1.0.weight"}
    assert {name for name, (decay, _) in found.items() if decay == 0} >= {"cls_token", "scale", "odd_bias"}


def test_a_pattern_alone_leaves_biases_decayed() -> None:
    found = settings(Toy(), replace(RECIPE, no_decay=("blocks.*.1.*",)))
    assert [name for name, (decay, _) in found.items() if not decay] == [
        f"blocks.{i}.1.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]


def test_the_first_pattern_that_fits_multiplies_the_rate() -> None:
    found = settings(Toy(), replace(RECIPE, lr_multipliers=(("blocks.0.*", 0.1), ("blocks.*", 10.0))))
    assert found["blocks.0.0.weight"][1] == 0.1
    assert found["blocks.1.1.bias"][1] == 10.0
    assert found["cls_token"][1] == 1.0


@pytest.mark.parametrize(
    "fields",
    [{"no_decay": ("*cls_tokn",)}, {"lr_multipliers": (("*cls_tokn", 0.1),)}, {"no_decay": ("frozen", "*cls_tokn")}],
)
def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest_names(fields) -> None:
    with pytest.raises(
        SettingError, match=r"'(\*cls_tokn|frozen)' in .* fits no trainable parameter\. The nearest are cls_token, "
    ):
        parameter_groups(Toy(), replace(RECIPE, **fields))


def test_a_pattern_of_the_heads_own_recipe_may_fit_nothing() -> None:
    assert settings(Toy(), Toy.recipe) == settings(Toy(), RECIPE)


def test_a_head_without_parameters_is_refused() -> None:
    with pytest.raises(SettingError, match="Identity with these settings has no parameter to train"):
        parameter_groups(nn.Identity(), RECIPE)
