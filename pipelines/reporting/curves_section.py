"""How a training went, epoch by epoch, and how fast it was."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vcache.pipelines.console import count, duration, size
from vcache.pipelines.reporting.markup import Content, tag
from vcache.pipelines.reporting.page import Section, caption, facts, note
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.reporting.svg_chart import Chart, Series, chart, percent, short_percent, thinned
from vcache.pipelines.training.pace import LIMITED_SHARE

_FEW_EPOCHS = 3
"""With fewer, a curve over epochs says nothing, and the steps are drawn."""


def curves_section(record: RunRecord, anchor: str, chance: float | None = None) -> Section:
    """Loss, accuracy and learning rate; `chance` is drawn as a level of the accuracy."""
    if not record.epochs and not record.steps:
        return Section(anchor, "Curves", note("The run has no log of its training."))
    over_steps = len(record.epochs) < _FEW_EPOCHS and bool(record.steps)
    charts = [
        _loss(record, over_steps),
        _accuracy(record, over_steps, chance),
        _rate(record),
    ]
    shown = [chart(one) for one in charts if one.has_points]
    return Section(anchor, "Curves", [tag("div", shown, class_="charts"), *_lost(record), *_best(record)])


def _lost(record: RunRecord) -> list[Content]:
    """Where a loss stopped being a number, which is drawn as a gap and could be overlooked."""
    for line in record.epochs:
        for name, words in (("train_loss", "training"), ("val_loss", "validation")):
            value = line.get(name)
            if value is not None and not math.isfinite(value):
                return [note(f"The loss of {words} after epoch {line['epoch'] + 1} is no finite number.")]
    return []


def _best(record: RunRecord) -> list[Content]:
    best = record.best_epoch
    if best is None:
        return (
            []
            if record.validated
            else [note("The run had no split to validate on: only numbers of training are known.")]
        )
    name = "mAP" if record.monitored == "val_mean_average_precision" else "top-1"
    value, last = best[record.monitored], record.validated[-1]
    return [
        caption(
            f"Validation in training sees one view of each video. Its best {name}, {percent(value)}, came after epoch "
            f"{best['epoch'] + 1}; the last is "
            f"{percent(last[record.monitored])}. Results in this report are of the last weights."
        )
    ]


def _loss(record: RunRecord, over_steps: bool) -> Chart:
    train = _training(record, "train_loss", over_steps, "training")
    val = _validation(record, "val_loss", over_steps)
    return Chart(title="Loss", under=_under(over_steps), series=[train, *val], from_zero=True)


def _accuracy(record: RunRecord, over_steps: bool, chance: float | None) -> Chart:
    several = record.monitored == "val_mean_average_precision"
    train = [] if several else [_training(record, "train_top1", over_steps, "training")]
    return Chart(
        title="mAP" if several else "Top-1",
        note="" if several else "of training while it goes on",
        under=_under(over_steps),
        series=[*train, *_validation(record, record.monitored, over_steps)],
        word=percent,
        tick=short_percent,
        level=("chance", chance) if chance is not None else None,
        from_zero=True,
    )


def _rate(record: RunRecord) -> Chart:
    lines = [record.steps[place] for place in thinned(record.steps)]
    xs, ys = [line["step"] for line in lines], [line["lr"] for line in lines]
    series = Series(name="learning rate", xs=xs, ys=ys, colour=2)
    return Chart(title="Learning rate", under="step", series=[series], from_zero=True)


def _under(over_steps: bool) -> str:
    return "step" if over_steps else "epoch"


def _training(record: RunRecord, field: str, over_steps: bool, name: str) -> Series:
    lines: Sequence[Mapping[str, Any]] = record.steps if over_steps else record.epochs
    lines = [lines[place] for place in thinned(lines)]
    xs = [line["step"] if over_steps else line["epoch"] + 1 for line in lines]
    return Series(name=name, xs=xs, ys=[line.get(field) for line in lines])


def _validation(record: RunRecord, field: str, over_steps: bool) -> list[Series]:
    lines = [line for line in record.epochs if line.get(field) is not None]
    lines = [lines[place] for place in thinned(lines)]
    xs = [line["step"] if over_steps else line["epoch"] + 1 for line in lines]
    return [Series(name="validation", xs=xs, ys=[line[field] for line in lines], colour=1)] if lines else []


def speed_section(record: RunRecord, anchor: str) -> Section:
    """Steps and bytes per second, and what they waited for."""
    epochs, steps = record.epochs, record.steps
    if not epochs:
        return Section(anchor, "Speed", note("No epoch has ended, so no speed is known."))
    seconds = sum(line["seconds"] for line in epochs)
    waiting = sum(line["waiting_seconds"] for line in epochs)
    read, batch = sum(line["read_bytes"] for line in epochs), (record.config.get("recipe") or {}).get("batch_size")
    rate = epochs[-1]["step"] / seconds if seconds else 0.0
    sources = list(dict.fromkeys(line["source"] for line in steps if line.get("source")))
    rows: list[tuple[str, Content]] = [
        ("Time", f"{duration(seconds)} for {count(len(epochs), 'epoch')}, validation included"),
        ("Steps", f"{epochs[-1]['step']:,}, {_per_second(rate)} with validation"),
        ("Clips", f"{_per_second(rate * batch)} in training" if batch else "not known"),
        ("Read from", ", ".join(sources) or _where(read)),
        (
            "Read",
            f"{size(read)}, {size(int(read / seconds)) if seconds else '0 B'}/s on average"
            if read
            else "nothing after loading",
        ),
        ("Waited for data", f"{duration(waiting)}, {waiting / seconds:.1%} of the time" if seconds else "not known"),
        ("Limited by", "reading" if seconds and waiting / seconds > LIMITED_SHARE else "computing"),
    ]
    return Section(anchor, "Speed", [facts(rows), tag("div", _speed_charts(record), class_="charts")])


def _per_second(rate: float) -> str:
    return f"{rate:,.0f} per second" if rate >= 100 else f"{rate:.3g} per second"


def _where(read: int) -> str:
    """Of a run of before its log said it."""
    return "disk or bucket" if read else "memory"


def _speed_charts(record: RunRecord) -> list[Content]:
    lines = [record.steps[place] for place in thinned(record.steps)]
    xs = [line["step"] for line in lines]

    def of(field: str, factor: float = 1.0) -> list[float | None]:
        return [None if line.get(field) is None else factor * line[field] for line in lines]

    charts = [
        Chart(
            title="Steps per second",
            under="step",
            series=[Series(name="steps/s", xs=xs, ys=of("steps_per_second"))],
            from_zero=True,
        )
    ]
    if any(line.get("read_bytes_per_second") for line in lines):
        read = Series(name="MB/s", xs=xs, ys=of("read_bytes_per_second", 1e-6), colour=2)
        charts.append(Chart(title="Read, MB/s", under="step", series=[read], from_zero=True))
    waiting = Series(name="waiting", xs=xs, ys=of("waiting"), colour=1)
    charts.append(
        Chart(
            title="Share of the time waiting for data",
            under="step",
            series=[waiting],
            word=percent,
            tick=short_percent,
            from_zero=True,
        )
    )
    return [chart(one) for one in charts] if len(lines) > 1 else []
