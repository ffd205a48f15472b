"""What a training says of the blocks of the backbone that its heads run."""

from collections.abc import Sequence
from typing import Any

from vcache.pipelines.tail_file import kept_in
from vcache.pipelines.training.reports import TailPlan
from vcache.store.manifest import Manifest


def plan_of_tails(heads: Sequence[Any], manifest: Manifest) -> TailPlan | None:
    """Of the heads that run blocks, the one that runs the most, and the weights of all tails; None where none runs any."""
    running = [head for head in heads if head.requires(head.config).tail]
    if not running:
        return None
    most = max(running, key=lambda head: head.requires(head.config).tail)
    weights = {id(x): x for head in running for x in head.tail.state_dict(keep_vars=True).values()}
    return TailPlan(
        model=manifest.facts["backbone"]["model"],
        num_layers=most.tail.shape.num_layers,
        num_blocks=most.requires(most.config).tail,
        trained=getattr(most.config, "train_blocks", False),
        num_weights=sum(x.numel() for x in most.tail.state_dict().values()),
        dtypes=tuple(sorted({kept_in(head.tail) for head in running})),
        num_bytes=sum(x.nbytes for x in weights.values()),
    )
