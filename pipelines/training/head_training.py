"""One head in training: its weights, optimiser, random numbers, counters, metrics and run folder, apart from any other's.

What becomes of it depends on its config and on the batches alone, so beside others it is trained as it is alone.
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vcache.heads.requirements import Recipe
from vcache.pipelines.evaluation.metrics import Metrics
from vcache.pipelines.loading.loader import Batch
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.runs import Run
from vcache.pipelines.training.checkpoints import Checkpoint, Checkpoints
from vcache.pipelines.training.config import TrainingError
from vcache.pipelines.training.logs import RunLog
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.random_state import RandomState
from vcache.pipelines.training.reports import EpochReport, HeadProgress
from vcache.pipelines.training.schedule import learning_rate
from vcache.pipelines.training.step import TrainingStep
from vcache.pipelines.training.world import ALONE, World

State = Literal["training", "finished", "stopped early", "failed"]


@dataclass
class EpochSums:
    """Of the steps of an epoch so far, over all ranks."""

    loss: float = 0.0
    hits: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    """Before the last resume."""


@dataclass
class Best:
    """The best validation so far."""

    value: float = -math.inf
    epoch: int = -1


class HeadTraining:
    """Takes the batches of an epoch one by one, then the epoch's validation, until it is done."""

    def __init__(
        self,
        name: str,
        head: nn.Module,
        plan: ReadPlan,
        recipe: Recipe,
        precision: MixedPrecision,
        random: RandomState,
        run: Run,
        *,
        num_steps: int,
        steps_per_epoch: int,
        seed: int,
        patience: int | None = None,
        world: World = ALONE,
    ) -> None:
        """`head` is on its device; `random` is as its making left it."""
        self.name, self.head, self.plan, self.recipe, self.run = name, head, plan, recipe, run
        self.precision, self.patience, self.world = precision, patience, world
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.random = random
        self._train_step = TrainingStep(
            head,
            recipe,
            precision,
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            generator=torch.Generator().manual_seed(seed),
            world=world,
        )
        self.checkpoints, self.log = Checkpoints(run.path), RunLog(run.path)
        self.state: State = "training"
        self.error: str | None = None
        self.step = 0
        self.sums, self.best = EpochSums(), Best()
        self.last: EpochReport | None = None
        self._waiting: list[tuple[Tensor, int]] = []
        """(loss, hits) of steps that nobody has waited for, and their numbers of clips."""
        self._began = time.perf_counter()

    @property
    def is_training(self) -> bool:
        return self.state == "training"

    @property
    def wants_batches(self) -> bool:
        """Whether there are steps left to take; where there are none, the epoch's validation may still be missing."""
        return self.is_training and self.step < self.num_steps

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.head.parameters() if p.requires_grad)

    def begin_epoch(self) -> None:
        self._began = time.perf_counter()
        self.head.train()

    def take(self, batch: Batch) -> None:
        """One optimiser step; `settle` says later what came of it."""
        with self.random.active():
            result = self._train_step(batch.features(self.plan), batch.targets, self.step, batch.num_global)
        self._waiting.append((torch.stack([result.loss.double(), result.hits.double()]), batch.num_global))
        self.step += 1

    def settle(self) -> None:
        """Wait for the steps that were taken and add them up.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._waiting:
            return
        values = torch.stack([value for value, _ in self._waiting]).tolist()
        summed = self.world.sum([number for pair in values for number in pair])
        clips, first = [count for _, count in self._waiting], self.step - len(self._waiting)
        self._waiting = []
        for i, num_clips in enumerate(clips):
            loss, hits = summed[2 * i], summed[2 * i + 1]
            if not math.isfinite(loss):
                raise TrainingError(self._lost(loss, first + i))
            self.sums.loss += loss
            self.sums.hits += hits
            self.sums.seen += num_clips

    def evaluated(self) -> nn.Module:
        """The head to validate: with averaged weights where the recipe averages them."""
        averaged = self._train_step.averaged()
        if averaged is None:
            return self.head
        head = copy.deepcopy(self.head)
        head.load_state_dict(averaged)
        return head

    def end_epoch(self, epoch: int, metrics: Metrics | None, read_bytes: int, waiting_seconds: float) -> EpochReport:
        """Report the epoch, keep the weights if they are the best, and see whether this was the last one."""
        value = None if metrics is None else metrics.monitored
        is_best = value is not None and value > self.best.value
        if is_best:
            assert value is not None
            self.best = Best(value, epoch)
        report = EpochReport(
            head=self.name,
            epoch=epoch,
            step=self.step,
            lr=learning_rate(self.recipe, self.step - 1, self.num_steps, self.steps_per_epoch),
            train_loss=self.sums.loss / self.sums.seen,
            train_top1=self.sums.hits / self.sums.seen,
            seconds=self.sums.seconds + time.perf_counter() - self._began,
            best=is_best,
            read_bytes=read_bytes,
            waiting_seconds=waiting_seconds,
            **_validation_fields(metrics),
        )
        self.last, self.sums = report, EpochSums()
        if self.world.is_first:
            self.log.append_epoch(report)
            if is_best:
                self.run.save_head(self.weights(), which="best")
        self._finish_if_done(epoch, value)
        return report

    def weights(self) -> Mapping[str, Tensor]:
        """Those that the run ends with."""
        return self._train_step.averaged() or self.head.state_dict()

    def fail(self, error: str) -> None:
        """Give up; what it has on the device is freed."""
        self.state, self.error = "failed", error
        self._waiting = []
        self.head.to("meta")
        del self._train_step

    def progress(self, epoch: int) -> HeadProgress:
        seen, last = self.sums.seen, self.last
        return HeadProgress(
            name=self.name,
            step=self.step,
            num_steps=self.num_steps,
            epoch=epoch,
            lr=learning_rate(self.recipe, max(0, self.step - 1), self.num_steps, self.steps_per_epoch),
            loss=self.sums.loss / seen if seen else last.train_loss if last else None,
            train_top1=self.sums.hits / seen if seen else last.train_top1 if last else None,
            val=last.monitored if last else None,
            best=self.best.value if self.best.epoch >= 0 else None,
            state=self.state,
            note=self.error or "",
        )

    def save_checkpoint(self, number: int, epoch: int, batch: int) -> None:
        """After so many batches of the epoch, `number` since the training began."""
        self.settle()
        random = self.world.gather_rows(self.random.state()[None])
        if not self.world.is_first:
            return
        tensors = {f"head/{name}": tensor for name, tensor in self.head.state_dict().items()}
        tensors |= {f"step/{name}": tensor for name, tensor in self._train_step.state().items()}
        sums = {**vars(self.sums), "seconds": self.sums.seconds + (time.perf_counter() - self._began if batch else 0.0)}
        best = {"value": self.best.value if self.best.epoch >= 0 else None, "epoch": self.best.epoch}
        facts = {
            "step": self.step,
            "epoch": epoch,
            "batch": batch,
            "sums": sums,
            "best": best,
            "num_epochs_logged": self.log.num_epochs,
        }
        self.checkpoints.save(Checkpoint(number, {**tensors, "random": random}, facts))

    def load_checkpoint(self, number: int) -> tuple[int, int]:
        """Go on from it; returns the epoch and how many of its batches are done."""
        checkpoint = self.checkpoints.load(number)
        device = next(self.head.parameters()).device
        self.head.load_state_dict(_below("head", checkpoint.tensors))
        self._train_step.load_state({name: x.to(device) for name, x in _below("step", checkpoint.tensors).items()})
        self.random.load_state(checkpoint.tensors["random"][self.world.rank])
        facts: Mapping[str, Any] = checkpoint.facts
        self.step, self.sums = facts["step"], EpochSums(**facts["sums"])
        best = facts["best"]
        self.best = Best(best["value"], best["epoch"]) if best["value"] is not None else Best()
        if self.world.is_first:
            self.log.truncate(facts["num_epochs_logged"], self.step)
        return facts["epoch"], facts["batch"]

    def _finish_if_done(self, epoch: int, value: float | None) -> None:
        if self.step >= self.num_steps:
            self.state = "finished"
        elif self.patience is not None and value is not None and epoch - self.best.epoch >= self.patience:
            self.state = "stopped early"
        if not self.is_training and self.world.is_first:
            self.run.save_head(self.weights())
            self.checkpoints.delete()

    def _lost(self, loss: float, step: int) -> str:
        rate = learning_rate(self.recipe, step, self.num_steps, self.steps_per_epoch)
        half = "" if self.precision.name == "float32" else ", or with --precision float32"
        return (
            f"the loss is {loss} at step {step + 1}, with learning rate {rate:g}: the head is lost. "
            f"Train with a smaller --lr, or with --set warmup_steps=N{half}."
        )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): x for name, x in tensors.items() if name.startswith(f"{prefix}/")}


def _validation_fields(metrics: Metrics | None) -> dict[str, float | None]:
    names = ("loss", "top1", "top5", "mean_class_accuracy", "mean_average_precision")
    return {f"val_{name}": getattr(metrics, name) if metrics else None for name in names}
