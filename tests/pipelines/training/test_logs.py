"""What a training leaves on disk: whole lines only, cut where it resumes, and TensorBoard reads the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vcache.pipelines.runs import Run
from vcache.pipelines.training import event_file
from vcache.pipelines.training.logs import MAX_STEP_LINES, STEP_FIELDS, LogError, RunLog, read_log
from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """By TensorBoard's own reader."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_log(run / "steps.jsonl")]


def test_a_log_makes_nothing_before_its_first_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    assert log.num_epochs == 0
    assert not (tmp_path / "run").exists()


def test_metrics_has_the_fields_of_each_epoch(tmp_path: Path, make_epoch: Callable[..., EpochReport]) -> None:
    log = RunLog(tmp_path)
    for epoch, loss in enumerate((1.5, float("inf"), 0.5)):
        log.append_epoch(make_epoch(epoch=epoch, step=7 * epoch + 7, val_loss=loss))
    lines = Run(tmp_path, {}).metrics()
    assert lines[0] == {
        "head": "evl-1",
        "epoch": 0,
        "step": 7,
        "lr": 1.4e-3,
        "train_loss": 1.2,
        "train_top1": 0.46,
        "val_loss": 1.5,
        "val_top1": 0.51,
        "val_top5": 0.9,
        "val_mean_class_accuracy": 0.48,
        "val_mean_average_precision": None,
        "best": False,
        "seconds": 12.3,
        "read_bytes": 965_000_000,
        "waiting_seconds": 3.5,
    }
    assert [line["val_loss"] for line in lines] == [1.5, None, 0.5], "JSON has no infinity"
    assert RunLog(tmp_path).num_epochs == log.num_epochs == 3


@given(kept=st.integers(0, 200))
def test_a_log_cut_anywhere_reads_as_its_whole_lines_and_goes_on_from_them(
    tmp_path_factory: pytest.TempPathFactory, make_epoch: Callable[..., EpochReport], kept: int
) -> None:
    """As a kill leaves it."""
    run = tmp_path_factory.mktemp("run")
    written = [json.dumps({"epoch": epoch, "step": 10 * epoch}) + "\n" for epoch in range(7)]
    text = "".join(written)[:kept]
    (run / "metrics.jsonl").write_text(text)
    whole = text.count("\n")
    assert [line["epoch"] for line in Run(run, {}).metrics()] == list(range(whole))
    log = RunLog(run)
    log._has_events = False  # not what this is about, and slow
    assert log.num_epochs == whole
    log.append_epoch(make_epoch(epoch=99))
    assert [line["epoch"] for line in read_log(run / "metrics.jsonl")] == [*range(whole), 99]


def test_a_line_that_no_training_wrote_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\nnonsense\n{"epoch": 2}\n')
    with pytest.raises(LogError, match=r"line 2 of .*metrics.jsonl is no JSON: b'nonsense'"):
        Run(tmp_path, {}).metrics()


def test_a_short_run_keeps_every_step_and_a_long_one_about_a_thousand(
    tmp_path: Path, make_head: Callable[..., HeadProgress], make_report: Callable[..., StepReport]
) -> None:
    for name, num_steps in (("short", 12), ("long", 7300)):
        log = RunLog(tmp_path / name)
        (tmp_path / name).mkdir()
        log._has_events = False
        for step in range(1, num_steps + 1):
            head = make_head(step=step, num_steps=num_steps)
            log.append_step(head, make_report(head))
    assert steps(tmp_path / "short") == list(range(1, 13))
    assert MAX_STEP_LINES * 0.9 < len(steps(tmp_path / "long")) <= MAX_STEP_LINES + 1
    line = read_log(tmp_path / "short" / "steps.jsonl")[-1]
    assert tuple(line) == STEP_FIELDS
    assert (line["train_loss"], line["train_top1"], line["lr"], line["epoch"]) == (1.234, 0.456, 1.5e-3, 4)
    assert (line["steps_per_second"], line["read_bytes_per_second"], line["waiting"]) == (35.23, 1.2e8, 0.73)


