"""What a person sees: progress bars on standard error, tables on standard output. Numbers come from elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:  # imported late: these load torch and zarr
    from vcache.pipelines.extraction import ExtractionSummary
    from vcache.pipelines.progress import ExtractionProgress
    from vcache.store.retry import RetrySummary

out = Console()
err = Console(stderr=True)

LOG_SECONDS = 60.0
"""Between two lines of progress where standard error is a file or a pipe."""


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1000: "1.2 GB"."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min(4, (len(str(num_bytes)) - 1) // 3)
    value = num_bytes / 1000**power
    return f"{value:.0f} {' kMGT'[power]}B" if value >= 100 else f"{value:.1f} {' kMGT'[power]}B"


def duration(seconds: float) -> str:
    """A time for people, in the unit that leaves a number of one to three digits: "17 ms", "4.2 h", "3.1 days"."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def count(number: int, noun: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """Plain JSON on standard output, not wrapped and not coloured."""
    print(json.dumps(value, indent=2, default=str))


def print_sentence(where: Console, line: str) -> None:
    """Plain words, on a terminal broken between them and set in below the first line; in a file one line."""
    indent = len(line) - len(line.lstrip())
    if where.is_terminal:
        line = textwrap.fill(
            line, where.width, subsequent_indent=" " * (indent + 2), break_on_hyphens=False, break_long_words=False
        )
    where.print(line, soft_wrap=True, markup=False, highlight=False)


def fail(message: str) -> NoReturn:
    """Ends the command with a message of what went wrong, and exit status 1."""
    err.print("[bold red]error:[/bold red]", end=" ")
    err.print(message, soft_wrap=True, markup=False, highlight=False)
    sys.exit(1)


@contextmanager
def extraction_screen(title: str) -> Iterator[ExtractionScreen]:
    """The callbacks of `run_extraction`, drawn."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=16, overflow="ellipsis")),
        BarColumn(bar_width=24),  # alone gives way where the line is too long
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[rates]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )
    # Over five minutes: a batch of a large model on a CPU takes longer than the default of 30 s, which would show no ETA.
    progress, status = _TwoLines(*columns, console=err, speed_estimate_period=300), err.status("")
    try:
        with _stopped_at_the_end(progress):
            yield ExtractionScreen(title, progress, status)
    finally:
        status.stop()


class _TwoLines(Progress):
    """A bar with a line of text below it: together they do not fit into the 80 columns of a terminal."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text.from_markup(f"  {self.below}")


class ExtractionScreen:
    """First a spinner that names what is being done, then a bar with rates, ETA, bytes, failures and what limits."""

    def __init__(self, title: str, progress: _TwoLines, status: Status) -> None:
        self.title, self.bar, self.status = title, progress, status
        self.logged = time.monotonic()

    def stage(self, name: str) -> None:
        self.status.update(f"{escape(name)} ...")
        self.status.start()

    def progress(self, state: ExtractionProgress) -> None:
        if not state.videos_total:
            return  # nothing is left to do
        if not self.bar.tasks:
            self.status.stop()  # only one of both can be on the screen
            self.bar.add_task(escape(self.title), total=None, rates="")
            self.bar.start()
        task, elapsed = self.bar.tasks[0].id, self.bar.tasks[0].elapsed or 0.0
        rates = ""
        if elapsed > 0 and state.videos_done:
            rates = f"{state.videos_done / elapsed:.1f} videos/s  {state.frames_done / elapsed:.0f} frames/s"
        failures = f"[red]{state.failures} failed[/red]" if state.failures else "0 failed"
        facts = [f"{size(state.bytes_written)} written", failures, where_and_why(state)]
        self.bar.below = ", ".join(fact for fact in facts if fact)
        self.bar.update(task, total=state.videos_total, completed=state.videos_done, rates=rates)
        if not err.is_terminal and time.monotonic() - self.logged >= LOG_SECONDS:
            self._log(state, rates)

    def _log(self, state: ExtractionProgress, rates: str) -> None:
        """A line for a file: a bar is drawn there once, at the end, and a job of hours would be silent until then."""
        self.logged, left = time.monotonic(), self.bar.tasks[0].time_remaining
        facts = [f"{state.videos_done}/{state.videos_total} videos", rates, self.bar.below]
        facts += [f"{duration(float(left))} left"] if left else []
        err.print(f"{escape(self.title)}: {', '.join(fact for fact in facts if fact)}", soft_wrap=True, highlight=False)


def where_and_why(state: ExtractionProgress) -> str:
    """How many workers of a cluster are at it, and what limits."""
    if state.workers is None:
        return limited_by(state.recent_limits)
    if not state.workers:
        return "[yellow]waiting for workers[/yellow]"
    return ", ".join(filter(None, (count(state.workers, "worker"), limited_by(state.recent_limits))))


def limited_by(shares: Mapping[str, float]) -> str:
    """ "limited by decode 83% (device 15%, disk 2%)", the largest share first; empty if nothing is known yet."""
    if not shares:
        return ""
    (most, share), *others = sorted(shares.items(), key=lambda item: -item[1])
    return f"limited by {most} {share:.0%} ({', '.join(f'{name} {other:.0%}' for name, other in others)})"


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A spinner that names what is being done; yields the callback that changes the name."""
    with err.status("") as status:
        yield lambda name: status.update(f"{escape(name)} ...")


