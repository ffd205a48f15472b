"""The reports of a training in words: lines of 80 columns, and a table of the heads that train side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vcache.pipelines.console import count, duration, size

if TYPE_CHECKING:  # imported late: it loads torch
    from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport, TrainingPlan

BAR_WIDTH = 24
TITLES = ("step", "loss", "train", "val", "best", "lr")
WIDE = 100
"""Columns of a terminal from which the table has the last of them too."""


def plan_lines(plan: TrainingPlan) -> Iterator[str]:
    """What is about to run: videos, heads, length, optimiser; then what is unusual about it."""
    views = f" in {plan.num_views} views" if plan.num_views > 1 else ""
    precision = "" if plan.precision == "float32" else f", {plan.precision}"
    heads = f"{count(plan.num_heads, 'head')} with " if plan.num_heads > 1 else ""
    parameters = f"{plan.num_parameters:,} parameter{'' if plan.num_parameters == 1 else 's'}"
    optimiser = f"AdamW lr {plan.recipe.lr:g}, weight decay {plan.recipe.weight_decay:g}, {plan.recipe.schedule}"
    yield (
        f"{plan.store.name}: {plan.num_train} videos{views} to train on, {plan.num_val} to validate on; "
        f"{heads}{parameters}, {count(plan.steps, 'step')} of {plan.recipe.batch_size} "
        f"({count(plan.epochs, 'epoch')}){'' if heads else f', {optimiser}'}{precision}"
    )
    begun = "; ".join(filter(None, (plan.group, f"resumed after {plan.resumed_from}" if plan.resumed_from else "")))
    of_tail = (_tail(plan), _kept(plan))
    facts = (begun, plan.subset, *of_tail, _warmup(plan), plan.residency, _shuffle(plan))
    yield from (f"  {fact}" for fact in facts if fact)


def _tail(plan: TrainingPlan) -> str:
    """Of the blocks of the backbone that are run in every step, and what they take in memory."""
    if (tail := plan.tail) is None:
        return ""
    first, last = tail.num_layers - tail.num_blocks, tail.num_layers - 1
    blocks = f"block {last}" if first == last else f"blocks {first} to {last}"
    runs, weights = ("Trains copies of", "; the originals are") if tail.trained else ("Runs", ":")
    return (
        f"{runs} {blocks} of {tail.num_layers} of {tail.model}{weights} {tail.num_weights:,} frozen weights in "
        f"{' and '.join(tail.dtypes)}, {size(tail.num_bytes)}"
    )


def _kept(plan: TrainingPlan) -> str:
    """Of what a step of these blocks keeps for its backward pass."""
    if (tail := plan.tail) is None or not tail.kept_bytes:  # nothing where the classifier alone is trained
        return ""
    if tail.checkpointing:
        return f"A step keeps about {size(tail.kept_bytes)} for its backward pass, which runs each block again"
    less = f"; with --set checkpointing=true {size(tail.checkpointed_bytes)}"
    advice = less if tail.checkpointed_bytes < tail.activation_bytes else ""  # of one block it is none
    return f"A step keeps about {size(tail.kept_bytes)} for its backward pass{advice}"


def _warmup(plan: TrainingPlan) -> str:
    """Of a paper's warm-up that a short training does not get past, so that it hardly learns."""
    recipe = plan.recipe
    if recipe.warmup_steps and recipe.warmup_steps >= plan.steps:
        length, name, there = count(recipe.warmup_steps, "step"), "warmup_steps", count(plan.steps, "step")
    elif recipe.warmup_epochs and recipe.warmup_epochs >= plan.epochs:
        length, name, there = _epochs(recipe.warmup_epochs), "warmup_epochs", count(plan.epochs, "epoch")
    else:
        return ""
    return f"The warm-up takes {length}, and the training {there}; a shorter one:  --set {name}=N"


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def _shuffle(plan: TrainingPlan) -> str:
    if plan.shuffle == "full":
        return ""
    held = f", in a buffer of about {size(plan.shuffle_bytes)} of memory" if plan.shuffle_bytes else ""
    return f"Epochs are shuffled shard by shard{held}"


