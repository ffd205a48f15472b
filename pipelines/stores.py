"""Where stores live when nobody says: `$VCACHE_HOME`, else the user's cache folder."""

import re
from collections.abc import Iterator
from pathlib import Path

from vcache.pipelines.store_home import vcache_home
from vcache.store.errors import StoreError
from vcache.store.layout import METADATA
from vcache.store.object_path import ObjectPath, StorePath
from vcache.store.reader import FeatureStore

__all__ = ["anything_at", "default_store_path", "open_stores", "store_paths", "vcache_home"]


def default_store_path(dataset: str, model: str, num_frames: int, key: str) -> Path:
    """A name a person can tell apart in a listing, unique by the key: `k400-vit-b-16-quickgelu-8f-3c9e41.zarr`."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.removeprefix("local-dir:").rstrip("/").rsplit("/", 1)[-1].lower())
    return vcache_home() / f"{dataset}-{slug.strip('-')}-{num_frames}f-{key[:6]}.zarr"


def anything_at(path: StorePath) -> bool:
    """Whether a store cannot be made at the path. In an object store only a store is in the way: what a killed creation left
    is not one, and create_store refuses what is foreign."""
    return (path / METADATA).exists() if isinstance(path, ObjectPath) else path.exists()


def store_paths(folder: StorePath) -> list[StorePath]:
    """The stores directly in `folder`, by name; a folder that is not there holds none."""
    return sorted(path for path in folder.glob("*.zarr") if path.is_dir()) if folder.is_dir() else []


def open_stores(folder: StorePath) -> Iterator[tuple[StorePath, FeatureStore | StoreError]]:
    """Each store of `folder` opened, or the error that opening it gave: a listing must not end at the first bad one."""
    for path in store_paths(folder):
        try:
            yield path, FeatureStore.open(path)
        except StoreError as error:
            yield path, error
