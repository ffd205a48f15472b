"""The learning rate of every step, against torch's schedulers and against the official schedules written out."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from vcache.heads.requirements import Recipe
from vcache.pipelines.training.schedule import learning_rate

LR = 0.3


def make_recipe(**fields) -> Recipe:
    return Recipe(**{"lr": LR, "weight_decay": 0.0, "batch_size": 1, "steps": 1, **fields})


def rates(recipe: Recipe, num_steps: int, steps_per_epoch: int = 7) -> list[float]:
    return [learning_rate(recipe, step, num_steps, steps_per_epoch) for step in range(num_steps)]


def of_torch(num_steps: int, warmup: int = 0, start: float = 1.0, min_lr: float = 0.0) -> list[float]:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler: LRScheduler = CosineAnnealingLR(optimiser, num_steps - warmup, eta_min=min_lr)
    if warmup:
        linear = LinearLR(optimiser, start_factor=start, total_iters=warmup)
        scheduler = SequentialLR(optimiser, [linear, scheduler], milestones=[warmup])
    found = []
    for _ in range(num_steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def test_the_schedule_is_half_a_cosine_after_the_warm_up() -> None:
    found = rates(make_recipe(lr=2.0, warmup_steps=4), 10)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx([1 + math.cos(math.pi * i / 6) for i in range(6)])


@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_without_a_warm_up_it_is_torchs_cosine(min_lr: float) -> None:
    assert rates(make_recipe(min_lr=min_lr), 23) == pytest.approx(of_torch(23, min_lr=min_lr))


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR of itself
@pytest.mark.parametrize("start", [0.001, 0.25])
def test_with_a_start_it_is_torchs_linear_warm_up_and_then_its_cosine(start: float) -> None:
    recipe = make_recipe(warmup_steps=5, warmup_start=start, min_lr=0.02)
    assert rates(recipe, 23) == pytest.approx(of_torch(23, warmup=5, start=start, min_lr=0.02))


def test_a_warm_up_in_epochs_is_one_in_steps_also_where_its_end_is_within_an_epoch() -> None:
    assert rates(make_recipe(warmup_epochs=2.0), 30, 4) == rates(make_recipe(warmup_steps=8), 30, 4)
    found = rates(make_recipe(warmup_epochs=2.5, schedule="constant"), 30, 3)  # 7.5 steps
    assert found[:9] == pytest.approx([LR * (i + 1) / 7.5 for i in range(7)] + [LR, LR])


def test_constant_is_the_rate_throughout() -> None:
    assert rates(make_recipe(schedule="constant"), 5) == [LR] * 5


@given(
    num_steps=st.integers(1, 80),
    warmup=st.integers(0, 90),
    start=st.none() | st.floats(0, 1),
    min_share=st.floats(0, 1),
    every=st.integers(1, 12),
    steps_per_epoch=st.integers(1, 30),
    schedule=st.sampled_from(["cosine", "whole_cosine", "constant"]),
)
def test_it_rises_then_falls_within_its_bounds(num_steps, warmup, start, min_share, every, steps_per_epoch, schedule):
    recipe = make_recipe(
        warmup_steps=warmup,
        warmup_start=start,
        min_lr=LR * min_share,
        schedule_every=every,
        schedule=schedule,
    )
    found = rates(recipe, num_steps, steps_per_epoch)
    assert all(0 <= rate <= LR * (1 + 1e-9) for rate in found)
    settled = found[warmup + every - 1 :]  # set after the warm-up
    assert all(rate >= LR * min_share * (1 - 1e-9) for rate in settled)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(settled))
    if schedule == "constant":
        assert settled == [LR] * len(settled)


def test_dist_warms_up_six_epochs_towards_a_cosine_that_began_at_step_0() -> None:
    """BASE_LR 3.2e-5 from WARMUP_START_LR 8e-8, times NEW_NET_LRMULT 10; lr_policy.py of the TAdaConv code that it builds on."""

    def official(epoch: float) -> float:
        def cosine(at: float) -> float:
            return 3.2e-5 * (math.cos(math.pi * at / 36) + 1.0) * 0.5

        rate = cosine(epoch)
        if epoch < 6:
            rate = epoch * (cosine(6) - 8e-8) / 6 + 8e-8
        return 10 * rate

    recipe = make_recipe(lr=3.2e-4, schedule="whole_cosine", warmup_epochs=6.0, warmup_start=0.0025)
    assert rates(recipe, 36 * 11, 11) == pytest.approx([official(step / 11) for step in range(36 * 11)])


@pytest.mark.parametrize("num_epochs", [30, 50], ids=["text4vis", "actionclip"])
def test_text4vis_and_actionclip_set_a_rate_every_ten_iterations(num_epochs: int) -> None:
    """train.py: in the first iteration of an epoch and in each that ends ten; WarmupCosineAnnealingLR from 0 over 5 epochs."""
    per_epoch, expected, rate = 34, [], math.nan
    for epoch in range(num_epochs):
        for i in range(per_epoch):
            if i + 1 == 1 or (i + 1) % 10 == 0:
                at = epoch + i / per_epoch
                cosine = (math.cos(math.pi * (at - 5) / (num_epochs - 5)) + 1) / 2
                rate = LR * (at / 5 if at < 5 else cosine)
            expected.append(rate)
    recipe = make_recipe(warmup_epochs=5.0, warmup_start=0.0, schedule_every=10)
    assert rates(recipe, num_epochs * per_epoch, per_epoch) == pytest.approx(expected)
