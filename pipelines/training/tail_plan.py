"""What a training says of the blocks of the backbone that its heads run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vcache.heads.tail_memory import activation_bytes
from vcache.pipelines.tail_file import kept_in
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.reports import TailPlan
from vcache.store.manifest import Manifest


def plan_of_tails(trainings: Sequence[HeadTraining], manifest: Manifest) -> TailPlan | None:
    """Of the heads that run blocks, the one that runs the most, and the weights of all tails; None where none runs any."""
    running = [one for one in trainings if _num_blocks(one.head)]
    if not running:
        return None
    most = max(running, key=lambda one: _num_blocks(one.head))
    head: Any = most.head
    tails: list[Any] = [one.head.tail for one in running]
    weights = {id(x): x for tail in tails for x in tail.state_dict(keep_vars=True).values()}
    kept, again = (_activations(most, checkpointing=checkpointing) for checkpointing in (False, True))
    return TailPlan(
        model=manifest.facts["backbone"]["model"],
        num_layers=head.tail.shape.num_layers,
        num_blocks=_num_blocks(head),
        trained=head.config.train_blocks,
        num_weights=sum(x.numel() for x in head.tail.state_dict().values()),
        dtypes=tuple(sorted({kept_in(tail) for tail in tails})),
        num_bytes=sum(x.nbytes for x in weights.values()),
        activation_bytes=kept,
        checkpointed_bytes=again,
        checkpointing=head.config.checkpointing,
    )


def _num_blocks(head: Any) -> int:
    return int(head.requires(head.config).tail)


def _activations(one: HeadTraining, *, checkpointing: bool) -> int:
    """Of the clips of this process."""
    head: Any = one.head
    config = replace(head.config, checkpointing=checkpointing)
    clips = -(-one.recipe.batch_size // one.world.size)
    return activation_bytes(config, head.tail.shape.block, clips, one.precision.item_bytes)
