"""A full disk, a kill between two files, two processes on one run: what was kept is not lost, and nothing goes wrong unsaid."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stops import stop_after
from torch import nn

from vcache.pipelines import runs
from vcache.pipelines.runs import Run, RunError, write_bytes
from vcache.pipelines.training.checkpoints import Checkpoint, Checkpoints
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.engine import TrainingLoop
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.train_head import resume_run, train_head


@pytest.fixture
def config(float32_store: Path, tmp_path: Path) -> Callable[..., TrainingConfig]:
    def make(name: str, **fields: Any) -> TrainingConfig:
        settings = {"epochs": 3, "batch_size": 5}
        return TrainingConfig(
            head="linear", store=float32_store, out=tmp_path / name, device="cpu", settings=settings, **fields
        )

    return make


def fill_disk(patch: pytest.MonkeyPatch, is_full: Callable[[str], bool]) -> None:
    """As a full disk does: what is written of a file whose path `is_full` names stays a piece, and the write fails."""
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        if is_full(str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    patch.setattr(runs.os, "fsync", fails)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "head.safetensors")


def test_a_file_that_does_not_fit_leaves_the_one_before_and_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(tmp_path / "a.bin", b"before")
    fill_disk(monkeypatch, lambda path: "a.bin" in path)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a.bin", b"after")
    assert files(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"before"


@pytest.mark.parametrize("full", [".safetensors.part", ".json.part"])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_training_goes_on(
    config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, full: str
) -> None:
    """Of nine batches the third alone finds room; what is wrong is said once for each time that it begins."""
    train_head(config("whole"))
    kept: list[list[str]] = []
    fill_disk(monkeypatch, lambda path: "/checkpoint/" in path and path.endswith(full) and "00000003" not in path)
    save = TrainingLoop._save_checkpoints

    def recorded(self: TrainingLoop) -> None:
        save(self)
        kept.append(files(tmp_path / "run" / "checkpoint"))

    monkeypatch.setattr(TrainingLoop, "_save_checkpoints", recorded)
    train_head(config("run", checkpoint_minutes=0.0))
    assert kept == [[]] * 2 + [["00000003.json", "00000003.safetensors"]] * 7
    said = capsys.readouterr().err
    assert said.count("No space left on device. The one before is as it was") == 2  # before the third, and after it
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_stop_on_a_full_disk_says_that_less_is_kept_and_goes_on_from_there(
    config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_head(config("whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        fill_disk(patch, lambda path: "/checkpoint/00000004" in path)
        with pytest.raises(
            TrainingStopped, match=r"no checkpoint could be written then: .*No space left.*vcache resume"
        ):
            train_head(config("run", checkpoint_minutes=0.0))
    assert Checkpoints(tmp_path / "run").numbers() == [3]
    resume_run(tmp_path / "run")
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["best.safetensors", "head.safetensors"])
def test_weights_that_do_not_fit_end_the_training_with_the_command_that_goes_on(
    config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    train_head(config("whole"))
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda path: f"/run/{file}" in path)
        with pytest.raises(RunError, match="No space left on device: the training has ended. .*vcache resume .*/run"):
            train_head(config("run", checkpoint_minutes=0.0))
    assert not (tmp_path / "run" / "head.safetensors").exists() and not list((tmp_path / "run").glob("*.part"))
    resume_run(tmp_path / "run")
    for name in ("head", "best"):
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(Run.open(tmp_path / "run").metrics()) == 3


@pytest.mark.parametrize("killed_at", ["classes.txt", "config.json"])
def test_a_member_that_a_kill_left_half_begun_is_begun_anew(
    float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """The second of two; a run that has a config.json has everything that was to be there before."""

    class Killed(BaseException):
        """Nothing may catch it."""

    settings = {"epochs": "1", "batch_size": "5", "device": "cpu", "store": str(float32_store)}
    sweep = Sweep.create(tmp_path / "sweep", plan_sweep(read_sweep("linear", settings, {}, 2)))
    with monkeypatch.context() as patch:
        replace = Path.replace

        def killed(self: Path, target: Path) -> Path:
            if target.name == killed_at and target.parent.name.endswith("seed1"):
                raise Killed
            return replace(self, target)

        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            run_sweep(sweep)
    summary = run_sweep(Sweep.open(sweep.path), resume=True)
    assert [result.status for result in summary.results] == ["finished", "finished"]
    for member in sweep.plan.members:
        assert Run.open(sweep.path / member.folder).class_names() == ("clap hands", "jump", "wave")


def test_two_processes_cannot_train_one_run(
    config: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one sweep; a lock belongs to whoever has opened the file."""
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 2)
        train_head(config("run"))
    with (tmp_path / "run" / "config.json").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = files(tmp_path / "run")
        with pytest.raises(RunError, match="another process is training .*run. Wait for it"):
            resume_run(tmp_path / "run")
        assert files(tmp_path / "run") == before
    resume_run(tmp_path / "run")


def test_while_a_sweep_trains_no_other_process_can_and_while_a_run_does(float32_store: Path, tmp_path: Path) -> None:
    settings = {"epochs": "1", "batch_size": "5", "device": "cpu", "store": str(float32_store)}
    sweep = Sweep.create(tmp_path / "sweep", plan_sweep(read_sweep("linear", settings, {})))
    refused: list[str] = []

    def try_again(plan: object) -> None:
        for resumed in (lambda: run_sweep(sweep, resume=True), lambda: resume_run(sweep.path / "linear")):
            with pytest.raises(RunError, match="another process is training") as caught:
                resumed()
            refused.append(str(caught.value))

    summary = run_sweep(sweep, TrainingEvents(on_plan=try_again))
    assert len(refused) == 2 and [result.status for result in summary.results] == ["finished"]


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    """They share memory, which safetensors refuses to write."""
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Checkpoint(2, tied.state_dict(), {}))
    torch.testing.assert_close(dict(checkpoints.load(2).tensors), dict(tied.state_dict()), rtol=0, atol=0)
    Run(tmp_path, {}).save_head(tied.state_dict())
    torch.testing.assert_close(weights(tmp_path), dict(tied.state_dict()), rtol=0, atol=0)
