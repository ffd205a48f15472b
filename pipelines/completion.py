"""What the shell offers after a TAB: heads, presets, datasets, sets of templates, and the runs and stores that are in reach.

Every option or argument of the names in COMPLETIONS is completed so, in whichever command. A shell waits for the answer, so
nothing here loads torch or zarr: heads are read off their source. What is not found here, the shell completes as a path.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import ParameterInfo

_HEAD = re.compile(r'^@register_head\("([^"]+)"\)', flags=re.MULTILINE)
_RUN, _SWEEP, _STORE = "config.json", "sweep.json", "zarr.json"


def offer_completions(command: Callable[..., None]) -> None:
    """Let Typer complete the parameters of a command; those that say themselves how they are completed are left as they are."""
    for name, hint in get_type_hints(command, include_extras=True).items():
        if name not in COMPLETIONS or get_origin(hint) is not Annotated:
            continue
        for told in get_args(hint)[1:]:
            if isinstance(told, ParameterInfo) and told.autocompletion is None:
                told.autocompletion = COMPLETIONS[name]


def heads(incomplete: str) -> list[str]:
    """Names under which heads are registered."""
    folder = _folder_of("vcache.heads")
    names = {name for file in folder.glob("*.py") for name in _HEAD.findall(file.read_text(encoding="utf-8"))}
    return _starting(sorted(names), incomplete)


def presets(ctx: Any, incomplete: str) -> list[str]:
    """Of the head that the line names; of none, those of all. `ctx` is Click's context, by whichever name Typer has it."""
    from vcache.pipelines.head_presets import presets_of

    known = heads("")
    line = (ctx.params.get("head"), ctx.params.get("heads"), *ctx.args)  # words of a line that is not whole are in args
    named = [word for word in line if word in known]
    return _starting((preset for head in named[:1] or known for preset in presets_of(head)), incomplete)


def datasets(incomplete: str) -> list[str]:
    """Those with a name of their own; others are paths."""
    from vcache.extract.datasets.registry import list_datasets

    return _starting((name for name, info in list_datasets().items() if not info.chosen_by_path), incomplete)


def templates(incomplete: str) -> list[str]:
    """Sets of templates by name."""
    from vcache.pipelines.templates import TEMPLATE_SETS

    return _starting(TEMPLATE_SETS, incomplete)


def devices(incomplete: str) -> list[str]:
    """What every machine may be asked for."""
    return _starting(("auto", "cpu", "cuda", "cuda:0"), incomplete)


def runs(incomplete: str) -> list[str]:
    """Runs and sweeps where the word points to, in this folder and in runs/."""
    return _starting(_folders_with((_RUN, _SWEEP), incomplete, Path("runs")), incomplete)


def stores(incomplete: str) -> list[str]:
    """Stores where the word points to, in this folder and in the one of all stores."""
    from vcache.pipelines.store_home import vcache_home

    return _starting(_folders_with((_STORE,), incomplete, vcache_home()), incomplete)


def runs_and_stores(incomplete: str) -> list[str]:
    """Both."""
    return [*runs(incomplete), *stores(incomplete)]


COMPLETIONS: dict[str, Callable[..., list[str]]] = {
    "head": heads,
    "heads": heads,
    "preset": presets,
    "dataset": datasets,
    "templates": templates,
    "device": devices,
    "run": runs,
    "runs": runs,
    "members": runs,
    "store": stores,
    "stores": stores,
    "where": stores,
    "sources": runs_and_stores,
}
"""By the parameter's name."""


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)]


def _folders_with(files: tuple[str, ...], incomplete: str, usual: Path) -> Iterator[str]:
    """Folders that hold one of the files, in the order of their names; a folder that cannot be read holds none."""
    pointed = Path(incomplete.rpartition("/")[0] + "/") if "/" in incomplete else Path()
    for parent in dict.fromkeys((pointed, usual)):
        try:
            found = sorted(path for path in parent.iterdir() if any((path / name).is_file() for name in files))
        except OSError:
            continue
        yield from map(str, found)
