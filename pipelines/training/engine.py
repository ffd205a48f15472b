"""The training loop: every batch is read once and taken by one head after the other."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics
from vcache.pipelines.evaluation.predicting import Predicted
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.training.config import TrainingError
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.logs import print_note
from vcache.pipelines.training.pace import Pace
from vcache.pipelines.training.reports import EpochReport, StepReport
from vcache.pipelines.training.stopping import StopRequest
from vcache.pipelines.training.world import ALONE, World

STEPS_BETWEEN_AGREEMENTS = 16
"""On a GPU: how often to wait for the device, and for the other ranks. A lost head is noticed then."""


@dataclass
class Position:
    """How far a training is: so many epochs are done, and so many batches of the next."""

    epoch: int = 0
    batch: int = 0


@dataclass(kw_only=True)
class TrainingLoop:
    """Trains heads of one stream of batches, side by side."""

    heads: Sequence[HeadTraining]
    train: ClipLoader
    val: ClipLoader | None
    num_classes: int
    position: Position = field(default_factory=Position)
    world: World = ALONE
    stop: StopRequest = field(default_factory=StopRequest)
    checkpoint_seconds: float = 300.0
    not_kept: OSError | None = None
    """Why the last checkpoint could not be written; None if it was."""
    source: str = "disk"
    """Where the batches are read from, as StepReport says it."""
    on_step: Callable[[StepReport], None] = lambda report: None
    on_epoch: Callable[[EpochReport], None] = lambda report: None
    on_note: Callable[[str], None] = print_note
    on_failure: Callable[[str, str], None] = lambda name, reason: None

    def run(self) -> bool:
        """Until every head is done, or a stop is asked for; whether it was. What is done then is in checkpoints, but where
        `not_kept` says why it is not."""
        self._pace, self._saved = Pace(self.train.stats, self.source), time.monotonic()
        while self._training():
            for head in self._training():
                head.begin_epoch()
            if self._steps():
                self._save_checkpoints()
                return True
            self._end_epoch()
        if self.world.is_first:
            self.on_step(self._report())  # what became of each head since the last one
        return False

    def _training(self) -> list[HeadTraining]:
        return [head for head in self.heads if head.is_training]

    def _wanting(self) -> list[HeadTraining]:
        return [head for head in self.heads if head.wants_batches]

    def _steps(self) -> bool:
        """The rest of the epoch's batches; whether it was cut short by a request to stop."""
        plans = [head.plan for head in self._wanting()]
        if not plans:
            return False
        for batch in self.train.epoch(self.position.epoch, first_batch=self.position.batch, plans=plans):
            for head in self._wanting():
                with self._surviving(head):
                    head.take(batch)
            self.position.batch += 1
            self._pace.step()
            if self._is_time_to_agree():
                for head in self._training():
                    with self._surviving(head):
                        head.settle()
                self._log_step()
                if self.world.any(self.stop.asked):
                    return True
                if self.world.any(time.monotonic() - self._saved >= self.checkpoint_seconds):
                    was_kept = not self.not_kept
                    self._save_checkpoints()
                    if self.not_kept and was_kept:
                        self._note_not_kept(self.not_kept)
            if self._pace.is_report_due() and self.world.is_first:
                self.on_step(self._report())
            if not self._wanting():
                break
        return False

    def _is_time_to_agree(self) -> bool:
        """By the number of the batch, so that all ranks wait for one another at the same one. On a CPU always: the ranks wait for
        the gradients anyway, and torchrun kills what has not stopped 30 s after a Ctrl-C."""
        return self.train.device.type == "cpu" or self._num_batches % STEPS_BETWEEN_AGREEMENTS == 0

    @property
    def _num_batches(self) -> int:
        """Since the training began. A head that is at its end has taken fewer steps."""
        return self.position.epoch * len(self.train) + self.position.batch

    @contextmanager
    def _surviving(self, head: HeadTraining) -> Iterator[None]:
        """A head that fails does not stop the others; alone it does.

        Of several ranks, all see a TrainingError at the same step, as losses are summed. What else goes wrong may do so in one
        alone, for which the others would wait: it ends all.
        """
        try:
            yield
        except Exception as error:
            if len(self.heads) == 1 or (self.world.size > 1 and not isinstance(error, TrainingError)):
                raise
            head.fail(str(error) or type(error).__name__)
            if self.world.is_first:
                self.on_failure(head.name, head.error or "")

    def _end_epoch(self) -> None:
        for head in self._training():
            with self._surviving(head):
                head.settle()
        read_bytes, waited = self._pace.end_epoch()
        read_bytes = int(self.world.sum([read_bytes])[0])
        metrics = self._validate()
        for head in self._training():
            report = head.end_epoch(self.position.epoch, metrics.get(head.name), read_bytes, waited)
            if self.world.is_first:
                self.on_epoch(report)
        self.position = Position(self.position.epoch + 1)

    def _validate(self) -> dict[str, Metrics]:
        """By the names of the heads; all of them see each batch of the validation split, which is read once."""
        if self.val is None:
            return {}
        heads = self._training()
        modules = {head.name: head.evaluated().eval() for head in heads}
        multi_label = self.val.targets.is_floating_point()
        found = {head.name: Predicted(self.num_classes, multi_label=multi_label) for head in heads}
        for batch in self.val.in_order(plans=[head.plan for head in heads]):
            for head in self._training() if len(batch) else []:
                with self._surviving(head), torch.inference_mode():
                    logits = modules[head.name](batch.features(head.plan))
                    found[head.name].add(logits, batch.targets, batch.rows)
        metrics: dict[str, Metrics] = {}
        for head in self._training():
            joined = found[head.name].gathered(self.world.gather_rows)
            with self._surviving(head):
                metrics[head.name] = compute_metrics(*joined.result(self.val.rows))
        return metrics

    def _save_checkpoints(self) -> None:
        """Of all heads after the same batch; only then are earlier ones deleted, so that there is always one that all have."""
        heads, self.not_kept = self._training(), None
        for head in heads:
            try:
                head.save_checkpoint(self._num_batches, self.position.epoch, self.position.batch)
            except OSError as error:  # a full disk; the ranks have met by then, and go on
                self.not_kept = error
        for head in heads if self.world.is_first else []:
            if self.not_kept:
                head.checkpoints.forget(self._num_batches)
            else:
                head.checkpoints.keep_only(self._num_batches)
        self._saved = time.monotonic()

    def _note_not_kept(self, error: OSError) -> None:
        self.on_note(
            f"no checkpoint could be written after batch {self._num_batches}: {error}. The one before is as it was, the training "
            f"goes on, and every {self.checkpoint_seconds / 60:g} minutes the next is tried."
        )

    def _log_step(self) -> None:
        """Into the logs of the heads of which a line is due."""
        due = [head for head in self._training() if head.log.is_due(head.step, head.num_steps)]
        if due and self.world.is_first:
            report = self._report()
            for head in due:
                head.log.append_step(head.progress(self.position.epoch), report)

    def _report(self) -> StepReport:
        remaining = max((head.num_steps - head.step for head in self._wanting()), default=0)
        return self._pace.report(tuple(head.progress(self.position.epoch) for head in self.heads), remaining)