def load_line(done: int, total: int) -> str:
    """What is read before the first step."""
    return f"reading features into memory: {size(done)} of {size(total)}"


def epoch_line(report: EpochReport) -> str:
    line = f"epoch {report.epoch + 1:>3}  loss {report.train_loss:.3f} {report.train_top1:6.1%}"
    names = {"top-1": report.val_top1, "top-5": report.val_top5, "mAP": report.val_mean_average_precision}
    line += f"  val {report.val_loss:.3f}" if report.val_loss is not None else ""
    line += "".join(f"  {name} {value:6.1%}" for name, value in names.items() if value is not None)
    return f"{line}  {duration(report.seconds)}{'  best' if report.best else ''}"


def head_facts(head: HeadProgress) -> list[str]:
    """Of a head alone: how well it does."""
    best = f" (best {head.best:.1%})" if head.best is not None else ""
    facts = [
        f"loss {head.loss:.3f}" if head.loss is not None else "",
        f"train top-1 {head.train_top1:.1%}" if head.train_top1 is not None else "",
        f"val {head.val:.1%}{best}" if head.val is not None else "",
        f"lr {head.lr:.2g}",
    ]
    return [fact for fact in facts if fact]


def group_facts(heads: Sequence[HeadProgress]) -> list[str]:
    """Of several heads together: how many of them are at it, and the best so far."""
    states = [head.state for head in heads]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(("training", *states)) if state in states]
    best = max(heads, key=_rank)
    return [*counts, *([f"best {best.name} {best.best:.1%}"] if best.best is not None else [])]


def speed_facts(report: StepReport) -> list[str]:
    """How fast it goes, where the data come from, and what a faster one would help."""
    rate, waiting = report.steps_per_second, report.waiting
    read = f"{size(int(report.read_bytes_per_second))}/s " if report.read_bytes_per_second else ""
    facts = [f"{rate:.3g} steps/s" if rate < 100 else f"{rate:,.0f} steps/s", f"{read}from {report.source}"]
    if report.limited_by is not None:
        share = waiting if report.limited_by == "reading" else 1 - waiting
        facts.append(f"limited by {report.limited_by} {share:.0%}")
    return facts


def log_line(report: StepReport, num_epochs: int) -> str:
    """All of it in one line of a file."""
    heads = report.heads
    alone, last = len(heads) == 1, last_to_finish(heads)
    facts = [f"{last.step}/{last.num_steps} steps", _epoch(last, num_epochs)]
    facts += head_facts(last) if alone else group_facts(heads)
    facts += speed_facts(report)
    facts += [f"{duration(report.seconds_left)} left"] if report.seconds_left else []
    return f"{last.name if alone else count(len(heads), 'head')}: {', '.join(facts)}"


def bar(name: str, completed: int, total: int, facts: Sequence[str]) -> RenderableType:
    """The name gives way where the line is too long."""
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True, overflow="ellipsis", max_width=20, ratio=1)
    line.add_column(width=BAR_WIDTH)
    line.add_column(no_wrap=True)
    done = Text(f"{completed}/{total} steps{''.join(f'  {fact}' for fact in facts)}")
    line.add_row(Text(name), ProgressBar(total=max(1, total), completed=completed, width=BAR_WIDTH), done)
    return line


def bar_facts(report: StepReport, num_epochs: int, elapsed: float) -> list[str]:
    minutes, seconds = divmod(int(elapsed), 60)
    left = [] if report.seconds_left is None else [f"ETA {duration(report.seconds_left)}"]
    return [_epoch(last_to_finish(report.heads), num_epochs), f"{minutes}:{seconds:02}", *left]


