"""`vcache datasets`: what can be read, and for one dataset what its list and its disk hold."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.extract.datasets.presence import presence
from vcache.extract.datasets.registry import list_datasets, load_dataset
from vcache.pipelines.console import count, out

_SHOWN = 5


def describe_datasets() -> list[dict[str, str]]:
    """One row a dataset: its name (or how a path chooses it), a summary, and the layout on disk."""
    return [
        {"dataset": name, "summary": entry.summary, "layout": entry.layout} for name, entry in list_datasets().items()
    ]


def print_datasets(rows: list[dict[str, str]]) -> None:
    """Datasets with one layout, as the splits of UCF101 are, show it once."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        out.print(f"[bold]{row['dataset']}[/bold]  {row['summary']}", highlight=False, soft_wrap=True)
        if following is None or following["layout"] != row["layout"]:
            for line in row["layout"].strip().splitlines():
                out.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def describe_dataset(name_or_path: str, root: Path | None) -> dict[str, Any]:
    """Splits, classes, and every missing and every extra video; `ok` is false if a listed video is missing.

    Raises:
        DatasetError: no such dataset, or a malformed one.
    """
    dataset = load_dataset(name_or_path, root=root)
    found, videos = presence(dataset), Counter(video.split for video in dataset.videos)
    missing = Counter(video.split for video in found.missing)
    return {
        "dataset": dataset.name,
        "root": str(dataset.root),
        "class_names": list(dataset.class_names),
        "splits": {split: {"videos": videos[split], "missing": missing[split]} for split in dataset.splits},
        "unused": len(dataset.unused),
        "missing": [{"split": video.split, "video_id": video.video_id, "path": video.path} for video in found.missing],
        "extra": list(found.extra),
        "ok": not found.missing,
    }


def print_dataset(dataset: dict[str, Any]) -> None:
    names, splits = dataset["class_names"], dataset["splits"]
    out.print(f"[bold]{escape(dataset['dataset'])}[/bold]  {escape(dataset['root'])}", highlight=False, soft_wrap=True)
    classes = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    out.print(f"  {len(names)} classes: {classes}", highlight=False, markup=False, soft_wrap=True)
    table = Table("split", "videos", "missing", box=None, padding=(0, 2))
    for split, row in splits.items():
        table.add_row(escape(split), f"{row['videos']:,}", f"{row['missing']:,}")
    out.print(table)
    if dataset["unused"]:
        out.print(f"  {dataset['unused']:,} more are listed and belong to no split", highlight=False)
    total = sum(row["videos"] for row in splits.values())
    if not dataset["missing"] and not dataset["extra"]:
        out.print(f"  all {total:,} are on the disk, and no other video is", highlight=False)
    missing, extra = [row["path"] for row in dataset["missing"]], dataset["extra"]
    _print_paths(missing, f"missing: {len(missing):,} of {total:,} listed videos; extraction records each as failed")
    _print_paths(extra, f"extra: {count(len(extra), 'video')} that no list names, left alone")


def _print_paths(paths: list[str], title: str) -> None:
    if not paths:
        return
    out.print(f"  {title}", highlight=False, markup=False, soft_wrap=True)
    for path in paths[:_SHOWN]:
        out.print(f"    {path}", highlight=False, markup=False, soft_wrap=True)
    if len(paths) > _SHOWN:
        out.print(f"    ... and {count(len(paths) - _SHOWN, 'other')} (--json has all)", highlight=False)
