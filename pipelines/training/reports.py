"""What a training says of itself: its plan before the first step, a report of each epoch, a summary at the end."""

from dataclasses import dataclass
from pathlib import Path

from vcache.heads.requirements import Recipe
from vcache.store.object_path import StorePath


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One line of metrics.jsonl. Losses are means over videos; accuracies are in 0..1."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_top1: float
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    val_mean_class_accuracy: float | None
    seconds: float


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
    steps: int
    last: EpochReport


@dataclass(frozen=True)
class TrainingPlan:
    """What is about to run, for the screen: sizes and the resolved schedule."""

    run: Path
    store: StorePath
    num_train: int
    num_val: int
    num_views: int
    """Views that each epoch draws one from, for each video."""
    num_parameters: int
    epochs: int
    steps: int
    precision: str
    recipe: Recipe
