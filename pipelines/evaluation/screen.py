"""What `vcache eval` prints: the metrics with their intervals, labels of other kinds, classes, worst first; or all as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console

if TYPE_CHECKING:  # imported late: these load torch
    from vcache.pipelines.evaluation.bootstrap import Interval
    from vcache.pipelines.evaluation.evaluate import Evaluation
    from vcache.pipelines.evaluation.per_class import ClassMetrics

_LINES = (
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("mean_class_accuracy", "mean class accuracy"),
    ("mean_average_precision", "mAP"),
)


def print_evaluation(evaluation: Evaluation, intervals: Mapping[str, Interval], saved: Sequence[Path]) -> None:
    """A line for each metric, then of what they are, and where the predictions are."""
    from vcache.pipelines.stored_views import describe_grid

    metrics = evaluation.metrics
    for name, words in _LINES:
        value = getattr(metrics, name)
        if value is not None:
            _print(f"{words:<21}{_with_interval(value, intervals.get(name))}")
    for kind in evaluation.kinds:
        _print(f"{kind.kind:<21}top-1 {kind.top1:6.1%}   top-5 {kind.top5:6.1%}")
    left_out = f", {evaluation.num_failed} failed ones left out" if evaluation.num_failed else ""
    _print(f"loss                 {metrics.loss:.4f}")
    average = evaluation.predictions.average
    way = f", averaged: {average}" if average != "softmax" and metrics.views != "1x1" else ""
    _print(f"({console.count(metrics.num_videos, 'video')}, {describe_grid(metrics.views)}){way}{left_out}")
    if intervals:
        resamples = next(iter(intervals.values())).resamples
        _print(f"[low, high]: 95% of {resamples} bootstrap resamples of the videos")
    if saved:
        _print(f"saved {saved[0]} and {saved[-1].suffix}")


def print_classes(classes: Iterable[ClassMetrics]) -> None:
    """A table of the classes that have videos, the worst first."""
    from vcache.pipelines.evaluation.per_class import worst_first

    classes = tuple(classes)
    rows = worst_first(classes)
    several = any(row.average_precision is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    for name in ("videos", "AP" if several else "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most confused with", overflow="fold")
    for row in rows:
        confused = f"{row.confused_with} ({row.num_confused})" if row.confused_with is not None else ""
        table.add_row(escape(row.name), str(row.num_videos), f"{row.measured:.1%}", escape(confused))
    console.out.print(table, highlight=False)
    if absent := len(classes) - len(rows):
        _print(f"{absent} class{'es' * (absent > 1)} without a video in this split")


def described(
    evaluation: Evaluation, intervals: Mapping[str, Interval], classes: Iterable[ClassMetrics], saved: Sequence[Path]
) -> dict[str, Any]:
    """All of it for `--json`: the fields of the metrics at the top."""
    predictions, metrics = evaluation.predictions, evaluation.metrics
    return asdict(metrics) | {
        "monitored": {"name": metrics.monitored_name, "value": metrics.monitored},
        "run": predictions.run,
        "which": evaluation.which,
        "split": predictions.split,
        "average": predictions.average,
        "store_key": predictions.store_key,
        "num_failed": evaluation.num_failed,
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "kinds": [asdict(kind) for kind in evaluation.kinds],
        "classes": [asdict(row) for row in classes],
        "saved": [str(path) for path in saved],
    }


def _with_interval(value: float, interval: Interval | None) -> str:
    """ "72.5% [70.1, 74.9]"."""
    shown = f"{value:6.1%}"
    return shown if interval is None else f"{shown} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _print(line: str) -> None:
    console.out.print(line, highlight=False, soft_wrap=True, markup=False)
