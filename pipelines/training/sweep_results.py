"""What came of a sweep, as tables: a row for each run, and a row for each setting with mean and spread over its seeds.

results.csv   a run a line: what was varied, seed, status, metrics, epochs, seconds, parameters, run, error
summary.csv   a setting a line: of each metric mean, sample standard deviation, least and most over the seeds that are done
results.md    the summary in Markdown, for a paper or an issue, and the runs that failed

Metrics are those of the last epoch on the validation split, as `vcache eval` finds them again: in 0..1, for people in per cent.
Settings stand in the order of the sweep, where neighbours are compared; the best is marked.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vcache.pipelines.runs import write_text

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class", "mean_average_precision": "mAP"}
"""The larger the better, and their titles. The first that a sweep has is the one that settings are compared by."""
FILES = ("results.csv", "summary.csv", "results.md")


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """One run of a sweep, done or not."""

    label: str
    """The same for all seeds of a setting."""
    head: str
    varied: Mapping[str, str]
    seed: int
    status: str
    """"finished", "stopped early", "failed", "training" (begun and not done) or "waiting"."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of its last epoch, by the names of METRICS, and "loss"."""
    best_epoch: int | None = None
    """The epoch, from 0, whose weights are in best.safetensors."""
    epochs: int = 0
    seconds: float = 0.0
    """Of its epochs, spent on all heads of its group together."""
    parameters: int | None = None
    run: str = ""
    error: str | None = None
    """Why it failed."""

    @property
    def is_done(self) -> bool:
        return self.status in ("finished", "stopped early")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one metric over the seeds of a setting."""

    mean: float
    std: float | None
    """Sample standard deviation; None of one value."""
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class SettingSummary:
    """One setting over its seeds."""

    label: str
    head: str
    varied: Mapping[str, str]
    num_runs: int
    num_done: int
    num_failed: int
    metrics: Mapping[str, Spread]
    """Over the runs that are done; empty if none is."""
    seconds: float | None
    """Mean of a run."""
    parameters: int | None


def summarise(results: Sequence[MemberResult]) -> list[SettingSummary]:
    """A row for each setting, in the order in which they come first."""
    settings: dict[str, list[MemberResult]] = {}
    for result in results:
        settings.setdefault(result.label, []).append(result)
    return [_summary(runs) for runs in settings.values()]


def _summary(runs: Sequence[MemberResult]) -> SettingSummary:
    first, done = runs[0], [run for run in runs if run.is_done]
    return SettingSummary(
        label=first.label,
        head=first.head,
        varied=first.varied,
        num_runs=len(runs),
        num_done=len(done),
        num_failed=sum(run.status == "failed" for run in runs),
        metrics=dict(_spreads(done)),
        seconds=statistics.fmean(run.seconds for run in done) if done else None,
        parameters=next((run.parameters for run in runs if run.parameters is not None), None),
    )


def _spreads(runs: Sequence[MemberResult]) -> Iterable[tuple[str, Spread]]:
    for name in METRICS:
        values = [value for run in runs if (value := run.metrics.get(name)) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            yield name, Spread(mean=statistics.fmean(values), std=std, least=min(values), most=max(values))


def compared_metric(summaries: Sequence[SettingSummary]) -> str | None:
    """The metric that settings are compared by: top-1, of several labels a video mAP; None where nothing was validated."""
    return next((name for name in METRICS if any(name in row.metrics for row in summaries)), None)


def best_setting(summaries: Sequence[SettingSummary]) -> str | None:
    """The label of the setting with the largest mean, the first of equal ones; None if there is nothing to choose from."""
    metric = compared_metric(summaries)
    rows = [row for row in summaries if metric is not None and metric in row.metrics]
    if len(summaries) < 2 or not rows or metric is None:
        return None
    return max(rows, key=lambda row: row.metrics[metric].mean).label


def results_csv(results: Sequence[MemberResult]) -> str:
    names = _varied_names(results)
    header = [
        *_heads(results),
        *names,
        "seed",
        "status",
        *METRICS,
        "loss",
        "best_epoch",
        "epochs",
        "seconds",
        "parameters",
    ]
    rows = [
        [
            *([run.head] if _heads(results) else []),
            *(run.varied.get(name) for name in names),
            run.seed,
            run.status,
            *(run.metrics.get(name) for name in (*METRICS, "loss")),
            *(run.best_epoch, run.epochs, round(run.seconds, 3), run.parameters, run.run, run.error),
        ]
        for run in results
    ]
    return csv_text([*header, "run", "error"], rows)


def summary_csv(summaries: Sequence[SettingSummary]) -> str:
    names, parts = _varied_names(summaries), ("mean", "std", "least", "most")
    header = [*_heads(summaries), *names, "runs", "done", "failed"]
    header += [f"{metric}_{part}" for metric in METRICS for part in parts] + ["seconds", "parameters"]
    rows = [
        [
            *([row.head] if _heads(summaries) else []),
            *(row.varied.get(name) for name in names),
            *(row.num_runs, row.num_done, row.num_failed),
            *(getattr(row.metrics.get(metric), part, None) for metric in METRICS for part in parts),
            *(row.seconds, row.parameters),
        ]
        for row in summaries
    ]
    return csv_text(header, rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def results_markdown(results: Sequence[MemberResult]) -> str:
    """A table that pastes into an issue; the best mean of the compared metric is bold."""
    rows = summarise(results)
    names, metrics, best = _varied_names(rows), _metrics_of(rows), best_setting(rows)
    header = [*_heads(rows), *names, *(METRICS[name] for name in metrics), "min-max", "runs", "parameters"]
    lines = [markdown_row(header), markdown_row(["---"] * len(header))]
    for row in rows:
        values = [percent_of(row.metrics.get(name)) or missing_word(row) for name in metrics]
        if row.label == best:
            values[0] = f"**{values[0]}**"
        spread = row.metrics.get(metrics[0]) if metrics else None
        lines.append(
            markdown_row(
                [
                    *([row.head] if _heads(rows) else []),
                    *(row.varied.get(name, "") for name in names),
                    *values,
                    f"{100 * spread.least:.1f}-{100 * spread.most:.1f}" if spread else "",
                    _runs(row),
                    f"{row.parameters:,}" if row.parameters is not None else "",
                ]
            )
        )
    lines += [
        "",
        "Per cent on the validation split after the last epoch: mean ± sample standard deviation over the seeds.",
    ]
    lines += [f"- {' '.join(line.split())}" for line in failure_lines(results)]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def results_table(results: Sequence[MemberResult]) -> RenderableType:
    """For the terminal, whole at 80 columns with four settings: titles may take several lines, numbers may not."""
    rows = summarise(results)
    names, best = _varied_names(rows), best_setting(rows)
    titles = [*_heads(rows), *names]
    metrics = _metrics_of(rows)[: 2 if len(titles) < 4 else 1]
    table = Table()
    for title in titles:
        words = title.split("_")
        table.add_column(" ".join(words), overflow="fold", min_width=min(9, max(map(len, words))))
    for name in metrics:
        table.add_column(METRICS[name], justify="right", no_wrap=True)
    for title in ("runs", "params"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [percent_of(row.metrics.get(name)) or missing_word(row) for name in metrics]
        values = [values[0], *(value.split(" ")[0] for value in values[1:])]
        if row.label == best:
            values[0] = f"* {values[0]}"
        cells = [*([row.head] if _heads(rows) else []), *(row.varied.get(name, "") for name in names), *values]
        table.add_row(
            *map(escape, cells),
            f"[red]{_runs(row)}[/red]" if row.num_failed else _runs(row),
            _short(row.parameters),
            style="bold" if row.label == best else None,
        )
    spread = ", mean ± standard deviation over seeds" if any(row.num_done > 1 for row in rows) else ""
    return Group(Text(f"Validation after the last epoch, in per cent{spread}", style="italic"), table)


def failure_lines(results: Sequence[MemberResult]) -> list[str]:
    return [f"failed: {run.label} seed={run.seed}: {run.error}" for run in results if run.status == "failed"]


def write_results(folder: Path, results: Sequence[MemberResult]) -> list[Path]:
    """The three files; a reader sees the old ones or the new ones."""
    texts = (results_csv(results), summary_csv(summarise(results)), results_markdown(results))
    for name, text in zip(FILES, texts, strict=True):
        write_text(folder / name, text)
    return [folder / name for name in FILES]


def _varied_names(rows: Sequence[MemberResult] | Sequence[SettingSummary]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.varied))


def _heads(rows: Sequence[MemberResult] | Sequence[SettingSummary]) -> list[str]:
    """A column for the head where there are several, or nothing else to tell a row by."""
    return ["head"] if len({row.head for row in rows}) > 1 or not _varied_names(rows) else []


def _metrics_of(summaries: Sequence[SettingSummary]) -> list[str]:
    """Those that the sweep has; top-1 where nothing is done so far."""
    return [name for name in METRICS if any(name in row.metrics for row in summaries)] or ["top1"]


def percent_of(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{100 * spread.mean:.1f}" + (f" ± {100 * spread.std:.1f}" if spread.std is not None else "")


def missing_word(row: SettingSummary) -> str:
    return "failed" if row.num_failed == row.num_runs else "-"


def _runs(row: SettingSummary) -> str:
    """ "3", or "2 of 3" where not all are done."""
    return str(row.num_runs) if row.num_done == row.num_runs else f"{row.num_done} of {row.num_runs}"


def _short(number: int | None) -> str:
    """ "1.03 M", or all digits of a small number."""
    if number is None:
        return ""
    return f"{number:,}" if number < 10_000 else f"{number / 1e6:.2f} M"
