"""A training that is stopped or killed goes on, and ends with the weights it would have ended with, bit for bit."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from logged import metrics_of
from safetensors.torch import load_file
from stops import stop_after

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.checkpoints import Checkpoints
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.errors import StoreKeyMismatch

NUM_STEPS = 9  # 12 clips in batches of 5: three epochs of three


def config(store: Path, out: Path, head: str = "evl", **fields: object) -> TrainingConfig:
    settings = {"epochs": 3, "batch_size": 5, "lr": 1e-3, **({"layers": "-2:"} if head == "evl" else {})}
    return TrainingConfig(head=head, store=store, out=out, device="cpu", settings=settings, **fields)  # type: ignore[arg-type]


def same_run(one: Path, other: Path) -> None:
    for file in ("head", "best"):
        torch.testing.assert_close(
            load_file(one / f"{file}.safetensors"), load_file(other / f"{file}.safetensors"), rtol=0, atol=0
        )
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module")
def whole(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped, with as many threads as the tests have: of sums over threads the last bit depends on them."""
    out, before = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    train_head(config(float32_store, out))
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("num_steps", range(1, NUM_STEPS))
def test_a_training_stopped_at_any_step_goes_on_as_if_it_had_not_been(
    float32_store: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped, match="vcache resume"):
        stop_after(patch, num_steps)
        train_head(config(float32_store, tmp_path / "run"))
    assert Checkpoints(tmp_path / "run").numbers() == [num_steps]
    resume_run(tmp_path / "run")
    same_run(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_training_stopped_at_every_step_goes_on(
    float32_store: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(NUM_STEPS - 1):
        with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
            stop_after(patch, 1)
            resume_run(tmp_path / "run") if step else train_head(config(float32_store, tmp_path / "run"))
    resume_run(tmp_path / "run")
    same_run(tmp_path / "run", whole)


def test_kill_9_loses_nothing_but_time(float32_store: Path, tmp_path: Path) -> None:
    """Killed twice, wherever it is by then, with a checkpoint at every step."""
    run, log = tmp_path / "run", tmp_path / "log"
    line = f"train-head evl --store {float32_store} --set layers=-2: --epochs 8 --lr 1e-3 --batch-size 5 --device cpu"
    command = f"{line} --checkpoint-minutes 0 --out {run}"
    for enough in (4, 12):
        process = commands.start(command, log)
        while commands.status(process, timeout=0) is None and max(Checkpoints(run).numbers(), default=0) < enough:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert commands.status(process) == -signal.SIGKILL
        command = f"resume {run}"
    assert commands.status(commands.start(command, log)) == 0
    whole = config(float32_store, tmp_path / "whole")
    train_head(replace(whole, settings={**whole.settings, "epochs": 8}))
    same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_with_a_checkpoint_and_the_command_that_goes_on(
    float32_store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = commands.start(
        f"train-head linear --store {float32_store} --epochs 100000 --batch-size 5 --out {run}", log
    )
    while commands.status(process, timeout=0) is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert commands.status(process, timeout=60) == 128 + number
    assert f"vcache resume {run}" in log.read_text() and "Traceback" not in log.read_text()
    assert len(Checkpoints(run).numbers()) == 1


def test_what_cannot_go_on_is_refused_in_words(
    float32_store: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    with pytest.raises(RunError, match="is complete: there is nothing to resume"):
        resume_run(whole)
    with pytest.raises(RunError, match="is not a run folder"):
        resume_run(tmp_path)
    stop_after(monkeypatch, 2)
    with pytest.raises(TrainingStopped):
        train_head(config(float32_store, tmp_path / "run"))
    make: Callable[..., ExtractionConfig] = request.getfixturevalue("config")
    run_extraction(make(preprocess="exact"))
    with pytest.raises(StoreKeyMismatch, match="preprocessing"):
        resume_run(tmp_path / "run", store=make().store)
    with pytest.raises(RunError, match=r"did not finish. Go on with:  vcache resume"):
        Run.open(tmp_path / "run")
