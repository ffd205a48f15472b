"""`vcache ls --runs`: the runs that are known, what came of them, and whether their stores are there."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines.console import count, out, print_sentence, size
from vcache.pipelines.upkeep.found_runs import FoundRun, FoundRuns
from vcache.pipelines.upkeep.register import RUN_CONFIG
from vcache.pipelines.upkeep.trees import list_tree

_RESULTS = {"val_top1": "top-1", "val_mean_average_precision": "mAP"}
"""Of metrics.jsonl; the first that the last epoch has."""


def describe_runs(found: FoundRuns) -> list[dict[str, Any]]:
    """A dict for each run, by path; of sweeps, which are folders of runs, none."""
    return [_describe(run) for run in found.runs if run.kind == "run"]


def _describe(run: FoundRun) -> dict[str, Any]:
    seen = run.status != "unseen"
    began = (run.path / RUN_CONFIG).stat().st_mtime if seen else None
    metric, value, epochs = _last_result(run.path) if seen else (None, None, 0)
    return {
        "path": str(run.path),
        "head": run.head,
        "dataset": run.dataset,
        "status": run.status,
        "host": run.host,
        "metric": metric,
        "result": value,
        "epochs": epochs,
        "begun": None if began is None else datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "size_bytes": _size(run.path) if seen else None,
        "store": next(iter(run.stores), None),
        "store_is_there": run.has_store if run.stores else None,
    }


def _size(run: Path) -> int | None:
    try:
        return list_tree(run).size_bytes
    except OSError:  # a checkpoint that was replaced meanwhile, a folder of another user
        return None


def _last_result(run: Path) -> tuple[str | None, float | None, int]:
    """The metric and its value after the last epoch that was validated, and how many epochs there are."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None, None, 0
    for epoch in reversed(lines):
        for name, word in _RESULTS.items():
            if epoch.get(name) is not None:
                return word, float(epoch[name]), len(lines)
    return None, None, len(lines)


def print_runs(rows: list[dict[str, Any]], found: FoundRuns) -> None:
    if not rows:
        out.print("no runs are known. One is made with:  vcache train-head HEAD", soft_wrap=True)
    else:
        table = Table(
            box=None,
            title=f"{count(len(rows), 'run')}, {size(sum(row['size_bytes'] or 0 for row in rows))}",
            title_justify="left",
        )
        for column in ("run", "head", "result", "date", "size", "store"):
            table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
        for row in rows:
            begun = (row["begun"] or "")[:10]
            taken = "" if row["size_bytes"] is None else size(row["size_bytes"])
            table.add_row(escape(_name(row)), _head(row), _result(row), begun, taken, _store(row))
        out.print(table)
    for note in found.missing:
        print_sentence(out, f"gone or moved: {note.run} ({note.head}), which was noted on {note.noted[:10]}")


def _name(row: dict[str, Any]) -> str:
    path = Path(row["path"])
    return str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else str(path)


def _head(row: dict[str, Any]) -> str:
    return escape(row["head"] + (f" on {row['dataset']}" if row["dataset"] else ""))


def _result(row: dict[str, Any]) -> str:
    if row["status"] == "unseen":
        return f"[yellow]on {escape(row['host'] or 'a disk that is away')}[/yellow]"
    words = [] if row["result"] is None else [f"{row['metric']} {100 * row['result']:.1f}"]
    if row["status"] == "unfinished":
        words.append(f"[yellow]unfinished, {count(row['epochs'], 'epoch')}[/yellow]")
    return ", ".join(words) or "not validated"


def _store(row: dict[str, Any]) -> str:
    if row["store"] is None:
        return "imported"
    name = escape(row["store"].rstrip("/").rsplit("/", 1)[-1])
    return name if row["store_is_there"] else f"[red]{name} is gone[/red]"
