"""A sweep as a TOML file: several heads, each with its own settings and grid, and what is common to all.

The values are those of `--set` and `--grid`; a list in a grid is one value each, a list in a list one value that is a list.
What is said of one head goes before what is common, and what is said on the command line before both.
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.sweep_spec import HeadGrid, SweepMember, expand

EXAMPLE = """\
# Three kinds of head on one store, in one read: 2 x 3 + 1 x 3 + 2 = 11 members.
# vcache sweep heads.toml --out runs/heads

[common]                        # of every head: any name that --set takes
store = "k400.zarr"             # default: the one in $VCACHE_HOME that fits
epochs = 20
batch_size = 64
seeds = 3                       # seeds 0, 1, 2; a list names them: [7, 8]

[[head]]
head = "evl"
set = { cls_dropout = 0.3 }     # of this head alone; goes before [common]
[head.grid]                     # every combination
depth = [2, 4]                  # layers = ["-2:", "-4:"] is the same; layers = [[8, 9], [10, 11]] two lists

[[head]]                        # a head may come again, with other settings
head = "evl"
set = { temporal_cross_attention = false }

[[head]]
head = "linear"
seeds = 1
grid = { lr = [1e-3, 1e-2] }
"""
"""What `vcache sweep --example` prints."""

_SUB_TABLES = ("set", "grid", "seeds")
_EITHER = (("epochs", "steps"), ("depth", "layers"), ("shots", "fraction"))
"""Two names for one thing: saying one takes the other back."""


def read_sweep(
    heads: str, settings: Mapping[str, str], grid: Mapping[str, tuple[str, ...]], num_seeds: int | None = None
) -> tuple[SweepMember, ...]:
    """The members of a command: of a head, or of a .toml file. Seeds are numbers 0 to N-1, or `seed` is set or varied.

    Raises:
        UnknownHead, SettingError: see `expand` and `read_sweep_file`.
    """
    settings, grid = dict(settings), dict(grid)
    words = [*([settings.pop("seed")] if "seed" in settings else []), *grid.pop("seed", ())]
    if words and num_seeds is not None:
        raise SettingError(f"--seeds {num_seeds} and seed={','.join(words)} both say which seeds. Do one of both.")
    if not all(word.isdecimal() for word in words):
        raise SettingError(f"seed={','.join(words)}: numbers of 0 or more expected.")
    seeds = tuple(map(int, words)) or (tuple(range(num_seeds)) if num_seeds is not None else None)
    if heads.endswith(".toml"):
        return expand(read_sweep_file(Path(heads), settings, grid, seeds))
    return expand([HeadGrid(head=heads, settings=settings, grid=grid, seeds=seeds or (0,))])


def read_sweep_file(
    path: Path,
    settings: Mapping[str, str] | None = None,
    grid: Mapping[str, tuple[str, ...]] | None = None,
    seeds: tuple[int, ...] | None = None,
) -> list[HeadGrid]:
    """The heads of a file. `settings`, `grid` and `seeds` are said beside it, for all heads, and go before what it says.

    Raises:
        SettingError: it is not there or no TOML; a key that is none (with the nearest) or of another type (with what was
            expected); no head.
    """
    document = _load(path)
    _check_keys(document, ("common", "head"), str(path))
    heads = document.get("head", [])
    if not isinstance(heads, list) or not heads:
        raise SettingError(f'{path} names no head. Add one:  [[head]]  and in the next line  head = "evl"')
    common = _read_table(document.get("common", {}), f"{path}, [common]")
    blocks = []
    for number, head in enumerate(heads, start=1):
        where = f"{path}, [[head]] {number}"
        own = _read_table(head, where)
        blocks.append(_block(common, own, where, _Table(settings or {}, grid or {}, seeds)))
    return blocks


@dataclass(frozen=True)
class _Table:
    """[common], one [[head]], or what the command line says."""

    settings: Mapping[str, str]
    grid: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...] | None


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingError(f"there is no {path}. See what to write into it with:  vcache sweep --example") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not TOML: {error}.") from error


def _check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise SettingError(f"{where}: unknown key {key!r}. {hint}There are: {', '.join(known)}.")


def _read_table(table: Any, where: str) -> _Table:
    """Settings lie in the table itself or in its `set`."""
    if not isinstance(table, dict):
        raise SettingError(f"{where}: a table expected, got {table!r}.")
    own = {name: value for name, value in table.items() if name not in _SUB_TABLES}
    further, grid = (_expect(table.get(name, {}), dict, f"{where} {name}", "a table") for name in ("set", "grid"))
    if twice := own.keys() & further.keys():
        raise SettingError(f"{where}: {min(twice)} is set in the table and in its `set`. Set it once.")
    return _Table(
        settings={name: _text(value, f"{where} {name}") for name, value in {**own, **further}.items()},
        grid={name: _values(values, f"{where} grid.{name}") for name, values in grid.items()},
        seeds=_seeds(table["seeds"], where) if "seeds" in table else None,
    )


def _block(common: _Table, own: _Table, where: str, beside: _Table) -> HeadGrid:
    """Each table replaces what those before it say of its names, be it set or varied."""
    settings: dict[str, str] = {}
    grid: dict[str, tuple[str, ...]] = {}
    for table in (common, own, beside):
        if both := table.settings.keys() & table.grid.keys():
            raise SettingError(f"{where}: {min(both)} is set and varied. Do one of both.")
        said = {*table.settings, *table.grid}
        said |= {other for pair in _EITHER for name, other in (pair, pair[::-1]) if name in said}
        settings = {name: value for name, value in settings.items() if name not in said} | dict(table.settings)
        grid = {name: values for name, values in grid.items() if name not in said} | dict(table.grid)
    if "head" not in settings:
        near = difflib.get_close_matches("head", settings, n=1)
        hint = f"; it has {near[0]!r}, which is no setting" if near else ""
        raise SettingError(f'{where}: which head? Say it as  head = "evl"{hint}')
    seeds = next((table.seeds for table in (beside, own, common) if table.seeds is not None), (0,))
    return HeadGrid(head=settings.pop("head"), settings=settings, grid=grid, seeds=seeds)


def _expect(value: Any, kind: type | tuple[type, ...], where: str, words: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SettingError(f"{where}: {words} expected, got {value!r}.")
    return value


def _values(values: Any, where: str) -> tuple[str, ...]:
    _expect(values, list, where, "a list of values")
    if not values:
        raise SettingError(f"{where}: a list of values expected, and this one is empty.")
    return tuple(_text(value, where) for value in values)


def _text(value: Any, where: str) -> str:
    """The value as `--set` takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(
            _text(_expect(item, (int, float, str), where, "a list of single values"), where) for item in value
        )
    return str(_expect(value, (int, float, str), where, "a number, a text, true, false or a list"))


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    """3 is seeds 0, 1, 2; a list names them."""
    if isinstance(value, list):
        return tuple(_expect(seed, int, f"{where} seeds", "a list of numbers") for seed in value)
    if _expect(value, int, f"{where} seeds", "a number of seeds, or a list of them,") < 1:
        raise SettingError(f"{where} seeds: 1 or more expected, got {value}.")
    return tuple(range(value))
