"""What `vcache compare` shows: tables for people, one JSON object for programs, one CSV for a spreadsheet."""

import statistics
import string
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.reporting.compare_words import WORDS, brackets, conclusions, p_word
from vcache.pipelines.reporting.comparison import ClassDifference, Comparison, Contender, MeasureDifference, Pair
from vcache.pipelines.runs import write_text
from vcache.pipelines.training.sweep_results import csv_text

SHOWN_VIDEOS = 3
"""In either direction; --json has more."""


def print_comparison(comparison: Comparison, *, per_class: bool = False) -> None:
    """Who is compared, the differences, with `per_class` the classes, the videos they differ most on, and the conclusions."""
    letters = _letters(len(comparison.contenders))
    console.out.print(_contenders_table(comparison, letters))
    console.out.print(_of_what(comparison), highlight=False, markup=False, soft_wrap=True)
    console.out.print()
    by_name = dict(zip((contender.name for contender in comparison.contenders), letters, strict=True))
    old = by_name[comparison.reference.name]
    if len(comparison.pairs) == 1:
        pair = comparison.pairs[0]
        console.out.print(_measures_table(pair, old, by_name[pair.other]))
        _print_agreement(pair, old, by_name[pair.other])
    else:
        console.out.print(_pairs_table(comparison, by_name))
    for pair in comparison.pairs:
        _print_details(comparison, pair, old, by_name[pair.other], per_class=per_class)
    console.out.print()
    for line in conclusions(comparison):
        console.print_sentence(console.out, line)


def described(comparison: Comparison) -> dict[str, Any]:
    """The same for a program."""
    return asdict(comparison) | {"conclusions": conclusions(comparison)}


def write_comparison_csv(comparison: Comparison, path: Path) -> None:
    """A line for each metric of each comparison, and one for each class: `class` is empty where it is of all videos.

    Raises:
        OSError: the file cannot be written.
    """
    header = ("reference", "compared", "measure", "class", "videos", "reference_value", "compared_value", "difference")
    tests = (
        "low",
        "high",
        "only_reference",
        "only_compared",
        "p_mcnemar",
        "p_holm",
        "seeds_low",
        "seeds_high",
        "p_welch",
    )
    rows: list[Sequence[object]] = []
    for pair in comparison.pairs:
        start = (comparison.reference.name, pair.other)
        rows += [(*start, *_measure_row(comparison, pair, measure)) for measure in pair.measures]
        rows += [(*start, *_class_row(pair, row)) for row in pair.classes]
    write_text(path, csv_text((*header, *tests), rows))


def _measure_row(comparison: Comparison, pair: Pair, row: MeasureDifference) -> tuple[object, ...]:
    seeds, p_holm = row.seeds, pair.p_holm if row is pair.measures[0] else None
    values = (row.measure, "", comparison.num_videos, row.reference, row.other, row.difference)
    tests = (row.interval.low, row.interval.high, row.only_reference, row.only_other, row.p_value, p_holm)
    return (*values, *tests, *((seeds.low, seeds.high, seeds.p_value) if seeds else (None, None, None)))


def _class_row(pair: Pair, row: ClassDifference) -> tuple[object, ...]:
    measure = "average_precision" if row.interval else pair.measures[0].measure
    ends = (row.interval.low, row.interval.high) if row.interval else (None, None)
    values = (measure, row.name, row.num_videos, row.reference, row.other, row.difference)
    return (*values, *ends, row.only_reference, row.only_other, row.p_value, row.p_holm, None, None, None)


