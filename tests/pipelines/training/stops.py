"""A training that is stopped after a batch of the test's choosing."""

import itertools

import pytest

from vcache.pipelines.training.engine import TrainingLoop


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Ctrl-C while the batch of that number, counted from here, is taken."""
    taken, original = itertools.count(1), TrainingLoop._is_time_to_agree

    def counted(self: TrainingLoop) -> bool:
        self.stop.asked |= next(taken) == num_batches
        return original(self)

    monkeypatch.setattr(TrainingLoop, "_is_time_to_agree", counted)
