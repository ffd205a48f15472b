"""What `vcache zero-shot` prints: a row for each set of templates, and of what they are; or all as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.evaluation.screen import (
    HALF_LINES,
    LINES,
    describe_halves,
    describe_intervals,
    describe_videos,
    described,
    print_classes,
    with_deviation,
    with_interval,
)

if TYPE_CHECKING:  # imported late: it loads torch
    from vcache.pipelines.evaluation.bootstrap import Interval
    from vcache.pipelines.zero_shot import ZeroShot


def print_zero_shot(found: ZeroShot, *, per_class: bool = False, saved: Sequence[Path] = ()) -> None:
    """The table, and below it what chance would give, of which videos it is, and where the predictions are."""
    if per_class:
        for row in found.rows:
            console.out.print(escape(row.templates), style="bold", highlight=False)
            print_classes(row.evaluation.per_class())
            console.out.print()
    intervals = [row.evaluation.intervals() for row in found.rows]
    console.out.print(_table(found, intervals), highlight=False)
    evaluation = found.rows[0].evaluation
    averaged = (
        f", {found.ensemble} of several templates averaged" if any(row.num_templates > 1 for row in found.rows) else ""
    )
    _print(f"{describe_videos(evaluation)}{averaged}")
    if evaluation.half_classes:
        _print(describe_halves(evaluation.half_classes))
    if intervals[0]:
        _print(describe_intervals(intervals[0]))
    for path in saved:
        _print(f"saved {path} and .csv")


def described_zero_shot(found: ZeroShot, saved: Sequence[Path] = ()) -> dict[str, Any]:
    """The same for a program: of each set of templates what `vcache eval --json` has."""
    sets = []
    for row, path in zip_longest(found.rows, saved):
        evaluation, files = row.evaluation, (path, path.with_suffix(".csv")) if path else ()
        told = described(evaluation, evaluation.intervals(), evaluation.per_class(), files)
        sets.append({"templates": row.templates, "num_templates": row.num_templates} | told)
    return {"store": str(found.store), "ensemble": found.ensemble, "sets": sets}


def _table(found: ZeroShot, intervals: Sequence[Mapping[str, Interval]]) -> Table:
    from vcache.pipelines.evaluation.zero_shot import chance

    first = found.rows[0].evaluation
    shown = {name: words for name, words in LINES.items() if getattr(first.metrics, name) is not None}
    of_halves = {name: words for name, words in HALF_LINES.items() if name in shown and first.half_classes}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("templates", overflow="fold")
    for title in ("texts", *shown.values(), *(f"half-class {words}" for words in of_halves.values())):
        table.add_column(title, justify="right")
    for row, of_row in zip(found.rows, intervals, strict=True):
        metrics, halves = row.evaluation.metrics, row.evaluation.half_classes
        words = [with_interval(getattr(metrics, name), of_row.get(name)).strip() for name in shown]
        words += [with_deviation(halves, name).strip() for name in of_halves if halves]
        table.add_row(escape(row.templates), str(row.num_templates), *words)
    by_chance = chance(first.predictions)
    table.add_row("chance", "", *(f"{by_chance[name]:.1%}" for name in shown), style="dim")
    return table


def _print(line: str) -> None:
    console.out.print(line, highlight=False, soft_wrap=True, markup=False)
