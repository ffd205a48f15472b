"""`vcache ls`: the stores of a folder, what they take and who uses them; a list of plain dicts, printed or as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.markup import escape

from vcache.extract.layers import NO_LAYERS, STEM
from vcache.pipelines.console import count, out, print_sentence, size
from vcache.pipelines.derivation import STEM_ARRAY
from vcache.pipelines.listing import declared_arrays
from vcache.pipelines.stored_views import failed_in_any
from vcache.pipelines.stores import open_stores, store_paths
from vcache.pipelines.upkeep.found_runs import FoundRuns, find_runs
from vcache.store.errors import StoreError
from vcache.store.object_path import StorePath, store_path
from vcache.store.reader import FeatureStore

_MOST_RUNS = 6


def runs_around(folder: StorePath) -> FoundRuns:
    """Those that are noted, below the folder, and below the one that the command is given in."""
    here = [Path.cwd(), *([folder] if isinstance(folder, Path) and folder.is_dir() else [])]
    return find_runs(here, store_paths(folder))


def describe_folder(folder: StorePath, found: FoundRuns | None = None) -> list[dict[str, Any]]:
    """One row a store; a store that cannot be opened or is damaged has `error` in place of the facts."""
    found = found or FoundRuns(runs=(), missing=(), cut_short=())
    rows: list[dict[str, Any]] = []
    for path, store in open_stores(folder):
        if isinstance(store, StoreError):
            rows.append({"path": str(path), "error": str(store)})
            continue
        try:
            with store:
                key, dataset = store.manifest.key, store.manifest.dataset
                rows.append({**_describe_row(path, store), "used_by": _used_by(found, path, key, dataset)})
        except StoreError as error:
            rows.append({"path": str(path), "error": str(error)})
    return rows


def _used_by(found: FoundRuns, path: StorePath, key: str, dataset: str) -> list[dict[str, str]]:
    """The runs that refer to it, and whether by its path or, as their own store is gone, by its key."""
    ways = found.referring_to(path, key, dataset)
    return [{"run": str(run.path), "status": run.status, "by": way} for run, way in ways.items()]


def _describe_row(path: StorePath, store: FeatureStore) -> dict[str, Any]:
    arrays = declared_arrays(store, next(iter(store.splits)))
    tokens = sorted(int(name.split("/")[1]) for name in arrays if name.startswith("tokens/"))
    failed = {split: len({row.row for row in failed_in_any(store, split)}) for split in store.splits}
    return {
        "path": str(path),
        "dataset": store.manifest.dataset,
        "model": store.manifest.facts["backbone"]["model"],
        "splits": store.splits,
        "parts": {split: len(store.parts(split)) for split in store.splits},
        "complete": {split: _complete(store, split) for split in store.splits},
        "failed": failed,
        "layers": tokens,
        "stem": STEM_ARRAY in arrays,
        "dtype": store.manifest.facts["request"]["dtype"],
        "cross_frame": _cross_frame([*arrays, *store.manifest.constants]),
        "size_bytes": store.size_bytes(),
        "key": store.manifest.key,
        "created": store.manifest.created,
    }


def _complete(store: FeatureStore, split: str) -> int:
    """Videos of which the first view has all its arrays."""
    return int(store.committed_rows(split, declared_arrays(store, split)).sum())


def _cross_frame(arrays: Iterable[str]) -> str:
    kinds = {name.split("/")[0] for name in arrays}
    return next((word for kind, word in (("q", "qk"), ("maps", "maps"), ("blocks", "derive")) if kind in kinds), "none")


def print_folder(folder: StorePath, rows: list[dict[str, Any]], found: FoundRuns) -> None:
    elsewhere = _stores_elsewhere(found, {row["path"] for row in rows})
    if not rows:
        out.print(f"no stores in {folder}. Make one with:  vcache extract DATASET --layers -4:", soft_wrap=True)
    else:
        total = size(sum(row.get("size_bytes", 0) for row in rows))
        out.print(f"[bold]{escape(str(folder))}[/bold]  {count(len(rows), 'store')}, {total}", soft_wrap=True)
        for row in rows:
            _print_row(row)
    for store, number in elsewhere.items():
        print_sentence(
            out, f"elsewhere: {store}, which {count(number, 'run')} {'refers' if number == 1 else 'refer'} to"
        )


def _print_row(row: dict[str, Any]) -> None:
    name = escape(store_path(row["path"]).name)
    if "error" in row:
        out.print(f"[bold]{name}[/bold]  [red]{escape(row['error'])}[/red]", soft_wrap=True)
        return
    date = datetime.fromisoformat(row["created"]).strftime(", %d %b %Y") if row["created"] else ""
    out.print(
        f"[bold]{name}[/bold]  {size(row['size_bytes'])}, key {row['key'][:8]}{date}", highlight=False, soft_wrap=True
    )
    for line in (_content(row), _features(row), used_by_line(row["used_by"])):
        print_sentence(out, f"  {line}")


def _content(row: dict[str, Any]) -> str:
    splits = [
        _sized(split, videos, row["parts"][split]) + _lacking(row, split) for split, videos in row["splits"].items()
    ]
    return f"{row['dataset']}: {', '.join(splits)}"


def _sized(split: str, num_videos: int, num_parts: int) -> str:
    return f"{split} {num_videos}" + (f" in {num_parts} parts" if num_parts > 1 else "")


def _lacking(row: dict[str, Any], split: str) -> str:
    complete, failed = row["complete"][split], row["failed"][split]
    words = [f"{complete} complete"] if complete + failed < row["splits"][split] else []
    words += [f"{failed} failed"] if failed else []
    return f" ({', '.join(words)})" if words else ""


def _features(row: dict[str, Any]) -> str:
    layers = ",".join(([STEM] if row["stem"] else []) + [str(layer) for layer in row["layers"]]) or NO_LAYERS
    return f"{row['model']}, layers {layers}, {row['dtype']}, cross-frame {row['cross_frame']}"


def used_by_line(used_by: Sequence[dict[str, str]]) -> str:
    """ "used by 2 runs: ..."."""
    if not used_by:
        return "used by no run that is known"
    names = [_short(use) for use in used_by[:_MOST_RUNS]]
    more = f" and {len(used_by) - _MOST_RUNS} more" if len(used_by) > _MOST_RUNS else ""
    return f"used by {count(len(used_by), 'run')}: {', '.join(names)}{more}"


def _short(use: dict[str, str]) -> str:
    path, words = Path(use["run"]), []
    name = str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else str(path)
    words += [] if use["status"] == "complete" else [use["status"]]
    words += ["by its key"] if use["by"] == "key" else []
    return name + (f" ({', '.join(words)})" if words else "")


def _stores_elsewhere(found: FoundRuns, listed: set[str]) -> dict[str, int]:
    """Stores in other folders that runs refer to, and by how many."""
    listed = {str(store_path(path).resolve()) for path in listed}
    named = Counter(store for run in found.runs if run.has_store for store in run.stores if store not in listed)
    return dict(sorted(named.items()))
