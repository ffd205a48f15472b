"""The learning rate of a step, in closed form: nothing is carried from step to step, so resuming has nothing to restore."""

import math

from vcache.heads.requirements import Recipe


def learning_rate(recipe: Recipe, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """The rate of optimiser step `step` (0-based) of `num_steps`, before multipliers: warm-up, then what the schedule says.

    Differs from the official code in what that leaves to its libraries: AIM's cosine is set once an epoch (mmcv), here at
    every step.
    """
    step = _set_at(step, recipe.schedule_every, steps_per_epoch)
    warmup = float(recipe.warmup_steps or recipe.warmup_epochs * steps_per_epoch)
    if step >= warmup:
        return _after_warmup(recipe, float(step), warmup, num_steps)
    reached = _after_warmup(recipe, warmup, warmup, num_steps)
    if recipe.warmup_start is None:
        return min(reached, reached * (step + 1) / warmup)
    start = recipe.lr * recipe.warmup_start
    return start + (reached - start) * step / warmup


def _after_warmup(recipe: Recipe, step: float, warmup: float, num_steps: int) -> float:
    if recipe.schedule == "constant":
        return recipe.lr
    begin = 0.0 if recipe.schedule == "whole_cosine" else warmup
    progress = min(1.0, (step - begin) / max(1.0, num_steps - begin))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _set_at(step: int, every: int, steps_per_epoch: int) -> int:
    """The step whose rate step `step` has: its epoch's first, or the last so far that is the 10th, 20th, ... of the epoch
    with every = 10 (Text4Vis and ActionCLIP, train.py)."""
    of_epoch = step % steps_per_epoch
    return step - of_epoch + max(0, (of_epoch + 1) // every * every - 1)
