"""Results of a sweep: exact numbers over seeds, failed runs that stay, and tables that fit the screen."""

import csv
import io
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vcache.pipelines.training.sweep_results import (
    MemberResult,
    best_setting,
    failure_lines,
    results_csv,
    results_markdown,
    results_table,
    summarise,
    summary_csv,
    write_results,
)


def result(depth: str, seed: int, top1: float | None, status: str = "finished", **fields: object) -> MemberResult:
    metrics = {} if top1 is None else {"top1": top1, "top5": 0.75, "mean_class_accuracy": 0.5, "loss": 1.25}
    values = {
        "label": f"depth={depth}",
        "head": "evl",
        "varied": {"depth": depth},
        "seed": seed,
        "status": status,
        "metrics": metrics,
        "run": f"runs/{depth}-{seed}",
        "parameters": 1_032_330,
        "seconds": 2.0,
    }
    return MemberResult(**{**values, **fields})  # type: ignore[arg-type]


RESULTS = [
    result("1", 0, 0.50, best_epoch=3, epochs=5),
    result("1", 1, 0.60, "stopped early"),
    result("1", 2, 0.70),
    result("2", 0, 0.80),
    result("2", 1, 0.90),
    result("2", 2, None, "failed", error="the loss is nan | at step 3"),
    result("4", 0, None, "failed", error="CUDA out of memory"),
    result("4", 1, None, "failed", error="CUDA out of memory"),
    result("4", 2, None, "waiting", parameters=None),
]


def test_a_setting_is_summed_up_over_its_runs_that_are_done() -> None:
    one, two, four = summarise(RESULTS)
    assert (one.num_runs, one.num_done, one.num_failed) == (3, 3, 0)
    top1 = one.metrics["top1"]
    assert (top1.mean, top1.std) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (top1.least, top1.most) == (0.5, 0.7)
    assert (two.num_runs, two.num_done, two.num_failed) == (3, 2, 1)
    assert two.metrics["top1"].mean == pytest.approx(0.85)
    assert two.metrics["top1"].std == pytest.approx(math.sqrt(0.005))
    assert (four.num_done, four.num_failed, four.metrics, four.seconds) == (0, 2, {}, None)
    assert best_setting(summarise(RESULTS)) == "depth=2"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_mean_and_spread_are_those_of_the_statistics_module(values: list[float]) -> None:
    (row,) = summarise([result("1", seed, value) for seed, value in enumerate(values)])
    spread = row.metrics["top1"]
    assert spread.mean == statistics.fmean(values)
    assert spread.std == (statistics.stdev(values) if len(values) > 1 else None)
    assert spread.least <= spread.mean + 1e-12 and spread.mean <= spread.most + 1e-12


def test_the_csv_of_runs_has_every_run_and_full_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(RESULTS))))
    assert len(rows) == len(RESULTS)
    assert rows[0] == {
        "depth": "1",
        "seed": "0",
        "status": "finished",
        "top1": "0.5",
        "top5": "0.75",
        "mean_class_accuracy": "0.5",
        "mean_average_precision": "",
        "loss": "1.25",
        "best_epoch": "3",
        "epochs": "5",
        "seconds": "2.0",
        "parameters": "1032330",
        "run": "runs/1-0",
        "error": "",
    }
    assert (rows[5]["status"], rows[5]["top1"], rows[5]["error"]) == ("failed", "", "the loss is nan | at step 3")


def test_the_csv_of_settings_has_mean_and_spread() -> None:
    rows = list(csv.DictReader(io.StringIO(summary_csv(summarise(RESULTS)))))
    assert [row["depth"] for row in rows] == ["1", "2", "4"]
    assert (float(rows[0]["top1_mean"]), float(rows[0]["top1_std"])) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (rows[2]["top1_mean"], rows[2]["runs"], rows[2]["done"], rows[2]["failed"]) == ("", "3", "0", "2")
    assert rows[0]["mean_average_precision_mean"] == ""