def _contenders_table(comparison: Comparison, letters: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for letter, contender in zip(letters, comparison.contenders, strict=True):
        several = console.count(len(contender.runs), "run") if len(contender.runs) > 1 else ""
        role = "reference" if contender.name == comparison.reference.name else ""
        table.add_row(letter, escape(contender.name), ", ".join(filter(None, (several, role))))
    return table


def _of_what(comparison: Comparison) -> str:
    views = f", {comparison.views} views" if comparison.views else ""
    split = f" of {comparison.split}" if comparison.split else ""
    return f"{console.count(comparison.num_videos, 'video')}{split}, {comparison.num_classes} classes{views}"


def _measures_table(pair: Pair, old: str, new: str) -> Table:
    titles = [" ", old, new, f"{new} - {old}", "95%"]
    first = pair.measures[0]
    seeds, tested = first.seeds is not None, first.p_value is not None
    table = _table(*titles, *["95% of seeds", "Welch p"] * seeds, *[f"only {old}", f"only {new}", "McNemar p"] * tested)
    for row in pair.measures:
        cells = [WORDS[row.measure], f"{row.reference:.1%}", f"{row.other:.1%}", f"{100 * row.difference:+.1f}"]
        cells.append(brackets(row.interval))
        cells += _seed_cells(row) if seeds else []
        cells += _test_cells(row.only_reference, row.only_other, row.p_value) if tested else []
        table.add_row(*map(escape, cells))
    return table


def _pairs_table(comparison: Comparison, letters: dict[str, str]) -> Table:
    """A row for each contender, of the first measure."""
    measures = [pair.measures[0] for pair in comparison.pairs]
    old, by_name = letters[comparison.reference.name], {pair.other: pair for pair in comparison.pairs}
    seeds, tested = any(row.seeds for row in measures), any(row.p_value is not None for row in measures)
    titles = [" ", WORDS[measures[0].measure], f"less {old}", "95%"]
    columns = ["95% of seeds"] * seeds + [f"only {old}", "only it"] * tested + ["p (Holm)"] * (seeds or tested)
    table = _table(*titles, *columns)
    for contender in comparison.contenders:
        pair = by_name.get(contender.name)
        cells = [letters[contender.name], _mean(contender, measures[0].measure)]
        if pair is not None:
            row = pair.measures[0]
            cells += [f"{100 * row.difference:+.1f}", brackets(row.interval)]
            cells += _seed_cells(row)[:1] if seeds else []
            cells += _test_cells(row.only_reference, row.only_other, pair.p_holm)[:2] if tested else []
            cells += [p_word(pair.p_holm)] if pair.p_holm is not None else []
        table.add_row(*map(escape, cells))
    return table


def _mean(contender: Contender, measure: str) -> str:
    values = contender.values(measure)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{contender.mean(measure):.1%}{spread}"


def _seed_cells(row: MeasureDifference) -> list[str]:
    if row.seeds is None or row.seeds.low is None or row.seeds.high is None or row.seeds.p_value is None:
        return ["", ""]
    return [f"[{100 * row.seeds.low:+.1f}, {100 * row.seeds.high:+.1f}]", p_word(row.seeds.p_value)]


def _test_cells(only_old: int | None, only_new: int | None, p_value: float | None) -> list[str]:
    if only_old is None or only_new is None or p_value is None:
        return ["", "", ""]
    return [str(only_old), str(only_new), p_word(p_value)]


def _print_agreement(pair: Pair, old: str, new: str) -> None:
    first = pair.measures[0]
    if pair.both_right is not None:
        told = (
            f"right: both {pair.both_right}, only {old} {first.only_reference}, only {new} {first.only_other}, neither "
        )
        console.out.print(f"{told}{pair.neither_right}", highlight=False, soft_wrap=True)


def _print_details(comparison: Comparison, pair: Pair, old: str, new: str, *, per_class: bool) -> None:
    if per_class:
        console.out.print()
        console.out.print(_classes_table(pair, old, new))
        if pair.classes and pair.classes[0].p_holm is not None:
            found = sum((row.p_holm or 0.0) < 0.05 for row in pair.classes)
            console.out.print(
                f"p is McNemar's, corrected over {len(pair.classes)} classes (Holm): {found} differ at 0.05",
                highlight=False,
            )
    if len(comparison.pairs) == 1 and (pair.gained or pair.lost):
        console.out.print()
        console.out.print(_videos_table(pair, old, new))


def _classes_table(pair: Pair, old: str, new: str) -> Table:
    tested, ranged = (any(getattr(row, name) is not None for row in pair.classes) for name in ("p_holm", "interval"))
    table = _table(
        "class", "videos", old, new, f"{new} - {old}", *["95%"] * ranged, *[f"only {old}", f"only {new}", "p"] * tested
    )
    for row in pair.classes:
        cells = [
            row.name,
            str(row.num_videos),
            f"{row.reference:.1%}",
            f"{row.other:.1%}",
            f"{100 * row.difference:+.1f}",
        ]
        cells += [brackets(row.interval)] if row.interval else []
        cells += _test_cells(row.only_reference, row.only_other, row.p_holm) if tested else []
        table.add_row(*map(escape, cells))
    return table


def _videos_table(pair: Pair, old: str, new: str) -> Table:
    """The probability of the video's class with either."""
    table = _table("they differ most on", "class", old, new)
    for row in (*pair.gained[:SHOWN_VIDEOS], *reversed(pair.lost[:SHOWN_VIDEOS])):
        table.add_row(escape(row.video), escape(row.label), f"{row.reference:.2f}", f"{row.other:.2f}")
    return table


def _table(*titles: str) -> Table:
    """Texts under titles in small letters or none, numbers under the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        is_text = not title.strip() or title in ("class", "they differ most on")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def _letters(number: int) -> list[str]:
    """A, B, ..., Z, A2, B2, ..."""
    return [string.ascii_uppercase[i % 26] + (str(i // 26 + 1) if i >= 26 else "") for i in range(number)]
