"""When a training listens: to the first signal at the next step, to a second one at once; when it agrees and keeps."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vcache.pipelines.training import engine
from vcache.pipelines.training.checkpoints import Checkpoint, Checkpoints
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.engine import Position, TrainingLoop
from vcache.pipelines.training.group import Member, train_group
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.stopping import TrainingStopped, stop_on_signals


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_the_first_ctrl_c_asks_and_the_second_does_what_it_always_does() -> None:
    with stop_on_signals() as request:
        assert not request.asked
        signal.raise_signal(signal.SIGINT)
        assert request.asked and request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert TrainingStopped("", signal.SIGTERM).exit_status == 143


class Loader:
    """Three batches an epoch, on a device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(("device", "expected"), [("cuda", [16, 32]), ("cpu", [*range(1, 37)])])
def test_epochs_shorter_than_the_agreements_lie_apart_agree_all_the_same(device: str, expected: list[int]) -> None:
    """Else a GPU that has ten batches an epoch would hear no Ctrl-C and write no checkpoint."""
    loop = object.__new__(TrainingLoop)
    loop.train = Loader(device)  # type: ignore[assignment]
    agreed = []
    for number in range(36):
        loop.position = Position(number // 3, number % 3 + 1)
        agreed += [number + 1] if loop._is_time_to_agree() else []
    assert agreed == expected


def test_checkpoints_are_written_as_often_as_the_most_careful_head_asks(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes 25 s, and one head of two wants a checkpoint every minute; the one before goes with the next."""
    seconds, saved = [0.0], []
    take, save = HeadTraining.take, Checkpoints.save

    def slow(self: HeadTraining, batch: Any) -> None:
        seconds[0] += 12.5  # for each of the two heads
        take(self, batch)

    def recorded(self: Checkpoints, checkpoint: Checkpoint) -> None:
        save(self, checkpoint)
        saved.append((checkpoint.number, self.numbers()))

    monkeypatch.setattr(HeadTraining, "take", slow)
    monkeypatch.setattr(Checkpoints, "save", recorded)
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    members = []
    for minutes in (100.0, 1.0):
        config = TrainingConfig(
            head="linear",
            store=float32_store,
            device="cpu",
            checkpoint_minutes=minutes,
            settings={"epochs": 3, "batch_size": 5},
        )
        members.append(Member(name=str(minutes), config=config, run=tmp_path / str(minutes)))
    train_group(members)
    assert saved == [(3, [3])] * 2 + [(6, [3, 6])] * 2 + [(9, [6, 9])] * 2
