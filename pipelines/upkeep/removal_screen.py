"""What `vcache rm` and `vcache gc` say before and after they remove."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from vcache.pipelines.console import count, out, print_sentence, size
from vcache.pipelines.upkeep.found_runs import FoundRuns
from vcache.pipelines.upkeep.garbage import Collection, Garbage
from vcache.pipelines.upkeep.removal import Doomed, told_run
from vcache.store.object_path import ObjectPath

_MOST_LINES = 20


def print_doomed(doomed: Sequence[Doomed], found: FoundRuns) -> None:
    """What would go, and who uses it."""
    for item in doomed:
        head = f"[bold]{escape(str(item.path))}[/bold]  {item.kind}, {count(item.num_files, 'file')}, {size(item.size_bytes)}"
        out.print(head, highlight=False, soft_wrap=True)
        for line in _lines(item):
            print_sentence(out, f"  {line}")
    print_limits(found)


def _lines(item: Doomed) -> list[str]:
    lines = [f"with it: {tree.path}" for tree in item.beside]
    lines += [f"used by {told_run(run)}" for run in item.used_by]
    if item.kind == "store" and not item.used_by:
        lines.append("used by no run that is known")
    if item.others:
        lines.append(f"also in it, and not written by vcache: {', '.join(item.others)}")
    if isinstance(item.path, ObjectPath):
        lines.append("in a bucket, where nothing says whether a process writes it now")
    return lines


def print_limits(found: FoundRuns) -> None:
    """What the search for runs did not see."""
    for note in found.missing:
        if note.store is not None:
            print_sentence(
                out,
                f"  not found: {note.run}, which refers to {note.store}. If it was moved, name its folder: cd to it.",
            )
    for folder in found.cut_short:
        print_sentence(out, f"  not all of {folder} was searched for runs: it has too many folders, or too deep ones")


def print_removed(doomed: Sequence[Doomed]) -> None:
    total = sum(item.size_bytes for item in doomed)
    out.print(
        f"removed {', '.join(escape(str(item.path)) for item in doomed)}: {size(total)}",
        soft_wrap=True,
        highlight=False,
    )


def print_collection(collection: Collection, folders: Sequence[Path], *, dry: bool) -> None:
    """What nobody needs, by kind."""
    where = ", ".join(map(str, folders))
    if not collection.garbage:
        print_sentence(out, f"nothing to collect in {where} and the runs that are noted")
    else:
        verb = "would go" if dry else "goes"
        total = f"{size(collection.size_bytes)} {verb}, in {count(len(collection.garbage), 'place')}"
        out.print(f"[bold]{total}[/bold]", highlight=False, soft_wrap=True)
        for item in collection.garbage[:_MOST_LINES]:
            print_sentence(out, f"  {_told(item)}")
        if len(collection.garbage) > _MOST_LINES:
            print_sentence(out, f"  and {len(collection.garbage) - _MOST_LINES} more, listed by --json")
    if collection.unused_stores:
        total = size(sum(item.size_bytes for item in collection.unused_stores))
        words = count(len(collection.unused_stores), "store")
        print_sentence(out, f"kept: {words} that no known run refers to, {total}; --unused-stores has them go")
        for item in collection.unused_stores[:_MOST_LINES]:
            print_sentence(out, f"  {_told(item)}")


def _told(item: Garbage) -> str:
    return f"{item.path}  {size(item.size_bytes)}, {item.kind}: {item.reason}"


def command_to_collect(folders: Sequence[str], *, unused_stores: bool, older_than: str | None) -> str:
    """The line that does what a dry run has shown."""
    options = ["--unused-stores"] if unused_stores else []
    options += ["--older-than", older_than] if older_than else []
    return shlex.join(["vcache", "gc", *folders, *options, "--yes"])
