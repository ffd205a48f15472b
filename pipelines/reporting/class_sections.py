"""Classes: which are taken for which, and how good each is."""

import math
from collections.abc import Sequence

from vcache.pipelines.console import count
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.evaluation.per_class import ClassMetrics, worst_first
from vcache.pipelines.reporting.confusion import Confusion, confusion_of
from vcache.pipelines.reporting.markup import Content, Markup, tag
from vcache.pipelines.reporting.page import Section, caption
from vcache.pipelines.reporting.svg_chart import percent
from vcache.pipelines.reporting.tables import Cell, Column, bar, scroll, table

WHOLE = 20
"""Up to so many classes the matrix is shown as a table of all."""
OVERVIEW = 100
"""Up to so many it is shown as a picture, too: beyond, a cell is no longer seen."""
_BLOCK, _PAIRS = 14, 20


def confusion_section(evaluation: Evaluation, names: Sequence[str], anchor: str) -> Section:
    """The matrix of a few classes; of many its most confused block, and the most frequent mistakes as a list."""
    predictions = evaluation.predictions
    confusion = confusion_of(predictions, names)
    several = predictions.kind == "sigmoid"
    meaning = (
        "A row is a class, a column one that its videos do not have and that is ahead of it; videos may have several classes."
        if several
        else "A row is the class of a video, a column what the head says; numbers are videos."
    )
    content: list[Content] = [caption(meaning)]
    if len(names) <= WHOLE:
        content.append(_matrix(confusion, "Confusion matrix"))
    else:
        content += _of_many(confusion)
    if not confusion.off_diagonal.any():
        content.append(tag("p", "No video is taken for one of another class."))
    return Section(anchor, "Confusions", content)


def _of_many(confusion: Confusion) -> list[Content]:
    content: list[Content] = []
    if block := confusion.block(_BLOCK):
        part = confusion.part(block)
        share = part.off_diagonal.sum() / confusion.off_diagonal.sum()
        content += [
            tag("h3", f"The {len(block)} classes that are confused most"),
            caption(f"{percent(share)} of all mistakes of {len(confusion.names)} classes are among these."),
            _matrix(part, "Most confused classes"),
        ]
    if pairs := confusion.pairs(_PAIRS):
        content += [tag("h3", "Most frequent mistakes"), _pairs(confusion, pairs)]
    if len(confusion.names) <= OVERVIEW:
        content += [
            tag("h3", "All classes"),
            caption("Rows and columns in the order of the labels; dark is the share of the videos of the row."),
            _overview(confusion),
        ]
    return content


def _matrix(confusion: Confusion, label: str) -> Markup:
    """Shaded by the share of the row that is in the cell."""
    head = tag("tr", tag("td"), (tag("th", tag("span", name, title=name), scope="col") for name in confusion.names))
    sums = confusion.counts.sum(axis=1)
    body = (
        tag(
            "tr",
            tag("th", name, scope="row", title=name),
            (_cell(confusion, row, column, int(sums[row])) for column in range(len(confusion.names))),
        )
        for row, name in enumerate(confusion.names)
    )
    return scroll(tag("table", tag("thead", head), tag("tbody", body), class_="matrix"), label)


def _cell(confusion: Confusion, row: int, column: int, total: int) -> Markup:
    number = int(confusion.counts[row, column])
    share = number / total if total else 0.0
    kind = " ".join(["right"] * (row == column) + ["strong"] * (share > 0.55) + ["none"] * (number == 0))
    told = f"{confusion.names[row]} as {confusion.names[column]}: {count(number, 'video')}"
    style = f"background:rgb(var(--heat) / {share:.2f})" if number else None
    return tag("td", number, class_=kind or None, style=style, title=told)


def _pairs(confusion: Confusion, pairs: Sequence[tuple[int, int, int]]) -> Markup:
    columns = (
        Column("class"),
        Column("taken for"),
        Column("videos", numeric=True),
        Column("of the class", numeric=True),
    )
    sums = confusion.counts.sum(axis=1)
    rows = [
        (
            Cell(confusion.names[row]),
            Cell(confusion.names[column]),
            Cell(number, number),
            Cell(percent(number / sums[row]), float(number / sums[row])),
        )
        for row, column, number in pairs
    ]
    return table(columns, rows, label="Most frequent mistakes")


def _overview(confusion: Confusion) -> Markup:
    size, sums = len(confusion.names), confusion.counts.sum(axis=1)
    cells: list[Content] = [tag("rect", width=size, height=size, class_="ground")]
    for row, column in zip(*confusion.counts.nonzero(), strict=True):
        number = int(confusion.counts[row, column])
        told = f"{confusion.names[row]} as {confusion.names[column]}: {number}"
        share = max(0.06, number / sums[row])
        cells.append(
            tag(
                "rect",
                tag("title", told),
                x=int(column),
                y=int(row),
                width=1,
                height=1,
                fill_opacity=f"{share:.2f}",
                class_="cell",
            )
        )
    words = f"Confusion matrix of all {size} classes"
    return tag("svg", cells, viewBox=f"0 0 {size} {size}", role="img", aria_label=words, class_="overview")


def classes_section(evaluation: Evaluation, anchor: str) -> Section:
    """Every class that has videos, the worst first."""
    classes = evaluation.per_class()
    rows = worst_first(classes)
    several = any(row.average_precision is not None for row in rows)
    columns = (
        Column("class"),
        Column("videos", numeric=True),
        Column("AP" if several else "top-1", numeric=True),
        *(() if several else (Column("95% interval", numeric=True),)),
        Column("most confused with"),
        Column("in videos", numeric=True),
    )
    content = [
        caption(
            f"{count(len(rows), 'class').replace('classs', 'classes')} with videos",
            f", {len(classes) - len(rows)} without" if len(classes) > len(rows) else "",
            ". Click on a head to sort." if several else ". Intervals are Wilson's. Click on a head to sort.",
        ),
        table(columns, [_class_row(row, several) for row in rows], label="Classes"),
    ]
    return Section(anchor, "Classes", content)


def _class_row(row: ClassMetrics, several: bool) -> list[Cell]:
    measured = row.measured or 0.0
    low, high = wilson_interval(measured, row.num_videos)
    interval = [] if several else [Cell(f"{100 * low:.0f} to {100 * high:.0f}%", low)]
    return [
        Cell(row.name),
        Cell(f"{row.num_videos:,}", row.num_videos),
        Cell([bar(measured), percent(measured)], measured),
        *interval,
        Cell(row.confused_with or ""),
        Cell(row.num_confused or "", row.num_confused or None),
    ]


def wilson_interval(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """95% of a share of `number` videos (Wilson 1927), which stays in 0..1 and is wide for few videos; number must be above 0."""
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)