def train(
    log: RunLog,
    start: int,
    stop: int,
    loss: float,
    make_head: Callable[..., HeadProgress],
    make_report: Callable[..., StepReport],
    make_epoch: Callable[..., EpochReport],
) -> None:
    """Steps start + 1 to stop, of epochs of 4."""
    for step in range(start + 1, stop + 1):
        head = make_head(step=step, num_steps=12, epoch=(step - 1) // 4, loss=loss, train_top1=step / 100)
        log.append_step(head, make_report(head))
        if step % 4 == 0:
            log.append_epoch(make_epoch(epoch=step // 4 - 1, step=step, train_loss=loss, val_top1=step / 50))


@pytest.mark.parametrize("step", [6, None])
def test_a_resumed_run_has_each_epoch_and_step_once(
    tmp_path: Path,
    make_head: Callable[..., HeadProgress],
    make_report: Callable[..., StepReport],
    make_epoch: Callable[..., EpochReport],
    step: int | None,
) -> None:
    """A kill after step 9, with a checkpoint after 6 that knows of one epoch; without its step, all is cut at that epoch."""
    makers = (make_head, make_report, make_epoch)
    train(RunLog(tmp_path), 0, 9, 1.0, *makers)
    for path in (tmp_path / "metrics.jsonl", tmp_path / "steps.jsonl", *(tmp_path / "tensorboard").iterdir()):
        with path.open("ab") as file:
            file.write(b'{"epoch": 3, "st')
    log, done = RunLog(tmp_path), step or 4
    log.truncate(1, step)
    assert log.num_epochs == 1
    assert steps(tmp_path) == list(range(1, done + 1))
    train(log, done, 12, 2.0, *makers)
    assert [(line["epoch"], line["step"]) for line in read_log(tmp_path / "metrics.jsonl")] == [(0, 4), (1, 8), (2, 12)]
    losses = {line["step"]: line["train_loss"] for line in read_log(tmp_path / "steps.jsonl")}
    assert losses == {i: 1.0 if i <= done else 2.0 for i in range(1, 13)}
    assert scalars(tmp_path, "train/loss") == list(losses.items())
    assert scalars(tmp_path, "val/top1") == [(4, 0.08), (8, 0.16), (12, 0.24)]


def test_tensorboard_reads_what_the_lines_say(
    tmp_path: Path,
    make_head: Callable[..., HeadProgress],
    make_report: Callable[..., StepReport],
    make_epoch: Callable[..., EpochReport],
) -> None:
    log, head = RunLog(tmp_path), make_head()
    log.append_step(head, make_report(head))
    log.append_epoch(make_epoch(val_top1=None, val_top5=None, val_mean_average_precision=0.61))
    expected = {
        "train/loss": [(120, 1.234), (125, 1.2)],
        "train/top1": [(120, 0.456), (125, 0.46)],
        "lr": [(120, 1.5e-3), (125, 1.4e-3)],
        "speed/steps_per_second": [(120, 35.23)],
        "speed/read_mb_per_second": [(120, 120.0)],
        "speed/waiting": [(120, 0.73)],
        "speed/epoch_seconds": [(125, 12.3)],
        "val/loss": [(125, 1.3)],
        "val/mean_class_accuracy": [(125, 0.48)],
        "val/mean_average_precision": [(125, 0.61)],
    }
    assert {tag: scalars(tmp_path, tag) for tag in expected} == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(expected)


def test_without_tensorboard_the_lines_are_all_there_is(
    tmp_path: Path, make_epoch: Callable[..., EpochReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file, "is_installed", lambda: False)
    notes: list[str] = []
    RunLog(tmp_path, on_note=notes.append).append_epoch(make_epoch())
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert notes == []


def test_a_broken_tensorboard_is_noted_once_and_stops_nothing(
    tmp_path: Path, make_epoch: Callable[..., EpochReport], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.append_epoch(make_epoch(epoch=epoch))
    assert len(read_log(tmp_path / "metrics.jsonl")) == 3
    noted = capsys.readouterr().err
    assert noted.count("note: no more TensorBoard files are written for") == 1
    assert "FileExistsError" in noted
