"""What a person sees of a training, on standard error: a bar and facts of one head, a table of several, or lines in a file.

Reports are only kept when they come; a thread of rich draws the last one a few times a second, so a step waits for no drawing.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from vcache.pipelines import console
from vcache.pipelines.training import screen_lines as lines

if TYPE_CHECKING:  # imported late: these load torch
    from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport, TrainingPlan, TrainingSummary

DRAWINGS_PER_SECOND = 8
"""A drawing takes half a millisecond of the interpreter, one of 24 heads a whole one."""
QUIET_SECONDS = 1.0
"""Reading features into memory is drawn if it takes longer."""
LINES_BELOW_TABLE = 6
"""Of the screen's height: header, hidden heads, bar, two lines of facts, and where the cursor stands."""


@contextmanager
def training_bar(title: str, *, epoch_lines: bool = True) -> Iterator[TrainingScreen]:
    """Yields the callbacks of a training, drawn until it ends, however it ends.

    Args:
        title: stands for the heads until the first step names them.
        epoch_lines: a line that stays for each epoch of a head that trains alone.
    """
    screen = TrainingScreen(title, epoch_lines=epoch_lines)
    try:
        yield screen
    finally:
        screen.close()


class TrainingScreen:
    """`load`, `plan`, `step` and `epoch` of one training, or of the groups of a sweep one after the other."""

    def __init__(self, title: str, *, epoch_lines: bool = True) -> None:
        self.title, self.epoch_lines = title, epoch_lines
        self._live: Live | None = None
        self._reset()

    def _reset(self) -> None:
        self._plan: TrainingPlan | None = None
        self._loading: tuple[int, int] | None = None
        self._report: StepReport | None = None
        self._logged_report: StepReport | None = None
        self._began = self._logged = time.monotonic()
        self._epochs: dict[str, EpochReport] = {}
        self._ended: set[str] = set()
        self._seen: dict[str, tuple[object, ...]] = {}
        self._changed: dict[str, float] = {}

    @property
    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Of `train_head`, `resume_run` and TrainingEvents, by their names."""
        return {"on_load": self.load, "on_plan": self.plan, "on_step": self.step, "on_epoch": self.epoch}

    def load(self, done: int, total: int) -> None:
        """Bytes that are read into memory before the plan; told only if that takes a while."""
        if self._loading is None:
            self.close()
            self._reset()
        self._loading = (done, total)
        now = time.monotonic()
        if self._live is None and console.err.is_interactive and now - self._began > QUIET_SECONDS:
            self._draw()
        elif not console.err.is_interactive and now - self._logged >= console.LOG_SECONDS:
            self._logged = now
            self._print(lines.load_line(done, total))

    def plan(self, plan: TrainingPlan) -> None:
        self.close()
        self._reset()
        for line in lines.plan_lines(plan):
            console.print_sentence(console.err, line)
        self._plan = plan
        if console.err.is_interactive:
            self._draw()

    def _draw(self) -> None:
        # Transient until the first step, so that no empty bar stands above an early error.
        self._live = Live(
            console=console.err,
            get_renderable=self._drawn,
            refresh_per_second=DRAWINGS_PER_SECOND,
            transient=True,
        )
        self._live.start(refresh=True)

    def step(self, report: StepReport) -> None:
        self._report = report
        for head in report.heads:
            if head.state != "training" and head.name not in self._ended:
                self._say_end(head)
        if self._live is not None:
            self._live.transient = False
        elif time.monotonic() - self._logged >= console.LOG_SECONDS:
            self._log()

    def epoch(self, report: EpochReport) -> None:
        self._epochs[report.head] = report
        alone = self._plan is None or self._plan.num_heads == 1
        if self.epoch_lines and (alone or self._live is None):  # of several heads on a terminal, the table says it
            self._print(f"{'' if alone else f'{escape(report.head)}: '}{lines.epoch_line(report)}")

    def close(self) -> None:
        """Leave the last drawing, or as a line for a file what was not logged yet."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._report is not None and self._report is not self._logged_report:
            self._log()

    def _say_end(self, head: HeadProgress) -> None:
        """A head that ends otherwise than by its last step gets a line that stays."""
        self._ended.add(head.name)
        if head.state != "finished":
            why = f": {escape(head.note)}" if head.note else ""
            word = f"[red]{head.state}[/red]" if head.state == "failed" else head.state
            self._print(f"{escape(head.name)} {word} after {console.count(head.step, 'step')}{why}")

    def _current(self, report: StepReport) -> StepReport:
        """With what epochs that ended since say: reports come a few times a second only, and not after the last step."""
        heads = tuple(_with_epoch(head, self._epochs.get(head.name)) for head in report.heads)
        longest = lines.last_to_finish(heads)
        left = report.seconds_left if longest.state == "training" and longest.step < longest.num_steps else None
        return replace(report, heads=heads, seconds_left=left)

    def _drawn(self) -> RenderableType:
        plan, last = self._plan, self._report
        if plan is None:
            return Text(lines.load_line(*self._loading) if self._loading else "", no_wrap=True, overflow="ellipsis")
        if last is None:
            title = self.title if plan.num_heads == 1 else plan.group or console.count(plan.num_heads, "head")
            return Group(lines.bar(title, 0, plan.steps, []), Text("  waiting for the first batch"))
        report, width = self._current(last), console.err.width
        longest, alone = lines.last_to_finish(report.heads), len(report.heads) == 1
        name = longest.name if alone else plan.group or console.count(len(report.heads), "head")
        facts = lines.bar_facts(report, plan.epochs, time.monotonic() - self._began)
        bar = lines.bar(name, longest.step, longest.num_steps, facts)
        of_heads = lines.head_facts(longest) if alone else lines.group_facts(report.heads)
        below = lines.fact_lines([of_heads, lines.speed_facts(report)], width)
        return Group(bar, below) if alone else Group(self._table(report, width), bar, below)

    def _table(self, report: StepReport, width: int) -> RenderableType:
        for head in report.heads:
            if self._seen.get(head.name) != (now := (head.state, head.val)):
                self._seen[head.name], self._changed[head.name] = now, time.monotonic()
        room = max(3, console.err.height - LINES_BELOW_TABLE)
        return lines.head_table(report.heads, self._changed, room, width)

    def _log(self) -> None:
        """A line for a file: a job of hours would be silent without."""
        if self._report is not None and self._plan is not None:
            self._logged, self._logged_report = time.monotonic(), self._report
            self._print(escape(lines.log_line(self._current(self._report), self._plan.epochs)))

    def _print(self, line: str) -> None:
        """Above the drawing, where there is one."""
        console.err.print(line, soft_wrap=True, highlight=False)


