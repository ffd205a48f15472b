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
    from vcache.pipelines.evaluation.half_classes import HalfClasses
    from vcache.pipelines.evaluation.head_evaluation import Evaluation
    from vcache.pipelines.evaluation.per_class import ClassMetrics
    from vcache.pipelines.evaluation.predictions import Predictions
    from vcache.pipelines.evaluation.zero_shot import GroupMetrics

LINES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "mean_average_precision": "mAP",
}
"""Words for the metrics."""
HALF_LINES = {name: LINES[name] for name in ("top1", "top5", "mean_average_precision")}
"""Of these, what is said of halves of the classes."""


def print_evaluation(evaluation: Evaluation, intervals: Mapping[str, Interval], saved: Sequence[Path]) -> None:
    """A line for each metric, then of what they are, and where the predictions are."""
    from vcache.pipelines.evaluation.class_choice import TRAINED
    from vcache.pipelines.evaluation.zero_shot import chance, group_metrics

    metrics, predictions = evaluation.metrics, evaluation.predictions
    by_chance = chance(predictions) if predictions.of_classes != TRAINED else {}
    for name, words in LINES.items():
        value = getattr(metrics, name)
        if value is not None:
            beside = f"   chance {by_chance[name]:.1%}" if name in by_chance else ""
            _print(f"{words:<21}{with_interval(value, intervals.get(name))}{beside}")
    _print_groups(group_metrics(predictions))
    for kind in evaluation.kinds:
        _print(f"{kind.kind:<21}top-1 {kind.top1:6.1%}   top-5 {kind.top5:6.1%}")
    _print(f"loss                 {metrics.loss:.4f}")
    if halves := evaluation.half_classes:
        for name, words in HALF_LINES.items():
            if getattr(metrics, name) is not None:
                _print(f"{f'half-class {words}':<21}{with_deviation(halves, name)}")
    _print(describe_videos(evaluation))
    if halves:
        _print(describe_halves(halves))
    if intervals:
        _print(describe_intervals(intervals))
    if saved:
        _print(f"saved {saved[0]} and {saved[-1].suffix}")


def describe_videos(evaluation: Evaluation) -> str:
    """ "(200 videos of all 5 classes, mean of 3x1 views), averaged: logits, 2 failed ones left out"."""
    from vcache.pipelines.stored_views import describe_grid

    metrics, predictions = evaluation.metrics, evaluation.predictions
    left_out = f", {evaluation.num_failed} failed ones left out" if evaluation.num_failed else ""
    average = predictions.average
    way = f", averaged: {average}" if average != "softmax" and metrics.views != "1x1" else ""
    videos = console.count(metrics.num_videos, "video") + _of_classes(predictions)
    return f"({videos}, {describe_grid(metrics.views)}){way}{left_out}"


def describe_intervals(intervals: Mapping[str, Interval]) -> str:
    """What the brackets mean."""
    resamples = next(iter(intervals.values())).resamples
    return f"[low, high]: 95% of {resamples} bootstrap resamples of the videos"


def describe_halves(halves: HalfClasses) -> str:
    """What the numbers of halves mean."""
    return f"half-class: mean and deviation over {len(halves.draws)} draws of {halves.num_classes} of the classes"


def _of_classes(predictions: Predictions) -> str:
    """ " of the 2 left-out classes", or nothing where they are those that were trained on."""
    num_classes = predictions.scores.shape[1]
    return {
        "left-out": " of the "
        + ("1 class that was" if num_classes == 1 else f"{num_classes} classes that were")
        + " not trained on",
        "all": f" of all {num_classes} classes",
        "named": f" told apart from {num_classes} names",
    }.get(predictions.of_classes, "")


def _print_groups(groups: Sequence[GroupMetrics]) -> None:
    """A line for trained and for left-out classes, and their harmonic mean."""
    from vcache.pipelines.evaluation.zero_shot import harmonic_mean

    for group in groups:
        metrics = group.metrics
        told = f"{metrics.monitored_name} of {group.num_classes} classes"
        told += f", {console.count(metrics.num_videos, 'video')}" if metrics.top1 is not None else ""
        _print(f"{group.name:<21}{metrics.monitored:6.1%}   {told}")
    if (mean := harmonic_mean(groups)) is not None:
        _print(f"harmonic mean        {mean:6.1%}")


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
    from vcache.pipelines.evaluation.zero_shot import chance, group_metrics, harmonic_mean

    predictions, metrics = evaluation.predictions, evaluation.metrics
    groups = group_metrics(predictions)
    return asdict(metrics) | {
        "monitored": {"name": metrics.monitored_name, "value": metrics.monitored},
        "run": predictions.run,
        "which": evaluation.which,
        "split": predictions.split,
        "average": predictions.average,
        "store_key": predictions.store_key,
        "of_classes": predictions.of_classes,
        "num_classes": predictions.scores.shape[1],
        "chance": chance(predictions),
        "groups": [asdict(group) for group in groups],
        "harmonic_mean": harmonic_mean(groups),
        "half_classes": _described_halves(evaluation.half_classes),
        "num_failed": evaluation.num_failed,
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "kinds": [asdict(kind) for kind in evaluation.kinds],
        "classes": [asdict(row) for row in classes],
        "saved": [str(path) for path in saved],
    }


def with_interval(value: float, interval: Interval | None) -> str:
    """ "72.5% [70.1, 74.9]"."""
    shown = f"{value:6.1%}"
    return shown if interval is None else f"{shown} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def with_deviation(halves: HalfClasses, metric: str) -> str:
    """ "72.5% ± 2.1"."""
    mean, deviation = halves.mean(metric), halves.deviation(metric)
    return "" if mean is None or deviation is None else f"{mean:6.1%} ± {100 * deviation:.1f}"


def _described_halves(halves: HalfClasses | None) -> dict[str, Any] | None:
    if halves is None:
        return None
    told = {name: {"mean": halves.mean(name), "std": halves.deviation(name)} for name in HALF_LINES}
    return {"num_classes": halves.num_classes, **told, "draws": [asdict(metrics) for metrics in halves.draws]}


def _print(line: str) -> None:
    console.out.print(line, highlight=False, soft_wrap=True, markup=False)
