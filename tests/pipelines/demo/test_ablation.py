"""The ablation in miniature: real videos, a real store, one epoch for each run of EVL's Table 8."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vcache.pipelines import console
from vcache.pipelines.demo import ablation
from vcache.pipelines.demo.ablation import run_ablation
from vcache.pipelines.demo.ablation_screen import print_ablation
from vcache.pipelines.demo.table8 import VARIANTS
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.loading.batch import Batch
from vcache.pipelines.runs import RunError
from vcache.pipelines.training import group
from vcache.pipelines.training.config import TrainingError
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.run_lock import held_alone
from vcache.pipelines.training.stopping import TrainingStopped

SETTINGS = {"epochs": 1, "batch_size": 5}
PAPERS_ORDER = ["---", "C--", "-P-", "--A", "CP-", "C-A", "-PA", "CPA"]  # T-Conv, T-PE, T-CA


def ablate(out: Path, seeds: int, tca_gain: float = 1.0) -> dict[str, Any]:
    return run_ablation(out, seeds=seeds, tca_gain=tca_gain, train=10, val=7, settings=SETTINGS, show=False)


def means(result: dict[str, Any], table: str) -> list[float | None]:
    return [row["mean"] for row in result["tables"][table]]


class Training(HeadTraining):
    """Loses T-Conv of seed 0 at its first step, and is stopped after so many batches."""

    batches_left = -1

    def take(self, batch: Batch) -> None:
        super().take(batch)
        if self.name == "no temporal module, seed 0":  # the first of each batch
            Training.batches_left -= 1
            if not Training.batches_left:
                os.kill(os.getpid(), signal.SIGINT)

    def settle(self) -> None:
        if self.name == "T-Conv, seed 0":
            raise TrainingError("the loss is nan at step 1, with [any] rate: the head is lost.")
        super().settle()


@dataclass
class Session:
    """What a user got of four commands, one after the other."""

    out: Path
    stopped: dict[str, Any]
    """ablation.json after a Ctrl-C within the first of two batches."""
    one_failed: dict[str, Any]
    two_seeds: dict[str, Any]
    again: dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("ablation") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "HeadTraining", Training)
        patch.setattr(Training, "batches_left", 1)
        with pytest.raises(TrainingStopped, match="stopped after 1 steps"):
            ablate(out, 1)
        stopped = json.loads((out / "ablation.json").read_text())
        return Session(out, stopped, ablate(out, 1), ablate(out, 2), ablate(out, 2))


def never(*arguments: object, **named: object) -> None:
    raise AssertionError("something is trained")


def test_the_rows_are_the_papers_in_its_order(session: Session) -> None:
    tables, names = session.two_seeds["tables"], ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
    marks = [
        "".join(letter if row[name] else "-" for letter, name in zip("CPA", names, strict=True)) for row in tables["8a"]
    ]
    assert marks == PAPERS_ORDER
    assert [row["paper_k400"] for row in tables["8a"]] == [82.5, 82.9, 82.5, 82.6, 82.9, 82.7, 82.7, 82.9]
    assert [row["paper_ssv2"] for row in tables["8a"]] == [47.2, 57.1, 58.5, 59.5, 59.4, 60.0, 60.7, 61.0]
    assert [row["depth"] for row in tables["8b"]] == [1, 2, 3, 4]
    assert [row["paper_k400"] for row in tables["8b"]] == [81.1, 82.1, 82.6, 82.9]
    for row in tables["8a"] + tables["8b"]:
        first, second = (run["top1"] for run in row["runs"])
        if first is None:  # the one that failed
            assert (row["mean"], row["std"]) == (second, None)
            continue
        assert row["mean"] == pytest.approx((first + second) / 2)
        assert row["std"] == pytest.approx(abs(first - second) / 2**0.5)


def test_each_row_was_trained_as_it_says(session: Session) -> None:
    for row in session.two_seeds["tables"]["8a"] + session.two_seeds["tables"]["8b"]:
        for run in row["runs"]:
            config = json.loads((Path(run["run"]) / "config.json").read_text())
            assert config["seed"] == run["seed"]
            assert config["head_config"]["layers"] == list(range(-row["depth"], 0))
            for name in ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention"):
                assert config["head_config"][name] is row[name]


def test_accuracies_are_those_of_an_evaluation_of_the_run(session: Session) -> None:
    runs = [run for row in session.two_seeds["tables"]["8b"] for run in row["runs"]]
    assert [evaluate_run(Path(run["run"])).top1 for run in runs] == [run["top1"] for run in runs]


def test_the_same_command_again_trains_nothing(session: Session) -> None:
    assert session.again["num_trained"] == 0
    assert session.again["tables"] == session.two_seeds["tables"]


def test_after_a_stop_the_same_command_goes_on_from_the_step_that_was_reached(session: Session) -> None:
    assert means(session.stopped, "8a") == [None] * 8
    assert session.one_failed["num_trained"] == 11 - 1  # the lost one is not tried again
    steps = (session.out / "ablation" / "evl-conv_off-pe_off-ca_off-depth4-seed0" / "steps.jsonl").read_text()
    assert [json.loads(line)["step"] for line in steps.splitlines()] == [1, 2]


def test_more_seeds_add_only_their_own_runs(session: Session) -> None:
    assert session.two_seeds["num_trained"] == 11
    for table, rows in session.one_failed["tables"].items():
        assert [row["runs"] for row in rows] == [row["runs"][:1] for row in session.two_seeds["tables"][table]]


def test_fewer_seeds_show_fewer_runs_and_lose_none(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "HeadTraining", never)
    assert ablate(session.out, 1)["tables"] == session.one_failed["tables"]
    assert ablate(session.out, 2)["tables"] == session.two_seeds["tables"]


def test_a_gain_of_tca_leaves_the_runs_without_tca_as_they_are(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(session.out, tmp_path / "demo")
    trained: list[str] = []
    monkeypatch.setattr(
        ablation, "run_sweep", lambda sweep, *_, **__: trained.extend(itertools.chain(*sweep.unfinished()))
    )
    assert ablate(out, 2, tca_gain=30.0)["num_trained"] == 2 * 7
    assert trained == [
        f"{variant.label}, seed {seed}"
        for seed in (0, 1)
        for variant in VARIANTS
        if "T-CA" in variant.label or "all" in variant.label
    ]


@pytest.mark.parametrize(
    ("what", "value"),
    [("store_key", "another"), ("num_videos", {"train": 10, "val": 8}), ("training", {"settings": {"epochs": 2}})],
)
def test_runs_of_other_settings_or_another_world_are_refused(
    session: Session, tmp_path: Path, what: str, value: Any
) -> None:
    """As after `rm -r OUT/world OUT/world.zarr`: a new store may have the key of the old one."""
    out = shutil.copytree(session.out, tmp_path / "demo")
    run = out / "ablation" / "evl-conv_on-pe_on-ca_on-depth2-seed1"
    config = json.loads((run / "config.json").read_text())
    changed = {**config[what], **value} if what == "training" else value
    (run / "config.json").write_text(json.dumps({**config, what: changed}))
    with pytest.raises(RunError, match=f"^{run} was trained with other settings, or on another world"):
        ablate(out, 2)


def test_a_second_command_beside_one_that_trains_is_refused_and_changes_nothing(session: Session) -> None:
    plan = session.out / "ablation" / "sweep.json"
    before = plan.read_text()
    with held_alone(plan), pytest.raises(RunError, match="another process is training"):
        ablate(session.out, 1)
    assert plan.read_text() == before


def test_the_folder_can_be_moved(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "HeadTraining", never)
    out = shutil.copytree(session.out, tmp_path / "moved")
    assert means(ablate(out, 2), "8a") == means(session.two_seeds, "8a")


def test_a_failed_run_is_named_and_does_not_stop_the_others(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    (failure,) = session.one_failed["failed"]
    assert (failure["variant"], failure["seed"]) == ("T-Conv", 0)
    assert [mean is None for mean in means(session.one_failed, "8a")] == [False, True] + 6 * [False]
    assert None not in means(session.one_failed, "8b")
    print_ablation(session.one_failed)
    printed = capsys.readouterr().out
    assert "failed  T-Conv, seed 0: the loss is nan at step 1, with [any] rate: the head is lost." in printed


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_screen(
    columns: int, session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_ablation(session.two_seeds)
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if not line.startswith(("  ", "failed"))]  # paths and reasons may be of any length
    assert max(map(len, drawn)) <= columns
    assert sum("±" in line for line in lines) == 8 + 4 - 1
    assert "…" not in "".join(lines)


def test_the_command_refuses_seeds_without_an_ablation_and_a_seed_with_one(
    vcache: Callable[[str], tuple[int, str, str]],
) -> None:
    for line, word in (("demo --seeds 2", "--seeds goes with --ablation"), ("demo --ablation --seed 1", "--seeds N")):
        status, _, err = vcache(line)
        assert status == 2
        assert word in " ".join(err.split())


def test_the_command_ends_with_status_1_if_a_run_failed(
    session: Session, vcache: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "run_ablation", lambda out, **options: session.one_failed)
    status, out, err = vcache("demo --ablation --seeds 1 --json")
    assert status == 1
    assert json.loads(out)["tables"] == session.one_failed["tables"]
    assert "1 run failed" in err


def test_a_stop_says_that_the_same_command_goes_on(
    vcache: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(out: Path, **options: object) -> None:
        raise TrainingStopped("stopped after 3 steps", signal.SIGTERM)

    monkeypatch.setattr(ablation, "run_ablation", stopped)
    status, _, err = vcache("demo --ablation")
    assert status == 128 + signal.SIGTERM
    assert "what is done is kept, and the same command goes on from there" in " ".join(err.split())


def test_what_is_said_of_the_runs_is_on_standard_error(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    ablate(session.out, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"nothing left to train of {console.count(22, 'run')}" in captured.err
