"""Arrays of the whole store, without an axis of videos: `constants/<name>`.

They are what rows of every split are read with: channel statistics, frozen weights. Each is a Zarr array of one chunk; the
manifest names it with the CRC32C of its values, so one that was lost, damaged or exchanged is noticed. What the manifest does
not name is what a killed writer left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore, StoreExists
from vcache.store.files import published_folder
from vcache.store.findings import mend_command
from vcache.store.groups import make_groups, write_manifest
from vcache.store.object_path import StorePath, readable_folder, remove_tree

if TYPE_CHECKING:  # the reader imports this module
    from vcache.store.reader import FeatureStore

CONSTANTS = "constants"


@dataclass(frozen=True, eq=False)
class Constant:
    """Values with a name for each axis, as ("channel",)."""

    dims: tuple[str, ...]
    values: np.ndarray
    exact: bool = True
    """Whether these bits are the only right ones. Not so of what a device computes from what is proven to be the same: made
    again on another machine, its last bits may differ."""

    def __post_init__(self) -> None:
        if len(self.dims) != self.values.ndim or not self.values.size:
            raise ValueError(f"a constant of shape {self.values.shape} cannot have the axes {self.dims}")
        if self.values.dtype.kind == "f" and not np.isfinite(self.values).all():
            raise ValueError("a constant must be finite")


def write_constants(store: "FeatureStore", constants: Mapping[str, Constant]) -> None:
    """Add constants to a store, all or none, and refresh `store`. The same values again are no change, but
    bring back a constant whose folder was deleted.

    Raises:
        StoreExists: a constant of that name is there with other values.
    """
    store.refresh()
    known = store.manifest.constants
    checksums = {name: checksum(constant.values) for name, constant in constants.items()}
    if other := sorted(name for name in checksums.keys() & known.keys() if checksums[name] != known[name]):
        raise StoreExists(f"{store.path} has other values of {', '.join(other)}; what is stored is never changed")
    for name in sorted(checksums):
        if name not in known or not (store.path / CONSTANTS / name).exists():
            rewrite_constant(store.path, name, constants[name])
    if not checksums.keys() <= known.keys():
        write_manifest(store.path, replace(store.manifest, constants=dict(sorted({**known, **checksums}.items()))))
        store.refresh()


def read_constant(store: StorePath, name: str, expected: int) -> np.ndarray:
    """The values of a constant, checked against the manifest's CRC32C.

    Raises:
        CorruptStore: it is missing, damaged, or not the one that the manifest names.
    """
    folder = store / CONSTANTS / name
    with readable_folder(folder) as readable:
        try:
            array: Any = zarr.open_array(store=str(readable), mode="r", zarr_format=3)
            values = np.asarray(array[...])
        # Damaged metadata or data surface as many kinds of exception inside zarr-python.
        except Exception as error:
            raise _corrupt(folder, str(error)) from error
    if checksum(values) != expected:
        raise _corrupt(folder, "its values are not those that the manifest names")
    return values


def checksum(values: np.ndarray) -> int:
    """CRC32C of the values as little-endian bytes, continued over dtype and shape."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return int(crc32c(f"{values.dtype.name}{values.shape}".encode(), crc32c(little.tobytes())))


def rewrite_constant(store: StorePath, name: str, constant: Constant) -> None:
    """Put a constant in place of whatever is there; the manifest is not changed."""
    folder = store / CONSTANTS / name
    make_groups(folder.parent, store)
    remove_tree(folder)
    with published_folder(folder) as temporary:
        array = zarr.create_array(
            store=str(temporary),
            shape=constant.values.shape,
            dtype=constant.values.dtype,
            chunks=constant.values.shape,
            compressors=[Crc32cCodec()],
            dimension_names=list(constant.dims),
            zarr_format=3,
            config={"write_empty_chunks": True},
            overwrite=True,
        )
        array[...] = constant.values


def _corrupt(folder: StorePath, what: str) -> CorruptStore:
    store = next(parent.parent for parent in folder.parents if parent.name == CONSTANTS)
    return CorruptStore(f"constant {folder} is damaged: {what}. {mend_command(store)}")
