"""A step goes on from its saved state bit for bit, with all that a recipe can switch on."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.step import TrainingStep

CPU = torch.device("cpu")
B, T, N, D, K = 5, 3, 7, 16, 4  # small, and all different
NUM_STEPS = 8
RECIPE = Recipe(
    lr=0.02,
    weight_decay=0.05,
    steps=NUM_STEPS,
    batch_size=B,
    warmup_epochs=0.5,
    label_smoothing=0.1,
    no_decay_1d=True,
    lr_multipliers=(("*weight", 0.5),),
    clip_grad=0.5,
    ema_decay=0.9,
    mixup=0.8,
)
RECIPES = {"linear": RECIPE, "evl": replace(RECIPE, cutmix=1.0)}
SIZES = {
    "linear": {"width": D},
    "evl": {"width": D, "num_heads": 4, "num_frames": T, "grid": (2, 3), "layers": (-1,), "mlp_dropout": 0.0},
}


def make_step(name: str, precision: str, *, seed: int, **fields: object) -> TrainingStep:
    torch.manual_seed(seed)
    head = get_head(name)(get_head(name).Config(num_classes=K, **SIZES[name])).train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    step = TrainingStep(
        head,
        replace(RECIPES[name], **fields),  # type: ignore[arg-type]
        MixedPrecision(name=precision, device=CPU),
        num_steps=NUM_STEPS,
        steps_per_epoch=4,
        generator=torch.Generator().manual_seed(seed),
    )
    if precision == "float16":  # grows every third step
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)
    return step


def take(step: TrainingStep, first: int, stop: int) -> None:
    for i in range(first, stop):
        generator = torch.Generator().manual_seed(i)
        features = ClipFeatures(
            tokens={-1: torch.randn(B, T, N, D, generator=generator)},
            cls={-1: torch.randn(B, T, D, generator=generator)},
            maps={-1: torch.rand(B, T - 1, 2, N - 1, N - 1, generator=generator).softmax(dim=-1)},
        )
        step(features, torch.randint(0, K, (B,), generator=generator), i)


def everything(step: TrainingStep) -> dict[str, torch.Tensor]:
    averaged = step.averaged() or {}
    named = {f"head/{name}": x for name, x in step.head.state_dict().items()} | step.state()
    return named | {f"averaged/{name}": x for name, x in averaged.items()}


def reloaded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save({name: x.contiguous() for name, x in state.items()}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_training_that_goes_on_from_safetensors_ends_in_the_same_bits(name: str, precision: str) -> None:
    whole = make_step(name, precision, seed=1)
    take(whole, 0, NUM_STEPS)
    first = make_step(name, precision, seed=1)
    take(first, 0, 4)
    weights, state = reloaded(first.head.state_dict()), reloaded(first.state())
    resumed = make_step(name, precision, seed=2)  # other weights and draws
    take(resumed, 0, 1)
    resumed.head.load_state_dict(weights)
    resumed.load_state(state)
    take(resumed, 4, NUM_STEPS)
    expected, found = everything(whole), everything(resumed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert (precision == "float16") == ("scaler/scale" in found)
    if precision == "float16":
        assert found["scaler/scale"] == 2.0**8


def test_a_state_that_is_loaded_is_copied() -> None:
    first = make_step("linear", "float32", seed=1)
    take(first, 0, 2)
    state = reloaded(first.state())
    before = {name: x.clone() for name, x in state.items()}
    resumed = make_step("linear", "float32", seed=1)
    resumed.load_state(state)
    take(resumed, 2, 4)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_state_before_the_first_step_is_one_too() -> None:
    fresh, other = make_step("evl", "float32", seed=1), make_step("evl", "float32", seed=1)
    take(other, 0, 2)
    other.head.load_state_dict(fresh.head.state_dict())
    other.load_state(fresh.state())
    for step in (fresh, other):
        take(step, 0, 2)
    expected, found = everything(fresh), everything(other)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_state_of_another_head_or_recipe_is_refused() -> None:
    evl, linear = make_step("evl", "float32", seed=1), make_step("linear", "float32", seed=1)
    for step in (evl, linear):
        take(step, 0, 1)
    with pytest.raises(ValueError, match=r"has step/norm.weight \(\), and the head has none of this name"):
        evl.load_state(linear.state())
    wider = {name: torch.cat([x, x]) if x.ndim == 2 else x for name, x in linear.state().items()}
    with pytest.raises(ValueError, match=r"classify.weight \(8, 16\), and the head has it as \(4, 16\)"):
        linear.load_state(wider)
    without = make_step("linear", "float32", seed=1, ema_decay=None)
    with pytest.raises(KeyError, match="num_updates"):
        linear.load_state(without.state())


def test_without_averaging_there_is_nothing_averaged() -> None:
    step = make_step("linear", "float32", seed=1, ema_decay=None)
    assert step.averaged() is None
    assert not any(name.startswith(("average", "scaler")) for name in step.state())