def test_the_markdown_is_a_table_with_the_best_in_bold_and_the_failed_below() -> None:
    assert results_markdown(RESULTS).splitlines() == [
        "| depth | top-1 | top-5 | mean class | min-max | runs | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 60.0 ± 10.0 | 75.0 ± 0.0 | 50.0 ± 0.0 | 50.0-70.0 | 3 | 1,032,330 |",
        "| 2 | **85.0 ± 7.1** | 75.0 ± 0.0 | 50.0 ± 0.0 | 80.0-90.0 | 2 of 3 | 1,032,330 |",
        "| 4 | - | - | - |  | 0 of 3 | 1,032,330 |",
        "",
        "Per cent on the validation split after the last epoch: mean ± sample standard deviation over the seeds.",
        "- failed: depth=2 seed=2: the loss is nan | at step 3",
        "- failed: depth=4 seed=0: CUDA out of memory",
        "- failed: depth=4 seed=1: CUDA out of memory",
    ]


def test_several_labels_a_video_are_compared_by_their_map() -> None:
    runs = [
        result(depth, 0, None, metrics={"mean_average_precision": value}) for depth, value in (("1", 0.5), ("2", 0.25))
    ]
    assert best_setting(summarise(runs)) == "depth=1"
    assert results_markdown(runs).startswith("| depth | mAP | min-max |")
    assert "mAP" in drawn(runs) and "top-1" not in drawn(runs)


def test_heads_have_a_column_where_there_are_several() -> None:
    runs = [
        result("1", 0, 0.5, label="evl depth=1"),
        result("", 0, 0.75, label="linear", head="linear", varied={}),
    ]
    assert results_markdown(runs).splitlines()[0].startswith("| head | depth | top-1")
    assert results_markdown(runs).splitlines()[3].startswith("| linear |  | **75.0** |")
    assert results_csv(runs).splitlines()[2].startswith("linear,,0,finished,0.75")


def drawn(results: list[MemberResult], columns: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=columns).print(results_table(results))
    return text.getvalue()


def test_the_table_is_whole_at_80_columns_with_four_settings() -> None:
    names = ("depth", "temporal_conv", "temporal_cross_attention", "mlp_dropout")
    runs = [
        result("", seed, top1, label=word, varied=dict.fromkeys(names, word))
        for word, top1 in (("1", 0.123), ("0.5", 1.0))
        for seed in (0, 1)
    ]
    lines = drawn(runs).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("* 100.0 ± 0.0" in line and "1.03 M" in line for line in lines)
    assert all(word in drawn(runs) for word in ("depth", "temporal", "cross", "attention", "dropout", "top-1"))


def test_the_table_shows_failed_settings_and_marks_the_best() -> None:
    lines = drawn([*RESULTS[:6], result("4", 0, None, "failed", error="x")]).splitlines()
    (failed,) = (line for line in lines if line.startswith("│ 4"))
    assert "failed" in failed and "0 of 1" in failed
    assert [line for line in lines if "*" in line] == [line for line in lines if line.startswith("│ 2")]
    assert failure_lines(RESULTS)[0] == "failed: depth=2 seed=2: the loss is nan | at step 3"


def test_a_sweep_without_validation_has_no_best_and_one_setting_none_either() -> None:
    unvalidated = [result(depth, 0, None) for depth in "12"]
    assert best_setting(summarise(unvalidated)) is None
    assert "-" in drawn(unvalidated)
    assert best_setting(summarise(RESULTS[:3])) is None


def test_the_files_hold_what_the_functions_give(tmp_path: Path) -> None:
    assert [path.name for path in write_results(tmp_path, RESULTS)] == ["results.csv", "summary.csv", "results.md"]
    assert (tmp_path / "results.csv").read_text() == results_csv(RESULTS)
    assert (tmp_path / "summary.csv").read_text() == summary_csv(summarise(RESULTS))
    assert (tmp_path / "results.md").read_text() == results_markdown(RESULTS)
