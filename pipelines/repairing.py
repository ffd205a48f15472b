"""`vcache repair`: mends what `vcache verify` finds, from the sound rows and from the videos."""

import itertools
import shlex
from pathlib import Path
from typing import Any

from rich.markup import escape

from vcache.pipelines.console import count, out
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.verification import describe_finding, verification_bar
from vcache.store.errors import UnsupportedLocation
from vcache.store.findings import mend_command
from vcache.store.object_path import ObjectPath, StorePath
from vcache.store.reader import FeatureStore
from vcache.store.repair import Repair, repair_store


def repair(
    path: StorePath, *, root: Path | None = None, dry_run: bool = False, device: str = "auto", workers: int = 2
) -> dict[str, Any]:
    """Mend the store; a dict of what was found, what was done and what is left.

    Args:
        root: where the videos lie, if they were moved.
        dry_run: only say what there is to do.

    Raises:
        StoreBusy: an extraction is running.
        UnsupportedLocation: the store is not in a local folder.
    """
    if isinstance(path, ObjectPath):
        raise UnsupportedLocation(f"{path} cannot be mended in place: only local files can. {mend_command(path)}")
    with FeatureStore.open(path) as store, verification_bar() as progress:
        tasks = {name: progress.add_task(name, total=None, visible=False) for name in ("verify", "mend", "videos")}
        videos = itertools.count(1)

        def on_video() -> None:
            progress.update(tasks["videos"], description=f"extract again: {next(videos)} videos", visible=True)

        result = repair_store(
            store,
            Reextraction(store, root=root, device=device, workers=workers, on_video=on_video),
            dry_run=dry_run,
            report=lambda what, done, total: progress.update(tasks[what], completed=done, total=total, visible=True),
        )
        return _describe(path, result, dry_run)


def _describe(path: StorePath, result: Repair, dry_run: bool) -> dict[str, Any]:
    assert result.verification is not None
    return {
        "store": str(path),
        "ok": result.ok,
        "dry_run": dry_run,
        "found": len(result.verification.findings),
        "mended": [{"path": str(m.path), "kind": m.kind, "message": m.message} for m in result.mended],
        "left": [describe_finding(finding) | {"reason": reason} for finding, reason in result.left.values()],
        "recomputed_rows": result.recomputed_rows,
        "copied_rows": result.copied_rows,
        "rows": result.verification.num_rows,
        "files": result.verification.num_files,
        "bytes": result.verification.num_bytes,
    }


def print_repair(result: dict[str, Any], most: int = 20) -> None:
    for mended in result["mended"][:most]:
        out.print(
            f"[green]mended[/green]  {mended['kind']}  {escape(mended['message'])}", highlight=False, soft_wrap=True
        )
    if len(result["mended"]) > most:
        out.print(f"... and {len(result['mended']) - most} more mended")
    word = "to mend" if result["dry_run"] else "left"
    for left in result["left"][:most]:
        out.print(f"[red]{word}[/red]  {left['kind']}  {_reason(left)}", highlight=False, soft_wrap=True)
    if len(result["left"]) > most:
        out.print(f"... and {len(result['left']) - most} more {word}")
    out.print(_verdict(result), highlight=False, soft_wrap=True)


def _reason(left: dict[str, Any]) -> str:
    where = "" if left["path"] in left["reason"] else f"{left['path']}: "
    return escape(where + left["reason"])


def _verdict(result: dict[str, Any]) -> str:
    store = escape(result["store"])
    if not result["found"] and not result["mended"]:
        return (
            f"{store} is whole: nothing to mend in {count(result['rows'], 'row')} and {count(result['files'], 'file')}"
        )
    videos = (
        f"{count(result['recomputed_rows'], 'row')} from their videos, {count(result['copied_rows'], 'row')} copied"
    )
    if result["dry_run"]:
        command = shlex.join(["vcache", "repair", result["store"]])
        again = f"{count(result['recomputed_rows'], 'row')} to extract again"
        return f"{count(result['found'], 'finding')}, {again}. Mend them with:  {escape(command)}"
    if result["ok"]:
        return f"{store} is whole again: {len(result['mended'])} mended ({videos})"
    return f"{store} is still damaged: {len(result['mended'])} mended ({videos}), {len(result['left'])} left"
