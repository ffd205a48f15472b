"""A sweep as plots: what each varied setting does, and the curves of all its runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcache.pipelines.few_shot import FewShot
from vcache.pipelines.line_chart import COLOURS
from vcache.pipelines.reporting.markup import Markup
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.reporting.svg_chart import Chart, Series, chart, percent, short_percent, thinned
from vcache.pipelines.training.sweep import Sweep
from vcache.pipelines.training.sweep_results import METRICS, MemberResult, SettingSummary, summarise


def setting_charts(sweep: Sweep, results: Sequence[MemberResult], metric: str) -> list[Markup]:
    """One for each setting that was varied over several values: a line for each choice of the others."""
    names = dict.fromkeys(name for result in results for name in result.varied)
    charts = []
    for name in names:
        values = list(dict.fromkeys(result.varied[name] for result in results if name in result.varied))
        if len(values) > 1:
            charts.append(
                _setting_chart(name, values, results, metric, _zero_shot(sweep, metric) if name == "shots" else None)
            )
    if len({result.head for result in results}) > 1 and not names:
        charts.append(_heads_chart(results, metric))
    return [chart(one) for one in charts]


def _setting_chart(
    name: str, values: Sequence[str], results: Sequence[MemberResult], metric: str, level: float | None
) -> Chart:
    groups: dict[str, list[MemberResult]] = {}
    for result in results:
        if name in result.varied:
            groups.setdefault(_others(result, name), []).append(result)
    series: list[Series] = []
    for place, (label, members) in enumerate(groups.items()):
        shift = 0.0 if len(groups) == 1 else 0.32 * (place / (len(groups) - 1) - 0.5)
        series += _group_series(label, members, name, values, metric, place, shift)
    return Chart(
        title=name.replace("_", " "),
        note=f"{METRICS[metric]}, mean and deviation over seeds; small points are runs",
        under=name,
        series=series,
        word=percent,
        tick=short_percent,
        places=values,
        level=("zero-shot", level) if level is not None else None,
    )


def _group_series(
    label: str,
    members: Sequence[MemberResult],
    name: str,
    values: Sequence[str],
    metric: str,
    colour: int,
    shift: float,
) -> list[Series]:
    """The means of one choice of the other settings as a line, and the runs as points beside it."""
    done = [
        (values.index(one.varied[name]), value) for one in members if (value := one.metrics.get(metric)) is not None
    ]
    of_value = {one.varied[name]: one.metrics[metric] for one in summarise(members) if metric in one.metrics}
    xs = [place + shift for place, value in enumerate(values) if value in of_value]
    spreads = [of_value[value] for value in values if value in of_value]
    several = any(spread.std is not None for spread in spreads)
    line = Series(
        name=label or "mean",
        xs=xs,
        ys=[spread.mean for spread in spreads],
        errors=[spread.std for spread in spreads] if several else (),
        colour=colour,
    )
    runs = Series(
        name="",
        xs=[x + shift + 0.06 for x, _ in done],
        ys=[y for _, y in done],
        colour=colour,
        line=False,
        small=True,
        tip="run",
    )
    return [line, runs] if several else [line]


def _others(result: MemberResult, name: str) -> str:
    words = [f"{other}={value}" for other, value in result.varied.items() if other != name]
    return " ".join([result.head, *words]) if words else result.head


def _heads_chart(results: Sequence[MemberResult], metric: str) -> Chart:
    """Of a sweep over heads alone."""
    heads = list(dict.fromkeys(result.head for result in results))
    rows: list[SettingSummary] = [row for row in summarise(results) if metric in row.metrics]
    line = Series(
        name="mean",
        xs=[float(heads.index(row.head)) for row in rows],
        ys=[row.metrics[metric].mean for row in rows],
        errors=[row.metrics[metric].std for row in rows],
        line=False,
    )
    runs = [(heads.index(one.head) + 0.06, value) for one in results if (value := one.metrics.get(metric)) is not None]
    points = Series(name="", xs=[x for x, _ in runs], ys=[y for _, y in runs], line=False, small=True, tip="run")
    return Chart(title="head", under="head", series=[line, points], word=percent, tick=short_percent, places=heads)


def _zero_shot(sweep: Sweep, metric: str) -> float | None:
    """CLIP without training, where it is the same for all members."""
    few_shot = FewShot.of(sweep)
    known = {one.get(metric) for one in few_shot.zero_shot if one} if few_shot else set()
    return known.pop() if len(known) == 1 else None


def curve_charts(results: Sequence[MemberResult], metric: str, best: str | None) -> list[Markup]:
    """Validation and training loss of all runs over the epochs, in the colour of their setting; of many settings all but the best
    are grey."""
    labels = list(dict.fromkeys(result.label for result in results))
    records = [(one, RunRecord.open(Path(one.run))) for one in results if (Path(one.run) / "config.json").is_file()]
    few = len(labels) <= len(COLOURS)
    charts: list[Markup] = []
    of_metric: dict[str, Any] = {"word": percent, "tick": short_percent}
    for title, field, words in (
        (f"Validation {METRICS[metric]}", f"val_{metric}", of_metric),
        ("Validation loss", "val_loss", {}),
        ("Training loss", "train_loss", {}),
    ):
        series = []
        for result, record in records:
            lines = [record.epochs[place] for place in thinned(record.epochs)]
            lit = few or result.label == best
            series.append(
                Series(
                    name=result.label if lit else "others",
                    xs=[line["epoch"] + 1 for line in lines],
                    ys=[line.get(field) for line in lines],
                    colour=labels.index(result.label) if few else (0 if lit else len(COLOURS) - 1),
                    faint=not lit,
                    tip=f"{result.label} seed={result.seed}",
                )
            )
        if any(y is not None for one in series for y in one.ys):
            charts.append(chart(Chart(title=title, under="epoch", series=series, legend=not charts, **words)))
    return charts
