"""The ablation in miniature: real videos, a real store, one epoch for each run of EVL's Table 8."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vcache.pipelines import console
from vcache.pipelines.demo import ablation
from vcache.pipelines.demo.ablation import Outcome, Pace, run_ablation
from vcache.pipelines.demo.ablation_screen import print_ablation
from vcache.pipelines.demo.run import prepare_world
from vcache.pipelines.demo.table8 import TABLES, VARIANTS, Variant
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.training.config import TrainingConfig, TrainingError
from vcache.pipelines.training.reports import StepReport, TrainingSummary
from vcache.pipelines.training.train_head import train_head

SETTINGS = {"epochs": 1, "batch_size": 5}
FAILING = Variant(temporal_pos_embed=False, temporal_cross_attention=False)  # the second to be trained
PAPERS_ORDER = ["---", "C--", "-P-", "--A", "CP-", "C-A", "-PA", "CPA"]  # T-Conv, T-PE, T-CA


def ablate(out: Path, seeds: int, tca_gain: float = 1.0) -> dict[str, Any]:
    return run_ablation(out, seeds=seeds, tca_gain=tca_gain, train=10, val=7, settings=SETTINGS, show=False)


def means(result: dict[str, Any], table: str) -> list[float | None]:
    return [row["mean"] for row in result["tables"][table]]


def train_or_fail(config: TrainingConfig, **callbacks: Any) -> TrainingSummary:
    if all(config.settings[name] == value for name, value in FAILING.settings.items()):
        raise TrainingError("the loss is nan at step 1, with [any] rate: the head is lost.")
    return train_head(config, **callbacks)


def stop(report: StepReport) -> None:
    raise KeyboardInterrupt


@dataclass
class Session:
    """What a user got of four commands, one after the other."""

    out: Path
    stopped: dict[str, Any]
    """ablation.json after a Ctrl-C within the third run."""
    one_failed: dict[str, Any]
    two_seeds: dict[str, Any]
    again: dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("ablation") / "demo"
    store, _ = prepare_world(out, train=10, val=7, show=False)
    train_head(TrainingConfig(head="evl", store=store, settings=SETTINGS, out=out / "runs" / "all-modules"))
    begun = iter(range(99))

    def train_and_stop(config: TrainingConfig, **callbacks: Any) -> TrainingSummary:
        return train_or_fail(config, **{**callbacks, **({"on_step": stop} if next(begun) == 2 else {})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "train_head", train_and_stop)
        with pytest.raises(KeyboardInterrupt):
            ablate(out, 1)
        stopped = json.loads((out / "ablation.json").read_text())
        patch.setattr(ablation, "train_head", train_or_fail)
        one_failed = ablate(out, 1)
    return Session(out, stopped, one_failed, ablate(out, 2), ablate(out, 2))


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
        (first, second) = (run["top1"] for run in row["runs"])
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


def test_a_stop_keeps_the_finished_runs_and_the_next_command_trains_the_others(session: Session) -> None:
    # Of 11: one is the user's own, one was finished and one had failed before the stop.
    assert [row["mean"] is not None for row in session.stopped["tables"]["8a"]] == [True] + 6 * [False] + [True]
    assert session.one_failed["num_trained"] == 11 - 2
    first = session.stopped["tables"]["8a"][0]["runs"]
    assert session.one_failed["tables"]["8a"][0]["runs"] == first


def test_another_number_of_seeds_adds_only_the_new_runs_and_tries_the_failed_one_again(session: Session) -> None:
    assert session.two_seeds["num_trained"] == 11 + 1
    assert session.two_seeds["failed"] == []


def test_the_same_command_again_trains_nothing(session: Session) -> None:
    assert session.again["num_trained"] == 0
    assert session.again["tables"] == session.two_seeds["tables"]


def test_a_failed_run_is_named_and_does_not_stop_the_others(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    (failure,) = session.one_failed["failed"]
    assert (failure["variant"], failure["seed"]) == ("T-Conv", 0)
    assert [mean is None for mean in means(session.one_failed, "8a")] == [False, True] + 6 * [False]
    assert None not in means(session.one_failed, "8b")
    print_ablation(session.one_failed)
    printed = capsys.readouterr().out
    assert (
        "failed  T-Conv, seed 0: TrainingError: the loss is nan at step 1, with [any] rate: the head is lost."
        in printed
    )


def test_the_csv_has_a_line_for_each_run_of_each_row(session: Session) -> None:
    with (session.out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (8 + 4)
    told = [run for table in session.again["tables"].values() for row in table for run in row["runs"]]
    assert [(int(row["seed"]), float(row["top1"]), row["run"]) for row in rows] == [
        (run["seed"], run["top1"], run["run"]) for run in told
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_screen(
    columns: int, session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_ablation(session.two_seeds)
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if not line.startswith("  ")]  # paths may be of any length
    assert max(map(len, drawn)) <= columns
    assert sum("±" in line for line in lines) == 8 + 4
    assert "…" not in "".join(lines)


def test_a_gain_of_tca_leaves_the_runs_without_tca_as_they_are(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_head", lambda config, **callbacks: 1 / 0)
    result = ablate(session.out, 2, tca_gain=30.0)
    assert result["num_trained"] == 2 * 7
    assert {failure["error"] for failure in result["failed"]} == {"ZeroDivisionError: division by zero"}


def test_a_run_from_before_there_was_a_field_counts(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "train_head", lambda config, **callbacks: 1 / 0)
    path = Path(session.again["tables"]["8a"][2]["runs"][0]["run"]) / "config.json"
    written = path.read_text()
    config = json.loads(written)
    del config["head_config"]["tca_gain"], config["recipe"]["mixup"], config["precision"], config["num_videos"]
    path.write_text(json.dumps(config))
    assert ablate(session.out, 2)["num_trained"] == 0
    path.write_text(written)


def test_runs_that_differ_in_anything_that_makes_a_run_do_not_count(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "train_head", lambda config, **callbacks: 1 / 0)
    changes = {
        "precision": "bfloat16",
        "store_key": "another",
        "seed": 7,
        "views": {"0": {}, "1": {}},
        "recipe": {"lr": 1.0},
        "num_videos": {"train": 10, "val": 8},
        "dataset": "another",
        "train_split": "val",
    }
    paths = [Path(row["runs"][0]["run"]) / "config.json" for row in session.again["tables"]["8a"]]
    written = [path.read_text() for path in paths]
    for path, text, (name, value) in zip(paths, written, changes.items(), strict=True):
        config = json.loads(text)
        assert config[name] != value
        path.write_text(json.dumps(config | {name: value}))
    failed = ablate(session.out, 2)["failed"]
    for path, text in zip(paths, written, strict=True):
        path.write_text(text)
    assert [(failure["variant"], failure["seed"]) for failure in failed] == [
        (row.variant.label, 0) for row in TABLES["8a"]
    ]


def test_runs_on_a_world_of_another_size_do_not_count(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `rm -r OUT/world OUT/world.zarr`: the new store has the key of the old one."""
    monkeypatch.setattr(ablation, "train_head", lambda config, **callbacks: 1 / 0)
    shutil.copytree(session.out / "runs", tmp_path / "runs")
    result = run_ablation(tmp_path, seeds=1, train=12, val=7, settings=SETTINGS, show=False)
    assert result["num_trained"] == 11


def test_a_run_is_expected_to_take_what_its_like_took() -> None:
    slow, fast = VARIANTS[-1], VARIANTS[0]
    assert Pace({}).seconds([fast, slow]) == fast.quiet_seconds + slow.quiet_seconds
    done = Outcome(run=Path("a"), top1=0.5, seconds=3 * fast.quiet_seconds)
    failed = Outcome(run=Path("b"), top1=None, seconds=0.0, error="any")
    pace = Pace({(fast, 0): done, (slow, 0): failed})
    assert pace.seconds([fast]) == done.seconds
    assert pace.seconds([fast, slow]) == pytest.approx(done.seconds + 3 * slow.quiet_seconds)


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


def test_bars_and_lines_of_the_runs_are_on_standard_error(
    session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ablate(session.out, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"all {console.count(22, 'run')} there already" in captured.err
