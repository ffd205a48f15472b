"""`vcache verify`: is everything that was committed still there, byte for byte?"""

from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vcache.pipelines.console import err, out, size
from vcache.store.findings import Finding
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store


def verify(path: StorePath) -> dict[str, Any]:
    """Read and check every committed byte; a dict of what was found and how much was looked at."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with FeatureStore.open(path) as store, Progress(*columns, console=err) as progress:
        task = progress.add_task(escape(path.name), total=None)
        result = verify_store(store, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
    return {
        "store": str(path),
        "ok": result.ok,
        "shards": result.num_shards,
        "files": result.num_files,
        "bytes": result.num_bytes,
        "rows": result.num_rows,
        "failed_rows": result.num_failures,
        "findings": [_describe(finding) for finding in result.findings],
        "notes": [_describe(note) for note in result.notes],
    }


def print_verification(result: dict[str, Any], most: int = 20) -> None:
    for finding in result["findings"][:most]:
        out.print(f"[red]{finding['kind']}[/red]  {escape(finding['message'])}", highlight=False, soft_wrap=True)
    if len(result["findings"]) > most:
        out.print(f"... and {len(result['findings']) - most} more: vcache verify {escape(result['store'])} --json")
    for note in result["notes"][:most]:
        out.print(f"note  {escape(note['message'])}", highlight=False, soft_wrap=True)
    verdict = "whole" if result["ok"] else f"damaged, {len(result['findings'])} findings"
    out.print(
        f"{escape(result['store'])} is {verdict}: {result['rows']} rows ({result['failed_rows']} failed) in {result['shards']} "
        f"shards, {result['files']} files, {size(result['bytes'])} read",
        highlight=False,
        soft_wrap=True,
    )


def _describe(finding: Finding) -> dict[str, Any]:
    names = ("kind", "message", "split", "view", "shard", "array", "rows", "video_ids")
    return {"path": str(finding.path), **{name: getattr(finding, name) for name in names}}