def print_training_summary(summary: TrainingSummary) -> None:
    """Where the run is, what it came to, and the command that goes on from there."""
    console.out.print(f"[bold]{escape(summary.run)}[/bold]", soft_wrap=True)
    if summary.last is not None and (value := summary.last.monitored) is not None:
        metric = "mAP" if summary.last.val_top1 is None else "top-1"
        line = f"  {metric} {value:.1%} of {summary.num_val} validation videos"
        if summary.best_epoch is not None and summary.best_value != value:
            line += f"; the best was {summary.best_value:.1%} after epoch {summary.best_epoch + 1}"
        console.out.print(line, highlight=False, soft_wrap=True)
    if summary.stopped_early and summary.last is not None:
        num_epochs = console.count(summary.last.epoch + 1, "epoch")
        console.out.print(f"  stopped early, after {num_epochs} of {summary.epochs}", highlight=False)
    command, why = ("resume", "stopped; go on") if summary.stopped else ("eval", "evaluate")
    line = shlex.join(["vcache", command, summary.run])
    console.out.print(f"  {why} with:  {escape(line)}", soft_wrap=True, highlight=False)


def _with_epoch(head: HeadProgress, epoch: EpochReport | None) -> HeadProgress:
    if epoch is None or epoch.step < head.step:
        return head
    values = [value for value in (head.best, epoch.monitored) if value is not None]
    return replace(
        head,
        step=epoch.step,
        epoch=epoch.epoch,
        lr=epoch.lr,
        loss=epoch.train_loss,
        train_top1=epoch.train_top1,
        val=epoch.monitored,
        best=max(values, default=None),
        state="finished" if head.state == "training" and epoch.step >= head.num_steps else head.state,
    )
