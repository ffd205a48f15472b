"""What to say where a run was named and none is."""

from pathlib import Path

from vcache.pipelines.console import count

_SHOWN = 8


def why_no_run(path: Path) -> str:
    """One message: what lies at `path` instead of a run, which runs lie near, and what to do."""
    is_no_run = f"{path} is not a run folder: "
    if not path.exists():
        near = _runs_in(path.parent)
        return f"{is_no_run}it is not there. " + (
            f"There {'are' if len(near) > 1 else 'is'}: {_listed(near)}."
            if near
            else "Find yours with:  vcache ls --runs"
        )
    if not path.is_dir():
        return f"{is_no_run}it is a file."
    if (path / "zarr.json").is_file():
        return f"{is_no_run}it is a store. Train a head on it with:  vcache train-head HEAD --store {path}"
    if held := _runs_in(path):
        return f"{is_no_run}it holds {count(len(held), 'run')}. Name one of them, as in:  {held[0]}"
    return f"{is_no_run}it has no config.json. `vcache train-head` writes one with --out."


def _runs_in(folder: Path) -> list[Path]:
    return sorted(config.parent for config in folder.glob("*/config.json"))


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:_SHOWN])) + (" ..." if len(paths) > _SHOWN else "")