def print_extraction_summary(summary: ExtractionSummary, num_stores: int = 1) -> None:
    """What one store holds now, what was done for it, and what limited the run, which wrote `num_stores` stores in all."""
    done, skipped = summary.progress.videos_done - summary.progress.failures, summary.progress.videos_skipped
    splits = ", ".join(f"{name} {rows}" for name, rows in summary.splits.items())
    written = f"{size(summary.progress.bytes_written)} written{f' to {num_stores} stores' if num_stores > 1 else ''}"
    out.print(f"[bold]{escape(summary.store)}[/bold]  (key {summary.key})", soft_wrap=True)
    out.print(
        f"  {splits} videos; {done} extracted now, {skipped} already there; {written}",
        soft_wrap=True,
    )
    if summary.progress.limits:
        out.print(f"  {limited_by(summary.progress.limits)}", soft_wrap=True, highlight=False)
    for split, num_added in summary.added.items():
        out.print(f"  {count(num_added, 'new video')} added to {split}", soft_wrap=True)
    if summary.text_note is not None:
        out.print(f"  {escape(summary.text_note)}", soft_wrap=True, highlight=False)
    if summary.retried is not None:
        print_retry(summary.retried)
    if summary.partial:
        out.print(f"  {count(len(summary.partial), 'row')} stored from damaged videos", highlight=False)
    if summary.failures:
        print_failures(summary)
    if summary.failures_file is not None:
        out.print(f"  listed in {escape(summary.failures_file)}", soft_wrap=True, highlight=False)


def print_retry(retried: RetrySummary) -> None:
    out.print(
        f"  {count(retried.tried, 'failed row')} extracted again: {retried.stored} stored now, {len(retried.failed)} failed",
        highlight=False,
    )
    for message in retried.left:
        out.print(f"  [red]left[/red]  {escape(message)}", highlight=False, soft_wrap=True)


def print_failures(summary: ExtractionSummary, most: int = 10) -> None:
    table = Table(
        title=f"{len(summary.failures)} of {summary.num_videos} videos failed", title_justify="left", box=None
    )
    for column in ("kind", "video", "reason"):
        table.add_column(column, overflow="fold")
    for failure in summary.failures[:most]:
        # Of several segments of a file, which; "clip [id].mp4" is no markup.
        video = failure.path if failure.video_id in failure.path else f"{failure.video_id} of {failure.path}"
        table.add_row(failure.kind, escape(video), escape(failure.reason))
    out.print(table)
    if len(summary.failures) > most:
        command = shlex.join(["vcache", "info", summary.store, "--json"])
        out.print(f"  ... and {len(summary.failures) - most} more:  {escape(command)}", soft_wrap=True)


@contextmanager
def _stopped_at_the_end(progress: Progress) -> Iterator[None]:
    """A bar is started by its first report, so that an early error has no empty bar above it."""
    try:
        yield
    finally:
        if progress.live.is_started:
            progress.stop()
