"""Finds the datasets of this folder: a new dataset is one new file with a loader under `@register_dataset`.

A registered name is read from `--root`, or from the folder of that name under $VCACHE_DATA. Some loaders have no name of
their own and are chosen by what the path is: a folder, or a file by its suffix.
"""

import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import vcache.extract.datasets
from vcache.extract.datasets.base import DatasetError, VideoDataset

Loader = Callable[[Path], VideoDataset]
PathLoader = Callable[[Path, Path | None, float], VideoDataset]
_AnyLoader = TypeVar("_AnyLoader", bound=Callable[..., VideoDataset])


@dataclass(frozen=True)
class DatasetInfo:
    """One line of `vcache datasets`."""

    name: str
    summary: str
    layout: str
    """Where the annotation and the videos are expected, one place per line."""
    chosen_by_path: bool


_INFOS: dict[str, DatasetInfo] = {}
_LOADERS: dict[str, Loader] = {}
_FOLDERS: dict[str, str] = {}
_PATH_LOADERS: dict[str, PathLoader] = {}


def register_dataset(
    name: str, *, summary: str, layout: str, folder: str | None = None
) -> Callable[[_AnyLoader], _AnyLoader]:
    """Offer `load(root) -> VideoDataset` under a name; `folder` is where it lies in $VCACHE_DATA, if not under that name."""

    def register(load: _AnyLoader) -> _AnyLoader:
        _add(DatasetInfo(name, summary, layout, chosen_by_path=False))
        _LOADERS[name] = load
        _FOLDERS[name] = folder or name
        return load

    return register


def register_folds(
    name: str, load: Callable[[str, int, Path], VideoDataset], *, num_folds: int, summary: str, layout: str
) -> None:
    """Offer each official fold of one dataset as `name`, `name-2`, ...: `load(registered name, fold, root)` reads them."""

    def register(fold: int) -> None:
        fold_name = name if fold == 1 else f"{name}-{fold}"

        @register_dataset(fold_name, summary=f"{summary}, official split {fold}", layout=layout, folder=name)
        def load_fold(root: Path) -> VideoDataset:
            return load(fold_name, fold, root)

    for fold in range(1, num_folds + 1):
        register(fold)


def register_path_loader(name: str, *, summary: str, layout: str) -> Callable[[_AnyLoader], _AnyLoader]:
    """Offer `load(path, root, val_fraction) -> VideoDataset` for paths of one kind: "folder", "csv", "txt" or "rawframes"."""

    def register(load: _AnyLoader) -> _AnyLoader:
        _add(DatasetInfo(name, summary, layout, chosen_by_path=True))
        _PATH_LOADERS[name] = load
        return load

    return register


def list_datasets() -> dict[str, DatasetInfo]:
    """What `load_dataset` takes: the registered names in alphabetical order, then the kinds of path."""
    _discover()
    return dict(sorted(_INFOS.items(), key=lambda item: (item[1].chosen_by_path, item[0])))


def load_dataset(
    name_or_path: str, *, root: Path | None = None, splits: tuple[str, ...] | None = None, val_fraction: float = 0.2
) -> VideoDataset:
    """Read the annotation of a registered dataset, a folder of class folders, a CSV or a list in a .txt; no video is opened.

    Args:
        root: where a registered dataset lies (default $VCACHE_DATA/<name>), or what the paths of a file are relative to.
        splits: keep only these; None keeps all.
        val_fraction: share of the videos that become "val" where the dataset has no splits of its own.

    Raises:
        DatasetError: unknown name, nothing there, malformed annotation, no such split.
    """
    _discover()
    if not 0 <= val_fraction < 1:
        raise DatasetError(f"the share of validation videos ({val_fraction}) must be at least 0 and below 1")
    path = Path(name_or_path).expanduser()
    if name_or_path in _LOADERS:
        dataset = _LOADERS[name_or_path](_registered_root(name_or_path, root))
    elif path.is_dir():
        dataset = _PATH_LOADERS["folder"](path.absolute(), _existing(root), val_fraction)
    elif path.is_file() and (kind := _kind_of_file(path, _existing(root))) in _PATH_LOADERS:
        dataset = _PATH_LOADERS[kind](path.absolute(), _existing(root), val_fraction)
    else:
        raise DatasetError(_unknown(name_or_path))
    if not dataset.videos:
        raise DatasetError(f"{name_or_path!r} lists no videos at all (read from {dataset.root})")
    return dataset if splits is None else dataset.only(tuple(dict.fromkeys(splits)))


def _add(info: DatasetInfo) -> None:
    if info.name in _INFOS:
        raise ValueError(f"two datasets are named {info.name!r}")
    _INFOS[info.name] = info


def _discover() -> None:
    for module in pkgutil.iter_modules(vcache.extract.datasets.__path__):
        importlib.import_module(f"vcache.extract.datasets.{module.name}")


def _kind_of_file(path: Path, root: Path | None) -> str:
    """The name of the path loader for a file, by its suffix; lists of videos and of folders of frames share one."""
    from vcache.extract.datasets.rawframes import looks_like_rawframes  # a loader, which imports this module

    if path.suffix.lower() == ".txt":
        return "rawframes" if looks_like_rawframes(path, root) else "txt"
    return "csv" if path.suffix.lower() == ".csv" else ""


def _existing(root: Path | None) -> Path | None:
    if root is None:
        return None
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise DatasetError(f"--root {root} is not a folder")
    return root


def _registered_root(name: str, root: Path | None) -> Path:
    if root is not None:
        return _existing(root) or root
    data = os.environ.get("VCACHE_DATA")
    if not data:
        raise DatasetError(
            f"where is {name}? Say --root FOLDER, or set VCACHE_DATA to the folder that holds {_FOLDERS[name]}/. "
            f"It should hold:\n{_INFOS[name].layout}"
        )
    folder = Path(data).expanduser().absolute() / _FOLDERS[name]
    if not folder.is_dir():
        raise DatasetError(f"{name} is not at {folder} (from VCACHE_DATA); put it there, or say --root FOLDER")
    return folder


def _unknown(name_or_path: str) -> str:
    names = ", ".join(sorted(_LOADERS))
    if name_or_path in _PATH_LOADERS:
        return f"{name_or_path!r} is a kind of path, not a name: pass the path itself, as in  vcache extract ./videos"
    if Path(name_or_path).expanduser().is_file():
        return (
            f"{name_or_path!r} is a file that ends neither in .csv nor in .txt; list videos in a CSV with the columns "
            "path,label[,split]"
        )
    similar = difflib.get_close_matches(name_or_path.lower(), _LOADERS, n=1, cutoff=0.5)
    guess = f" Did you mean {similar[0]!r}?" if similar else ""
    return (
        f"{name_or_path!r} is neither a registered dataset (there are: {names}) nor an existing folder or file.{guess} "
        "A path to a folder reads one folder per class, a path to a CSV file reads its columns "
        "path,label[,split], to a .txt its lines `path label`"
    )
