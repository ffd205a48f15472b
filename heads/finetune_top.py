"""Fine-tuning of the top blocks: all their weights are trained, from the cached tokens that enter the lowest of them.

What EVL's and Text4Vis's papers do to the whole tower, done to its top blocks; with blocks=N to all that comes after ln_pre.
Nothing is put between, so that it is the frozen CLIP of each frame at initialisation, and knows the order of the frames only
by the classifier "evl".
"""

from dataclasses import dataclass

from vcache.heads.registry import register_head
from vcache.heads.requirements import Recipe
from vcache.heads.tail_head import TOWER_RATES, TailConfig, TailHead


@register_head("finetune-top")
class FinetuneTop(TailHead):
    """The top blocks of the backbone, trained at a lower rate than the classifier on them."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TailConfig):
        train_blocks: bool = True
        """Of all weights of the blocks that are run, at the recipe's factor of the rate. False: the blocks stay as they are,
        and ln_post and the classifier alone are trained: what is to be compared with."""

    summary = "the top blocks of the backbone fine-tuned at a tenth of the classifier's rate"
    # Text4Vis as coded (utils/solver.py and configs/k400 at d61b34d): the tower at a tenth of the rate, all of it decayed.
    # EVL's paper: a hundredth, of 4e-4 (appendix A, "Full-finetuning Details").
    recipe = Recipe(
        lr=5e-5,
        weight_decay=0.2,
        epochs=30,
        batch_size=256,
        warmup_epochs=5.0,
        warmup_start=0.0,
        schedule_every=10,
        lr_multipliers=TOWER_RATES,
    )
