"""`vcache ls`, `rm`, `gc` and `doctor`: stores and runs kept in order, and what the machine has and lacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Json
from vcache.store.object_path import ObjectPath, store_path

if TYPE_CHECKING:
    from vcache.pipelines.upkeep import garbage

_DAYS = {"d": 1.0, "w": 7.0, "h": 1 / 24, "": 1.0}

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def list_stores(
    folder: Annotated[
        str | None, typer.Argument(help="A folder, or s3://bucket/path. Default: $VCACHE_HOME.", metavar="FOLDER")
    ] = None,
    runs: Annotated[
        bool, typer.Option("--runs", help="List the runs: head, result, date, size, whether the store is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The stores in a folder: what they hold and take, and which runs use them; or, with --runs, the runs.

    Runs are known by the notes that trainings, imports and evaluations leave, and are looked for in the
    folder and below the current one.

    [bold]Examples:[/bold]  vcache ls  |  vcache ls /data/stores  |  vcache ls --runs
    """
    from vcache.pipelines.stores import vcache_home
    from vcache.pipelines.upkeep.store_listing import describe_folder, print_folder, runs_around

    where = store_path(folder) if folder else vcache_home()
    with console.stages() as on_stage:
        on_stage("looking for runs")
        found = runs_around(where)
    if runs:
        from vcache.pipelines.upkeep.run_listing import describe_runs, print_runs

        described = describe_runs(found)
        console.print_json(described) if as_json else print_runs(described, found)
        return
    rows = describe_folder(where, found)
    console.print_json(rows) if as_json else print_folder(where, rows, found)


def remove(
    paths: Annotated[list[str], typer.Argument(help="Stores, runs and sweeps.", metavar="STORE|RUN...")],
    force: Annotated[
        bool, typer.Option("--force", help="Also stores that runs refer to, and what else lies in a folder.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove stores, runs and sweeps, after showing what goes and who uses it.

    A store that a run refers to is refused with the names of the runs, unless they are removed with it or
    --force is given, and so is a folder with files in it that vcache did not write. What a process writes or
    trains now, and whatever is no store or run of vcache, is refused in any case.

    [bold]Examples:[/bold]  vcache rm STORE.zarr  |  vcache rm runs/evl-1 runs/evl-2 STORE.zarr --yes
    """
    from vcache.pipelines.upkeep import removal
    from vcache.pipelines.upkeep.found_runs import find_runs
    from vcache.pipelines.upkeep.removal_screen import print_doomed, print_removed

    asked = [store_path(path) for path in paths]
    found = find_runs([Path.cwd()], asked)
    doomed = removal.examine(asked, found)
    if not as_json:
        print_doomed(doomed, found)
    removal.check_allowed(doomed, force=force)
    if not yes:
        _ask("Remove it?" if len(doomed) == 1 else "Remove them?")
    for item in doomed:
        removal.remove(item, force=force)
    console.print_json([item.to_json() for item in doomed]) if as_json else print_removed(doomed)


def _ask(question: str) -> None:
    """Ends the command unless a person says yes; a program has to say so beforehand."""
    import sys

    if not sys.stdin.isatty():
        console.fail("nothing is removed: there is nobody to ask. Say --yes.")
    if not typer.confirm(question, default=False):
        console.err.print("nothing is removed")
        raise typer.Exit(1)


def collect(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders to look through. Default: $VCACHE_HOME.", metavar="FOLDER...")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove what is listed; without it nothing is changed.")
    ] = False,
    unused_stores: Annotated[
        bool, typer.Option("--unused-stores", help="Also stores that no known run refers to.")
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="30d", help="Only what was last changed so long ago: days (30d), weeks (2w) or hours (12h)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what nobody needs any more, with sizes and reasons; with --yes, remove it.

    That is what killed extractions, trainings, imports and removals left, checkpoints of complete runs and
    notes of runs that are gone, in the folders and in the runs that are known. Stores that no run refers to
    are named, and go with --unused-stores alone.

    [bold]Examples:[/bold]  vcache gc  |  vcache gc /data/stores --yes  |  vcache gc --unused-stores --older-than 30d
    """
    from vcache.pipelines.stores import vcache_home
    from vcache.pipelines.upkeep import removal_screen
    from vcache.pipelines.upkeep.found_runs import find_runs
    from vcache.pipelines.upkeep.garbage import find_garbage

    days = _days(older_than)
    where = _folders(folders) if folders else [vcache_home()]
    with console.stages() as on_stage:
        on_stage("looking for what nobody needs")
        found = find_runs([Path.cwd(), *where])
        collection = find_garbage(where, found, unused_stores=unused_stores, older_than_days=days)
    if not as_json:
        removal_screen.print_collection(collection, where, dry=not yes)
        removal_screen.print_limits(found)
    kept = _collect(collection.garbage) if yes else []
    if as_json:
        removed = [item.to_json() | {"removed": yes and str(item.path) not in kept} for item in collection.garbage]
        unused = [item.to_json() for item in collection.unused_stores]
        console.print_json({"garbage": removed, "unused_stores": unused, "size_bytes": collection.size_bytes})
    elif collection.garbage and not yes:
        line = removal_screen.command_to_collect(
            list(map(str, folders or [])), unused_stores=unused_stores, older_than=older_than
        )
        console.out.print(f"nothing is changed yet. Remove it with:  {line}", soft_wrap=True, markup=False)
    if kept:
        raise typer.Exit(1)


def _collect(items: "tuple[garbage.Garbage, ...]") -> list[str]:
    """Remove them; the paths of those that could not be, of which it has told why."""
    from vcache.pipelines.upkeep.garbage import collect as collect_one

    kept = []
    for item in items:
        try:
            collect_one(item)
        except (ValueError, OSError) as error:
            console.err.print(str(error), soft_wrap=True, markup=False, highlight=False)
            kept.append(str(item.path))
    return kept


def _folders(given: list[Path]) -> list[Path]:
    for path in given:
        if isinstance(store_path(str(path).replace("s3:/", "s3://", 1)), ObjectPath):
            raise typer.BadParameter(
                f"{path} is in a bucket, which tells neither who writes nor what was left. Stores there are listed by vcache ls "
                "and removed by vcache rm"
            )
        if not path.is_dir():
            raise typer.BadParameter(f"{path} is not a folder")
    return given


def _days(text: str | None) -> float:
    if text is None:
        return 0.0
    number, unit = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    try:
        days = float(number) * _DAYS[unit]
    except (ValueError, KeyError):
        days = -1.0
    if not 0 <= days < float("inf"):
        raise typer.BadParameter(f"--older-than {text!r} is not a time such as 30d, 2w or 12h")
    return days


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A folder whose disk is measured, beside that of $VCACHE_HOME.", metavar="FOLDER"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Look, and measure nothing.")] = False,
    as_json: Json = False,
) -> None:
    """What is installed, what the machine has, how fast it decodes, reads and computes, and what would be slow and why.

    Takes some seconds. Exit status 1 if something is broken: a package that does not load, or no decoder that works.

    [bold]Examples:[/bold]  vcache doctor  |  vcache doctor /data --json
    """
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder")
    from vcache.pipelines.upkeep.diagnosis import diagnose, is_broken
    from vcache.pipelines.upkeep.doctor import describe_examination, examine_machine, print_examination

    with console.stages() as on_stage:
        seen = examine_machine(folder, quick=quick, on_stage=on_stage)
    findings = diagnose(seen)
    console.print_json(describe_examination(seen, findings)) if as_json else print_examination(seen, findings)
    if is_broken(findings):
        raise typer.Exit(1)
