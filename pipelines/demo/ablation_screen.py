"""What a person sees of `vcache demo --ablation`: how many runs there are to train, and the tables beside the paper's."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.demo.table8 import MODULES, PAPER_DEEPER


def announce(total: int, left: int, num_groups: int) -> None:
    """How many runs there are to train, before the first."""
    if not left:
        console.err.print(f"\nnothing left to train of {console.count(total, 'run')}", highlight=False)
        return
    there = f"{total - left} of {console.count(total, 'run')} there already, " if left < total else ""
    groups = f", in {num_groups} groups one after the other" if num_groups > 1 else ""
    console.err.print(
        f"\n{there}{console.count(left, 'run')} to train side by side{groups}.\n"
        "Stopped at any time, the same command goes on.",
        highlight=False,
    )


def print_ablation(result: dict[str, Any]) -> None:
    """Both tables, what they are measured against, what failed, and where everything is."""
    gain = result["settings"]["tca_gain"]
    ours = "" if gain == 1.0 else f", T-CA x {gain:g} (ours, not the paper's)"
    modules, depths = result["tables"]["8a"], result["tables"]["8b"]
    _print_table(f"Table 8a: temporal modules{ours}", tuple(MODULES.values()), modules, result["seeds"])
    _print_table(f"Table 8b: depth, all modules{ours}", ("depth", "layers"), depths, result["seeds"])
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    over = f"mean and standard deviation over seeds {seeds}" if len(result["seeds"]) > 1 else f"seed {seeds} alone"
    deeper = ", ".join(f"{accuracy} at {depth}" for depth, accuracy in PAPER_DEEPER.items())
    for line in (
        f"Here: top-1 of {result['num_val']} validation videos, {over}. "
        f"Chance is {result['chance']:.0%}. A head that ignores the order, as the first row of 8a, cannot pass "
        f"{result['order_blind_bound']:.0%}: the motions are five pairs, each the other played backwards.",
        "Paper: ViT-B/16 on Kinetics-400 and Something-Something V2; K-400 by depth is its Table 6a. "
        f"Deeper, SSv2 has {deeper} of 12 blocks; the tiny CLIP has 4. Compare the order of the rows, not their height.",
    ):
        console.out.print(line, highlight=False)
    for failure in result["failed"]:
        name = f"{failure['variant']}, seed {failure['seed']}"
        console.out.print(f"[red]failed[/red]  {name}: {escape(failure['error'])}", highlight=False, soft_wrap=True)
    for name in ("store", "runs"):
        console.out.print(f"  {name:<9}{escape(result[name])}", highlight=False, soft_wrap=True)
    console.out.print(f"  results  {escape(', '.join(result['results']))}", highlight=False, soft_wrap=True)


def _print_table(title: str, first: tuple[str, ...], rows: list[dict[str, Any]], seeds: list[int]) -> None:
    table = Table(title=title, title_justify="left")
    for name in first:
        table.add_column(name, justify="center")
    for name in ("top-1 here", "paper K-400", "paper SSv2"):
        table.add_column(name, justify="right")
    for row in rows:
        marks = [_mark(row[name]) for name in MODULES]
        numbers = [_number(row[f"paper_{dataset}"]) for dataset in ("k400", "ssv2")]
        settings = marks if first[0] in MODULES.values() else [str(row["depth"]), f"-{row['depth']}:"]
        table.add_row(*settings, _accuracy(row, len(seeds)), *numbers)
    console.out.print(table)
    console.out.print()


def _mark(on: bool) -> str:
    return "✓" if on else "✗"


def _number(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.1f}%"


def _accuracy(row: dict[str, Any], num_seeds: int) -> str:
    """ "74.5 ± 3.1%", with how many seeds it is of where some failed."""
    num_runs = sum(run["top1"] is not None for run in row["runs"])
    if not num_runs:
        return "failed"
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    of = f" ({num_runs} of {num_seeds})" if num_runs < num_seeds else ""
    return f"{100 * row['mean']:.1f}{spread}%{of}"
