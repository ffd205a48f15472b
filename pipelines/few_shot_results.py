"""Accuracy over the number of shots: a row for each variant, a column for each number of videos of a class, zero-shot first.

few-shot.csv   a variant and a number of shots a line: mean, sample standard deviation, least and most over its seeds; 0 is CLIP
few-shot.md    the table, for a paper or an issue

Numbers are those of the sweep (sweep_results.py): after the last epoch, on the validation split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vcache.pipelines.few_shot_members import Shots, shots_word, variant_of
from vcache.pipelines.training.sweep_results import (
    METRICS,
    MemberResult,
    SettingSummary,
    csv_text,
    failure_lines,
    markdown_row,
    missing_word,
    percent_of,
    summarise,
)
from vcache.pipelines.training.sweep_spec import SweepMember

ZERO_SHOT = "zero-shot"
Metrics = Mapping[str, float | None]
"""By the names of METRICS, in 0..1."""


@dataclass(frozen=True, kw_only=True)
class FewShotRow:
    """One variant."""

    head: str
    variant: Mapping[str, str]
    """What tells it from others of its head."""
    zero_shot: Metrics | None
    """Of CLIP without training; None where the head does not classify by text of the store."""
    settings: tuple[SettingSummary | None, ...]
    """Over its seeds, for each number of shots; None where there is no such run."""


@dataclass(frozen=True, kw_only=True)
class FewShotTable:
    """All variants, over the same numbers of shots."""

    shots: tuple[Shots, ...]
    rows: tuple[FewShotRow, ...]

    @property
    def metric(self) -> str:
        """What is compared: top-1, of several labels a video mAP."""
        found = [one.metrics for row in self.rows for one in row.settings if one is not None]
        known = [{name for name, value in (row.zero_shot or {}).items() if value is not None} for row in self.rows]
        return next((name for name in METRICS if any(name in one for one in (*found, *known))), "top1")

    @property
    def names(self) -> list[str]:
        """Of what variants differ in."""
        return list(dict.fromkeys(name for row in self.rows for name in row.variant))

    @property
    def has_heads(self) -> bool:
        """Whether a row says its head: there are several, or nothing else to say."""
        return len({row.head for row in self.rows}) > 1 or not self.names

    @property
    def has_zero_shot(self) -> bool:
        return any(row.zero_shot for row in self.rows)

    def words(self, row: FewShotRow) -> list[str]:
        """What a row begins with."""
        return [row.head] * self.has_heads + [row.variant.get(name, "") for name in self.names]

    def label(self, row: FewShotRow) -> str:
        """The same as one text."""
        return " ".join([row.head] * self.has_heads + [f"{name}={value}" for name, value in row.variant.items()])

    def mean(self, row: FewShotRow, place: int) -> float | None:
        """Of a cell."""
        one = row.settings[place]
        return one.metrics[self.metric].mean if one is not None and self.metric in one.metrics else None

    def std(self, row: FewShotRow, place: int) -> float | None:
        one = row.settings[place]
        return one.metrics[self.metric].std if one is not None and self.metric in one.metrics else None


def few_shot_table(
    members: Sequence[SweepMember],
    results: Sequence[MemberResult],
    shots: Sequence[Shots],
    zero_shot: Sequence[Metrics | None],
) -> FewShotTable:
    """Variants in the order of the members; `zero_shot` is that of each member."""
    variants: dict[tuple[object, ...], list[int]] = {}
    for place, member in enumerate(members):
        variants.setdefault((member.config.head, *variant_of(member).items()), []).append(place)
    rows = []
    for places in variants.values():
        first = members[places[0]]
        of_shots = [[results[place] for place in places if members[place].config.shots == one] for one in shots]
        rows.append(
            FewShotRow(
                head=first.config.head,
                variant=variant_of(first),
                zero_shot=zero_shot[places[0]],
                settings=tuple(summarise(runs)[0] if runs else None for runs in of_shots),
            )
        )
    return FewShotTable(shots=tuple(shots), rows=tuple(rows))


def few_shot_csv(table: FewShotTable) -> str:
    """In full digits, 0..1."""
    header = ["head"] * table.has_heads + table.names
    return csv_text([*header, "shots", "metric", "mean", "std", "least", "most", "runs", "done"], _csv_rows(table))


def _csv_rows(table: FewShotTable) -> Iterator[Sequence[object]]:
    metric = table.metric
    for row in table.rows:
        words = table.words(row)
        if row.zero_shot:
            yield [*words, 0, metric, row.zero_shot.get(metric), None, None, None, None, None]
        for shots, one in zip(table.shots, row.settings, strict=True):
            if one is not None:
                spread = one.metrics.get(metric)
                numbers = [getattr(spread, part, None) for part in ("mean", "std", "least", "most")]
                yield [*words, shots_word(shots), metric, *numbers, one.num_runs, one.num_done]


def few_shot_markdown(table: FewShotTable, results: Sequence[MemberResult]) -> str:
    """The best of each column is bold."""
    header = _header(table)
    best = _best(table)
    lines = [markdown_row(header), markdown_row(["---"] * len(header))]
    for row in table.rows:
        cells = _cells(table, row)
        marked = [f"**{cell}**" if best.get(place) is row else cell for place, cell in enumerate(cells)]
        lines.append(markdown_row([*table.words(row), *marked]))
    lines += ["", _caption(table) + "."]
    lines += [f"- {' '.join(line.split())}" for line in failure_lines(results)]
    return "\n".join(lines) + "\n"


def few_shot_screen(table: FewShotTable) -> RenderableType:
    """For the terminal."""
    drawn, best, num_words = Table(), _best(table), len(table.names) + table.has_heads
    for place, title in enumerate(_header(table)):
        drawn.add_column(title, justify="left" if place < num_words else "right", overflow="fold")
    for row in table.rows:
        cells = [
            f"[bold]{escape(cell)}[/bold]" if best.get(place) is row else escape(cell)
            for place, cell in enumerate(_cells(table, row))
        ]
        drawn.add_row(*map(escape, table.words(row)), *cells)
    return Group(Text(_caption(table), style="italic"), drawn)


def few_shot_json(table: FewShotTable) -> list[dict[str, object]]:
    """A variant each."""
    return [
        {
            "head": row.head,
            "variant": dict(row.variant),
            "metric": table.metric,
            "zero_shot": row.zero_shot.get(table.metric) if row.zero_shot else None,
            "shots": {
                shots_word(shots): {"mean": table.mean(row, place), "std": table.std(row, place)}
                for place, shots in enumerate(table.shots)
            },
        }
        for row in table.rows
    ]


def _header(table: FewShotTable) -> list[str]:
    words = ["head"] * table.has_heads + [" ".join(name.split("_")) for name in table.names]
    return [*words, *([ZERO_SHOT] if table.has_zero_shot else []), *(_column(shots) for shots in table.shots)]


def _column(shots: Shots) -> str:
    return shots_word(shots) if shots is None else f"{shots}-shot"


def _cells(table: FewShotTable, row: FewShotRow) -> list[str]:
    metric = table.metric
    known = row.zero_shot.get(metric) if row.zero_shot else None
    zero = [] if not table.has_zero_shot else ["-" if known is None else f"{100 * known:.1f}"]
    return [
        *zero,
        *("-" if one is None else percent_of(one.metrics.get(metric)) or missing_word(one) for one in row.settings),
    ]


def _best(table: FewShotTable) -> dict[int, FewShotRow]:
    """By the place of a cell, the row with the largest mean, the first of equal ones; nothing of one row alone."""
    found: dict[int, FewShotRow] = {}
    for place in range(len(table.shots) if len(table.rows) > 1 else 0):
        known = [(mean, row) for row in table.rows if (mean := table.mean(row, place)) is not None]
        if known:
            found[place + table.has_zero_shot] = max(known, key=lambda pair: pair[0])[1]
    return found


def _caption(table: FewShotTable) -> str:
    several = any(one.num_done > 1 for row in table.rows for one in row.settings if one is not None)
    spread = ": mean ± sample standard deviation over the seeds, each with other videos" if several else ""
    return f"{METRICS[table.metric]} in per cent on the validation split after the last epoch{spread}"
