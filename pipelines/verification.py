"""`vcache verify`: is everything that was committed still there, byte for byte? With --deep: and is it what the videos give?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vcache.pipelines.console import count, err, out, size
from vcache.store.findings import DEEP_KINDS, Finding
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store


def verify(
    path: StorePath, *, deep: int | None = None, seed: int = 0, root: Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Read and check every committed byte; a dict of what was found and how much was looked at.

    Args:
        deep: extract this many random rows again and compare them; None for none.
        root: where the videos lie, if they were moved.
    """
    with FeatureStore.open(path) as store, verification_bar() as progress:
        task = progress.add_task(escape(path.name), total=None)
        result = verify_store(store, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
        described = {
            "store": str(path),
            "ok": result.ok,
            "shards": result.num_shards,
            "files": result.num_files,
            "bytes": result.num_bytes,
            "rows": result.num_rows,
            "failed_rows": result.num_failures,
            "partial_rows": result.num_partial,
            "missing_rows": _missing_rows(store) if result.ok else {},  # what is damaged cannot be asked
            "findings": [describe_finding(finding) for finding in result.findings],
            "notes": [describe_finding(note) for note in result.notes],
        }
        if deep is not None:
            _verify_deep(store, described, deep, seed, root, device, progress)
        return described


def _verify_deep(
    store: FeatureStore,
    described: dict[str, Any],
    num_rows: int,
    seed: int,
    root: Path | None,
    device: str,
    progress: Progress,
) -> None:
    from vcache.pipelines.deep import check_deep
    from vcache.pipelines.reextraction import Reextraction

    task = progress.add_task("extract again", total=None)
    origin = Reextraction(store, root=root, device=device, same_key=False)
    check = check_deep(
        store, origin, num_rows, seed, lambda done, total: progress.update(task, completed=done, total=total)
    )
    described["findings"] += [describe_finding(finding) for finding in check.findings]
    described["notes"] += [describe_finding(note) for note in check.notes]
    described["ok"] = described["ok"] and not check.findings
    deep = {name: value for name, value in asdict(check).items() if name not in ("findings", "notes")}
    described["deep"] = deep | {"seed": seed, "asked": num_rows}


def verification_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def print_verification(result: dict[str, Any], most: int = 20) -> None:
    for finding in result["findings"][:most]:
        out.print(f"[red]{finding['kind']}[/red]  {escape(finding['message'])}", highlight=False, soft_wrap=True)
    if len(result["findings"]) > most:
        out.print(f"... and {len(result['findings']) - most} more: vcache verify {escape(result['store'])} --json")
    for message in _note_messages(result["notes"])[:most]:
        out.print(f"note  {escape(message)}", highlight=False, soft_wrap=True)
    if "deep" in result:
        _print_deep(result["deep"])
    read = f"{count(result['shards'], 'shard')}, {count(result['files'], 'file')}, {size(result['bytes'])} read"
    partial = f", {result['partial_rows']} partial" if result["partial_rows"] else ""
    rows = f"{count(result['rows'], 'row')} ({result['failed_rows']} failed{partial})"
    out.print(
        f"{escape(result['store'])} is {_verdict(result['findings'])}: {rows} in {read}",
        highlight=False,
        soft_wrap=True,
    )
    for split, missing in result["missing_rows"].items():
        out.print(
            f"  {split}: {count(missing, 'row')} not extracted yet; the `vcache extract` command that made the store goes on "
            "with them",
            highlight=False,
            soft_wrap=True,
        )


def _missing_rows(store: FeatureStore) -> dict[str, int]:
    """Rows of the declared views in shards that no record says to be complete, by split; none of a split that is complete."""
    missing = dict.fromkeys(store.splits, 0)
    for split in store.splits:
        for part in store.parts(split):
            for view in store.part_views(part):
                declared = set(store.view(part, view).specs)
                for shard in range(store.num_shards(part)):
                    if not declared <= store.committed_arrays(part, shard, view):
                        missing[split] += len(store.shard_rows(part, shard))
    return {split: rows for split, rows in missing.items() if rows}


def _verdict(findings: list[dict[str, Any]]) -> str:
    num_findings = count(len(findings), "finding")
    if any(finding["kind"] not in DEEP_KINDS for finding in findings):
        return f"damaged, {num_findings}"
    return f"whole, but not shown to be what its videos give, {num_findings}" if findings else "whole"


def _note_messages(notes: list[dict[str, Any]]) -> list[str]:
    """One line for all temporary files: a killed extraction leaves one of each array."""
    temporary = [note for note in notes if note["kind"] == "temporary"]
    others = [note["message"] for note in notes if note["kind"] != "temporary"]
    if len(temporary) < 2:
        return [note["message"] for note in temporary] + others
    text = (
        f"{len(temporary)} temporary files: an extraction is writing them, or was killed. "
        f"`vcache extract` and `vcache repair` remove them. The first is {temporary[0]['path']}"
    )
    return [text, *others]


def _print_deep(deep: dict[str, Any]) -> None:
    out.print(
        f"{deep['rows']} random rows extracted again, {deep['equal_rows']} equal bit for bit (seed {deep['seed']})",
        highlight=False,
    )
    for name, account in deep["arrays"].items():
        if account["equal"] < account["compared"]:
            out.print(
                f"  {name}: {account['equal']} of {account['compared']} equal, relative error up to "
                f"{account['relative_error']:.1e} (bound {account['tolerance']:.1e}), largest difference "
                f"{account['largest_difference']:.2g}",
                highlight=False,
                soft_wrap=True,
            )


def describe_finding(finding: Finding) -> dict[str, Any]:
    """A finding as plain JSON."""
    names = ("kind", "message", "split", "view", "shard", "array", "rows", "video_ids")
    return {"path": str(finding.path), **{name: getattr(finding, name) for name in names}}
