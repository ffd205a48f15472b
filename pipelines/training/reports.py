"""What a training says of itself: its plan before the first step, how it goes, a report of each epoch, a summary at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vcache.heads.requirements import Recipe
from vcache.store.object_path import StorePath


@dataclass(frozen=True, kw_only=True)
class TailPlan:
    """The top blocks of the backbone that heads run; of several heads, those of the one that runs the most."""

    model: str
    num_layers: int
    """Blocks of the whole backbone."""
    num_blocks: int
    trained: bool
    """Whether the blocks are trained themselves, from copies in the head."""
    num_weights: int
    """Frozen ones, with ln_post and proj."""
    dtypes: tuple[str, ...]
    """In which they are kept."""
    num_bytes: int
    """Of them in memory, once for all heads."""
    activation_bytes: int
    """What a step keeps for its backward pass, without checkpointing; an estimate (tail_memory.py)."""
    checkpointed_bytes: int
    """The same with checkpointing."""
    checkpointing: bool
    """Whether it is on."""

    @property
    def kept_bytes(self) -> int:
        """What a step will keep."""
        return self.checkpointed_bytes if self.checkpointing else self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is about to run, for the screen: sizes and the resolved schedule."""

    run: Path
    """Of several heads, the folder that holds their runs."""
    store: StorePath
    num_train: int
    num_val: int
    num_views: int
    """Views that each epoch draws one from, for each video."""
    num_parameters: int
    """Of all heads together."""
    epochs: int
    steps: int
    """Of the head that takes the most."""
    precision: str
    recipe: Recipe
    residency: str
    """Where the features lie while they are trained on, and why: a sentence without its full stop; empty: nothing to say."""
    shuffle: str
    """ "full" or "shards"."""
    shuffle_bytes: int = 0
    """What shuffling by shards holds in memory; 0: nothing."""
    subset: str = ""
    """What was taken of the videos, and how they are drawn, in the form of `residency`."""
    num_heads: int = 1
    group: str = ""
    """Of a sweep whose heads do not train all at once, which of its groups this is: "group 1 of 2"."""
    tail: TailPlan | None = None
    """None where no head runs blocks of the backbone."""
    resumed_from: str | None = None
    """What was done before: "step 300 of 500"; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class HeadProgress:
    """One head, as it is now. Accuracies are in 0..1."""

    name: str
    """Of its run folder."""
    step: int
    num_steps: int
    epoch: int
    """The one it is in, from 0."""
    lr: float
    loss: float | None
    """Mean over the clips of the epoch so far."""
    train_top1: float | None
    """Over the same clips."""
    val: float | None
    """The last validation: top-1, of several labels per video mean average precision."""
    best: float | None
    """The best of the validations."""
    state: Literal["training", "finished", "stopped early", "failed"]
    note: str = ""
    """Why it failed or was stopped."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """All heads that train side by side, and how fast it goes. Rates are those of the last seconds."""

    heads: tuple[HeadProgress, ...]
    steps_per_second: float
    read_bytes_per_second: float
    waiting: float
    """Share of the time, 0..1, in which the steps waited for data."""
    limited_by: Literal["reading", "computing"] | None
    """None: not known yet."""
    source: str
    """Where batches are read from: "disk", "RAM" or "GPU memory"."""
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One line of metrics.jsonl. Losses are means over videos; accuracies are in 0..1."""

    head: str
    """The name of its run folder."""
    epoch: int
    step: int
    lr: float
    train_loss: float
    train_top1: float
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    val_mean_class_accuracy: float | None
    val_mean_average_precision: float | None
    """Of several labels per video, where the three above are None."""
    best: bool
    """Whether no epoch before had as good a validation."""
    seconds: float
    read_bytes: int
    """For the epoch's steps; shared by the heads that train side by side."""
    waiting_seconds: float
    """Of `seconds`, those in which the steps waited for data."""

    @property
    def monitored(self) -> float | None:
        """What "best" compares: top-1, of several labels per video mean average precision."""
        return self.val_top1 if self.val_top1 is not None else self.val_mean_average_precision


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    run: str
    store: str
    num_train: int
    num_val: int
    num_failed: int
    """Videos of the two splits that were left out because their extraction failed."""
    num_parameters: int
    epochs: int
    """Of the whole training, of which one that stopped early took fewer."""
    steps: int
    """That were taken."""
    last: EpochReport | None
    """None: stopped within the first epoch."""
    best_epoch: int | None
    """From 0; None: there was no validation."""
    best_value: float | None
    stopped_early: bool
    """By the recipe's patience: validation had not become better for so many epochs."""
    stopped: bool
    """By Ctrl-C or a signal: the run can be resumed."""
    error: str | None = None
    """Why it failed, beside others that did not."""
    tail: TailPlan | None = None
    """None of a head that runs no blocks of the backbone."""