def fact_lines(groups: Sequence[Sequence[str]], width: int) -> RenderableType:
    """Each group on a line of its own, or all in one line where they fit."""
    lines = [f"  {', '.join(facts)}" for facts in groups]
    together = f"  {', '.join(fact for facts in groups for fact in facts)}"
    return Text(together if cell_len(together) <= width else "\n".join(lines), no_wrap=True, overflow="ellipsis")


def head_table(heads: Sequence[HeadProgress], changed: Mapping[str, float], room: int, width: int) -> RenderableType:
    """A row per head; of more than `room` of them the most telling, and how many the others are.

    Padded here and not by rich's Table, which takes ten times as long.

    Args:
        changed: when the state or the validation of a head last changed, by name.
    """
    shown = chosen_rows(heads, changed, room)
    best = max(heads, key=_rank)
    rows = [_cells(heads[i]) for i in shown]
    num_columns = len(TITLES) if width >= WIDE else len(TITLES) - 1
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)][:num_columns]
    longest = max(cell_len(heads[i].name) for i in shown)
    name_width = min(longest, max(8, width - sum(widths) - 2 * num_columns))

    def line(name: str, cells: Sequence[str], style: str) -> Text:
        numbers = (cell.rjust(number + 2) for cell, number in zip(cells, widths, strict=False))
        shortened = name if cell_len(name) <= name_width else f"{set_cell_size(name, name_width - 1)}…"
        return Text(set_cell_size(shortened, name_width) + "".join(numbers), style, no_wrap=True, overflow="crop")

    table = [line("head", TITLES, "bold")]
    table += [line(heads[i].name, row, _style(heads[i], heads[i] is best)) for i, row in zip(shown, rows, strict=True)]
    if hidden := len(heads) - len(shown):
        table.append(Text(f"  {hidden} more, between the best and the worst", "dim"))
    return Group(*table)


def chosen_rows(heads: Sequence[HeadProgress], changed: Mapping[str, float], room: int) -> list[int]:
    """At most `room` of the heads, in their order: in turns the best, the last changed and the worst of those that train."""
    if len(heads) <= room:
        return list(range(len(heads)))
    by_rank = sorted(range(len(heads)), key=lambda i: _rank(heads[i]), reverse=True)
    by_change = sorted(range(len(heads)), key=lambda i: changed.get(heads[i].name, -math.inf), reverse=True)
    worst = [i for i in reversed(by_rank) if heads[i].state != "failed"]
    turns = (i for turn in zip_longest(by_rank, by_change, worst) for i in turn if i is not None)
    return sorted(list(dict.fromkeys(turns))[:room])


def last_to_finish(heads: Sequence[HeadProgress]) -> HeadProgress:
    """The head with the most steps left, of those that train: its bar is the bar of all."""
    return max(heads, key=lambda head: (head.state == "training", head.num_steps - head.step))


def _rank(head: HeadProgress) -> tuple[float, float]:
    """The higher the better: by the best validation, without one by the loss."""
    return (-math.inf if head.best is None else head.best, -math.inf if head.loss is None else -head.loss)


def _epoch(head: HeadProgress, num_epochs: int) -> str:
    return f"epoch {min(head.epoch + 1, num_epochs)}/{num_epochs}"


def _cells(head: HeadProgress) -> list[str]:
    """In the order of TITLES."""
    loss = "-" if head.loss is None else f"{head.loss:.3f}"
    accuracies = ("-" if value is None else f"{value:.1%}" for value in (head.train_top1, head.val, head.best))
    return [_where(head), loss, *accuracies, f"{head.lr:.2g}"]


def _where(head: HeadProgress) -> str:
    words = {"training": f"{head.step}/{head.num_steps}", "stopped early": f"stopped {head.step}"}
    return words.get(head.state, f"{head.state} {head.step}")


def _style(head: HeadProgress, is_best: bool) -> str:
    if head.state == "failed":
        return "red"
    return "bold" if is_best else "dim" if head.state != "training" else ""
