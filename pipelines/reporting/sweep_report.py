"""The sections of a sweep: its table, what each setting does, curves, every run, failures, and the best run in full."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vcache.pipelines.console import count, duration
from vcache.pipelines.reporting.markup import Content, tag
from vcache.pipelines.reporting.page import Section, caption, note
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.reporting.run_report import Options, RunReport, report_run
from vcache.pipelines.reporting.svg_chart import percent
from vcache.pipelines.reporting.sweep_charts import curve_charts, setting_charts
from vcache.pipelines.reporting.tables import Cell, Column, table
from vcache.pipelines.training.sweep import Sweep
from vcache.pipelines.training.sweep_results import (
    METRICS,
    MemberResult,
    SettingSummary,
    best_setting,
    compared_metric,
    percent_of,
    summarise,
)


def report_sweep(path: Path, options: Options, on_stage: Callable[[str], None]) -> RunReport:
    """
    Raises:
        RunError, StoreError: as for the report of its best run.
    """
    sweep = Sweep.open(path)
    results = sweep.results()
    rows = summarise(results)
    metric = compared_metric(rows)
    best = best_setting(rows) or (rows[0].label if len(rows) == 1 else None)
    chosen = best_run(results, best, metric)
    sections = [_settings_section(rows, metric, best, chosen)]
    if metric is not None:
        if charts := setting_charts(sweep, results, metric):
            sections.append(Section("plots", "What each setting does", tag("div", charts, class_="charts")))
        charts = curve_charts(results, metric, best)
        sections.append(Section("curves", "Curves of all runs", tag("div", charts, class_="charts")))
    sections.append(_runs_section(results, metric, chosen))
    if failed := _failures(results, sweep.plan.skipped):
        sections.append(Section("failures", "Failures", failed))
    notes: list[str] = []
    if chosen is not None:
        found = report_run(RunRecord.open(Path(chosen.run)), options, on_stage, prefix="best-")
        sections += [Section(one.anchor, f"Best run: {one.title.lower()}", one.content) for one in found.sections]
        notes = found.notes
    return RunReport(_result(rows, results, metric, best), sections, notes)


def best_run(results: Sequence[MemberResult], best: str | None, metric: str | None) -> MemberResult | None:
    """Of the setting with the best mean, the run with the largest value."""
    done = [one for one in results if one.label == best and metric is not None and one.metrics.get(metric) is not None]
    return max(done, key=lambda one: one.metrics[metric] or 0.0) if done and metric is not None else None


def _result(
    rows: Sequence[SettingSummary], results: Sequence[MemberResult], metric: str | None, best: str | None
) -> str:
    done = sum(one.is_done for one in results)
    runs = count(done, "run") if done == len(results) else f"{done} of {count(len(results), 'run')} done"
    of = f"{runs} of {count(len(rows), 'setting')}"
    row = next((row for row in rows if row.label == best and metric in row.metrics), None)
    if metric is None or row is None:
        return of
    return f"{of}; best {METRICS[metric]} {percent_of(row.metrics[metric])}% with {row.label}"


def _settings_section(
    rows: Sequence[SettingSummary], metric: str | None, best: str | None, chosen: MemberResult | None
) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row.varied))
    heads = len({row.head for row in rows}) > 1 or not names
    metrics = [name for name in METRICS if any(name in row.metrics for row in rows)]
    columns = [
        *([Column("head")] if heads else []),
        *(Column(name.replace("_", " "), numeric=_all_numbers(rows, name)) for name in names),
        *(Column(METRICS[name], numeric=True) for name in metrics),
        *([Column("least to most", numeric=True)] if metric else []),
        Column("runs", numeric=True),
        Column("parameters", numeric=True),
        Column("time", numeric=True),
    ]
    cells = [_setting_row(row, names, heads, metrics, metric) for row in rows]
    place = next((place for place, row in enumerate(rows) if row.label == best), None)
    content: list[Content] = [
        caption(
            "Per cent on the validation split after the last epoch: mean ± sample standard deviation over the seeds. The best "
            "mean is marked; it is the best of several on the very videos it was chosen by, which flatters it."
        ),
        table(columns, cells, label="Settings", best=place if len(rows) > 1 else None),
    ]
    if chosen is not None:
        name = tag("code", Path(chosen.run).name)
        content.append(
            tag(
                "p",
                "The best run of the best setting, ",
                tag("a", name, href="#best-result"),
                ", is shown in full below.",
            )
        )
    return Section("table", "Settings", content)


def _all_numbers(rows: Sequence[SettingSummary], name: str) -> bool:
    return all(_number(row.varied.get(name, "")) is not None for row in rows)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _setting_row(
    row: SettingSummary, names: Sequence[str], heads: bool, metrics: Sequence[str], metric: str | None
) -> list[Cell]:
    cells = [Cell(row.head)] if heads else []
    cells += [Cell(row.varied.get(name, ""), _number(row.varied.get(name, ""))) for name in names]
    for name in metrics:
        spread = row.metrics.get(name)
        cells.append(
            Cell(
                percent_of(spread) or ("failed" if row.num_failed == row.num_runs else "-"),
                spread.mean if spread else None,
            )
        )
    if metric:
        spread = row.metrics.get(metric)
        cells.append(
            Cell(
                f"{100 * spread.least:.1f} to {100 * spread.most:.1f}" if spread else "",
                spread.least if spread else None,
            )
        )
    runs = str(row.num_runs) if row.num_done == row.num_runs else f"{row.num_done} of {row.num_runs}"
    cells.append(Cell(runs, row.num_done))
    cells.append(Cell(f"{row.parameters:,}" if row.parameters is not None else "", row.parameters))
    cells.append(Cell(duration(row.seconds) if row.seconds is not None else "", row.seconds))
    return cells


def _runs_section(results: Sequence[MemberResult], metric: str | None, chosen: MemberResult | None) -> Section:
    columns = (
        Column("run"),
        Column("seed", numeric=True),
        Column("status"),
        Column(METRICS[metric] if metric else "metric", numeric=True),
        Column("loss", numeric=True),
        Column("best epoch", numeric=True),
        Column("epochs", numeric=True),
    )
    cells = []
    for one in results:
        value, loss = one.metrics.get(metric) if metric else None, one.metrics.get("loss")
        best = None if one.best_epoch is None else one.best_epoch + 1
        name = tag("code", Path(one.run).name)
        cells.append(
            (
                Cell(tag("a", name, href="#best-result") if one is chosen else name),
                Cell(one.seed, one.seed),
                Cell(tag("span", one.status, class_="bad") if one.status == "failed" else one.status),
                Cell(percent(value) if value is not None else "", value),
                Cell(f"{loss:.3f}" if loss is not None else "", loss),
                Cell(best if best is not None else "", best),
                Cell(one.epochs, one.epochs),
            )
        )
    place = next((place for place, one in enumerate(results) if one is chosen), None)
    return Section("runs", "Runs", table(columns, cells, label="Runs", best=place))


def _failures(results: Sequence[MemberResult], skipped: Sequence[tuple[str, str]]) -> list[Content]:
    rows = [(f"{one.label} seed={one.seed}", one.error or "") for one in results if one.status == "failed"]
    content: list[Content] = [note(tag("strong", name), ": ", reason) for name, reason in rows]
    content += [note(tag("strong", name), " was skipped: ", reason) for name, reason in skipped]
    return content
