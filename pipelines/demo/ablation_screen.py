"""What a person sees of `vcache demo --ablation`: how long it takes, a bar over all runs, and the tables beside the paper's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from vcache.pipelines import console
from vcache.pipelines.demo.table8 import MODULES, PAPER_DEEPER

if TYPE_CHECKING:  # imported late: it loads torch
    from vcache.pipelines.training.reports import StepReport, TrainingPlan


def announce(total: int, left: int, seconds: float, *, timed: bool) -> None:
    """How many runs there are to train and how long they take, before the first."""
    there = f"{total - left} of {console.count(total, 'run')} there already, " if left < total else ""
    if not left:
        console.err.print(f"\nall {console.count(total, 'run')} there already", highlight=False)
        return
    source = "by the runs that are there" if timed else "on two quiet cores; the first run will tell of this machine"
    console.err.print(
        f"\n{there}{console.count(left, 'run')} to train: about {console.duration(seconds)} {source}.\n"
        "Stopped at any time, the same command goes on after the last finished run.",
        highlight=False,
    )


@contextmanager
def ablation_bar(total: int, done: int) -> Iterator[AblationScreen]:
    """Two bars, the run at work and all runs; yields what moves them."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=36)),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console.err, transient=True) as progress:
        yield AblationScreen(progress, total, done)


class AblationScreen:
    """One after the other: `begin`, the callbacks `plan` and `step` of `train_head`, `finish`."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress, self.total, self.done = progress, total, done
        self.run = progress.add_task("", total=None, count="", state="")
        self.all = progress.add_task("all runs", total=total, completed=done, count=self._count(), state="")

    def begin(self, name: str, seconds: float, seconds_after: float) -> None:
        """A run begins that is expected to take `seconds`, and those after it `seconds_after`."""
        self.name, self.expected, self.after, self.began = name, seconds, seconds_after, time.monotonic()
        self.progress.update(self.run, description=escape(name), completed=0, total=None, count="", state="")
        self._show_left(0.0)

    def plan(self, plan: TrainingPlan) -> None:
        self.progress.update(self.run, total=plan.steps)
        self.steps = plan.steps

    def step(self, report: StepReport) -> None:
        head = report.heads[0]
        loss = "" if head.loss is None else f"loss {head.loss:.3f}"
        self.progress.update(self.run, completed=head.step, count=f"{head.step}/{self.steps} steps", state=loss)
        self._show_left(head.step / self.steps)

    def finish(self, top1: float | None, seconds: float, error: str | None, seconds_after: float) -> None:
        """A line that stays, also in a log file. `seconds_after`: what is left, now that this run has been timed."""
        self.done += 1
        came_to = f"[red]failed[/red]  {escape(error)}" if error else f"top-1 {top1:6.1%}  {seconds:4.0f} s"
        left = f"  ETA {console.duration(seconds_after)}" if self.done < self.total else ""
        self.progress.console.print(
            f"{self.done:>{len(str(self.total))}}/{self.total}  {escape(self.name):<28}  {came_to}{left}",
            highlight=False,
            soft_wrap=True,
        )
        self.progress.update(self.all, completed=self.done, count=self._count())

    def _count(self) -> str:
        return f"{self.done}/{self.total} runs"

    def _show_left(self, share: float) -> None:
        """The run at work by its own speed, once that is known; the others as expected."""
        own = (time.monotonic() - self.began) / share if share > 0.05 else self.expected
        left = own * (1 - share) + self.after
        self.progress.update(self.all, completed=self.done + share, state=f"ETA {console.duration(left)}")


def print_ablation(result: dict[str, Any]) -> None:
    """Both tables, what they are measured against, what failed, and where everything is."""
    gain = result["settings"]["tca_gain"]
    ours = "" if gain == 1.0 else f", T-CA x {gain:g} (ours, not the paper's)"
    modules, depths = result["tables"]["8a"], result["tables"]["8b"]
    _print_table(f"Table 8a: temporal modules{ours}", tuple(MODULES.values()), modules, result["seeds"])
    _print_table(f"Table 8b: depth, all modules{ours}", ("depth", "layers"), depths, result["seeds"])
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    over = f"mean and standard deviation over seeds {seeds}" if len(result["seeds"]) > 1 else f"seed {seeds} alone"
    deeper = ", ".join(f"{accuracy} at {depth}" for depth, accuracy in PAPER_DEEPER.items())
    for line in (
        f"Here: top-1 of {result['num_val']} validation videos, {over}. "
        f"Chance is {result['chance']:.0%}. A head that ignores the order, as the first row of 8a, cannot pass "
        f"{result['order_blind_bound']:.0%}: the motions are five pairs, each the other played backwards.",
        "Paper: ViT-B/16 on Kinetics-400 and Something-Something V2; K-400 by depth is its Table 6a. "
        f"Deeper, SSv2 has {deeper} of 12 blocks; the tiny CLIP has 4. Compare the order of the rows, not their height.",
    ):
        console.out.print(line, highlight=False)
    for failure in result["failed"]:
        name = f"{failure['variant']}, seed {failure['seed']}"
        console.out.print(f"[red]failed[/red]  {name}: {escape(failure['error'])}", highlight=False, soft_wrap=True)
    for name in ("store", "runs"):
        console.out.print(f"  {name:<9}{escape(result[name])}", highlight=False, soft_wrap=True)
    console.out.print(f"  results  {escape(', '.join(result['results']))}", highlight=False, soft_wrap=True)


def _print_table(title: str, first: tuple[str, ...], rows: list[dict[str, Any]], seeds: list[int]) -> None:
    table = Table(title=title, title_justify="left")
    for name in first:
        table.add_column(name, justify="center")
    for name in ("top-1 here", "a run", "paper K-400", "paper SSv2"):
        table.add_column(name, justify="right")
    for row in rows:
        marks = [_mark(row[name]) for name in MODULES]
        numbers = [_number(row[f"paper_{dataset}"]) for dataset in ("k400", "ssv2")]
        settings = marks if first[0] in MODULES.values() else [str(row["depth"]), f"-{row['depth']}:"]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        table.add_row(*settings, _accuracy(row, len(seeds)), seconds, *numbers)
    console.out.print(table)
    console.out.print()


def _mark(on: bool) -> str:
    return "✓" if on else "✗"


def _number(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.1f}%"


def _accuracy(row: dict[str, Any], num_seeds: int) -> str:
    """ "74.5 ± 3.1%", with how many seeds it is of where some failed."""
    num_runs = sum(run["top1"] is not None for run in row["runs"])
    if not num_runs:
        return "failed"
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    of = f" ({num_runs} of {num_seeds})" if num_runs < num_seeds else ""
    return f"{100 * row['mean']:.1f}{spread}%{of}"
