"""What `vcache ensemble` shows: the members, the average beside them, and what each weight gives."""

import string
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.evaluation.ensemble import HALF, Combination, Ensemble
from vcache.pipelines.evaluation.metrics import Metrics

MOST_SHOWN = 10
"""Combinations of three or more members; of two, all are shown."""


def print_ensemble(ensemble: Ensemble) -> None:
    """Two tables and, in a sentence, on which videos the weights were chosen."""
    letters = string.ascii_uppercase[: len(ensemble.members)]
    console.out.print(_members_table(ensemble, letters))
    if len(ensemble.combinations) > 1:
        console.out.print()
        console.out.print(_combinations_table(ensemble, letters))
        console.out.print(_where_chosen(ensemble), highlight=False)


def described(ensemble: Ensemble) -> dict[str, Any]:
    """The same for a program."""
    return {
        "members": list(ensemble.members),
        "weights": list(ensemble.best.weights),
        "metrics": asdict(ensemble.metrics),
        "alone": [asdict(metrics) for metrics in ensemble.alone],
        "measure": ensemble.measure,
        "combinations": [asdict(combination) for combination in ensemble.combinations],
        "num_tuned": ensemble.num_tuned,
        "optimistic": ensemble.optimistic,
        "notes": list(ensemble.notes),
    }


def _members_table(ensemble: Ensemble, letters: str) -> Table:
    table = _table("", "", *_titles(ensemble), "gain")
    for letter, name, metrics in zip(letters, ensemble.members, ensemble.alone, strict=True):
        table.add_row(letter, escape(name), *_numbers(metrics), "")
    gain = ensemble.metrics.monitored - max(metrics.monitored for metrics in ensemble.alone)
    average = _sum(ensemble.best.weights, letters)
    table.add_row("", average, *_numbers(ensemble.metrics), f"{100 * gain:+.1f}", style="bold")
    return table


def _combinations_table(ensemble: Ensemble, letters: str) -> Table:
    table = _table(*letters, ensemble.measure, "")
    shown: Sequence[Combination] = ensemble.combinations
    if len(letters) > 2:
        shown = sorted(shown, key=lambda combination: combination.value, reverse=True)[:MOST_SHOWN]
    for combination in shown:
        best = combination.weights == ensemble.best.weights
        words = [*_told(combination.weights), f"{combination.value:.1%}", "best" if best else ""]
        table.add_row(*words, style="bold" if best else None)
    return table


def _where_chosen(ensemble: Ensemble) -> str:
    tried = f"{len(ensemble.combinations)} combinations"
    if ensemble.optimistic:
        return (
            f"{tried}. Chosen on the {ensemble.num_tuned} videos reported on, as in EVL's paper, which flatters the average; "
            f"--tune-on {HALF} chooses on one half and reports on the other."
        )
    return f"{tried}. Chosen on {console.count(ensemble.num_tuned, 'video')}, reported on {ensemble.metrics.num_videos} others."


def _table(*titles: str) -> Table:
    """Numbers under titles; columns without one are texts."""
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title), overflow="fold")
    return table


def _titles(ensemble: Ensemble) -> tuple[str, ...]:
    return tuple(_values(ensemble.metrics))


def _numbers(metrics: Metrics) -> tuple[str, ...]:
    return tuple(f"{value:.1%}" for value in _values(metrics).values())


def _values(metrics: Metrics) -> dict[str, float]:
    """Those that are set: of several classes per video others than of one."""
    values = {
        "top-1": metrics.top1,
        "top-5": metrics.top5,
        "mean class": metrics.mean_class_accuracy,
        "mAP": metrics.mean_average_precision,
    }
    return {name: value for name, value in values.items() if value is not None}


def _sum(weights: Sequence[float], letters: str) -> str:
    return " + ".join(f"{weight} {letter}" for weight, letter in zip(_told(weights), letters, strict=True))


def _told(weights: Sequence[float]) -> list[str]:
    """With as many decimals as the step of the search may need, so that columns are of one width."""
    digits = 1 if all(abs(10 * weight - round(10 * weight)) < 1e-6 for weight in weights) else 3
    return [f"{weight:.{digits}f}" for weight in weights]
