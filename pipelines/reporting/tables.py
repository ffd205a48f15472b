"""Tables that scroll inside a box of their own, and can be sorted where there is a script."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vcache.pipelines.reporting.markup import Content, Markup, tag


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it is sorted by."""

    content: Content
    value: float | int | None = None


@dataclass(frozen=True)
class Column:
    """The head of a column; numbers stand at the right."""

    title: str
    numeric: bool = False


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    label: str,
    sortable: bool = True,
    best: int | None = None,
) -> Markup:
    """The first cell of a row is its head; `best` is the place of the row that is marked, `label` says what the table is."""
    head = tag("tr", (tag("th", one.title, scope="col", class_="num" if one.numeric else None) for one in columns))
    body = (
        tag("tr", map(_cell, range(len(row)), columns, row), class_="best" if place == best else None)
        for place, row in enumerate(rows)
    )
    return scroll(tag("table", tag("thead", head), tag("tbody", body), data_sortable=sortable), label)


def scroll(content: Content, label: str) -> Markup:
    """A box that scrolls, also by the keyboard."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def bar(share: float) -> Markup:
    """A share of 0 to 1 as a bar before its number."""
    return tag("span", tag("i", style=f"width:{100 * share:.1f}%"), class_="bar", aria_hidden="true")


def _cell(place: int, column: Column, cell: Cell) -> Markup:
    value, kind = None if cell.value is None else f"{cell.value:.10g}", "num" if column.numeric else None
    if place == 0:
        return tag("th", cell.content, scope="row", class_=kind, data_value=value)
    return tag("td", cell.content, class_=kind, data_value=value)
