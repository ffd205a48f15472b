"""The table of videos of a part: string arrays `video_id` and `path`, int64 `label`, through zarr-python.

Read once per store, so the speed of zarr-python does not matter here. Each array is one chunk with a CRC32C.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from vcache.store.checksum import crc32c
from vcache.store.errors import CorruptStore
from vcache.store.findings import mend_command
from vcache.store.layout import METADATA
from vcache.store.manifest import VideoTable
from vcache.store.object_path import StorePath, readable_folder

_CHECKSUM = "vcache_table_crc32c"


def write_table(folder: Path, table: VideoTable) -> None:
    """Make `folder` a Zarr group with the three arrays; not synced."""
    group = zarr.create_group(store=str(folder), zarr_format=3, attributes=table_attributes(table))
    _write(group, "video_id", np.array(table.ids, dtype=np.dtypes.StringDType()), "string")
    _write(group, "path", np.array(table.paths, dtype=np.dtypes.StringDType()), "string")
    _write(group, "label", table.labels, "int64")


def read_table(folder: StorePath, num_rows: int) -> VideoTable:
    """Read what `write_table` wrote.

    Raises:
        CorruptStore: an array is missing, damaged, or not of `num_rows` rows.
    """
    ids, paths, labels = (read_column(folder, name, num_rows) for name in ("video_id", "path", "label"))
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    table = VideoTable(tuple(ids.tolist()), tuple(paths.tolist()), labels)
    if (written := _written_checksum(folder)) not in (None, _checksum(table)):
        raise CorruptStore(
            f"the video table {folder} is damaged: its ids, paths and labels are not those that were written together "
            f"(their checksum is {_checksum(table)}, not {written}). Restore the folder from a copy."
        )
    return table


def table_attributes(table: VideoTable) -> dict[str, int]:
    """What the group of the table says of it."""
    return {_CHECKSUM: _checksum(table)}


def was_written_here(folder: Path, table: VideoTable) -> bool:
    """Whether the group's checksum, if it can be read, is that of this table."""
    return _written_checksum(folder) in (None, _checksum(table))


def _checksum(table: VideoTable) -> int:
    """CRC32C of the three arrays: each has one of its own, but sound arrays may be exchanged for one another."""
    texts = (len(text).to_bytes(4, "little") + text for text in map(str.encode, chain(table.ids, table.paths)))
    return crc32c(table.labels.astype("<i8").tobytes(), crc32c(b"".join(texts)))


def _written_checksum(folder: StorePath) -> object:
    """None where the group cannot tell: it is damaged, which is for verify to say, or of before this checksum."""
    try:
        return json.loads((folder / METADATA).read_bytes())["attributes"].get(_CHECKSUM)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def join_tables(store: StorePath, split: str, tables: Sequence[VideoTable]) -> VideoTable:
    """The tables of the parts of a split as one.

    Raises:
        CorruptStore: two parts have a video of the same id.
    """
    ids, paths, labels = zip(*((table.ids, table.paths, table.labels) for table in tables), strict=True)
    try:
        return VideoTable(tuple(chain(*ids)), tuple(chain(*paths)), np.concatenate(labels))
    except ValueError as error:
        raise CorruptStore(
            f"the video tables of the parts of split {split!r} of {store} clash: {error}. Restore them from a copy."
        ) from error


def _write(group: zarr.Group, name: str, values: np.ndarray, dtype: str) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=dtype,
        chunks=values.shape,
        compressors=[Crc32cCodec()],
        fill_value="" if dtype == "string" else int(np.iinfo(np.int64).min),
        dimension_names=["video"],
        # Without this, a chunk that holds nothing but the fill value gets no file, and looks like a lost one.
        config={"write_empty_chunks": True},
    )
    array[:] = values


def read_column(folder: StorePath, name: str, num_rows: int) -> np.ndarray:
    """One of the three arrays; raises CorruptStore as `read_table` does."""
    chunk = folder / name / "c" / "0"
    if not chunk.is_file():  # zarr-python would give fill values
        raise CorruptStore(f"the video table {folder} is damaged: {chunk} is missing. {mend_command(folder.parent)}")
    with readable_folder(folder / name) as readable:
        try:
            array: Any = zarr.open_array(store=str(readable), mode="r", zarr_format=3)
            values = np.asarray(array[:])
            codecs = [type(codec) for codec in array.metadata.codecs]
        # Damaged metadata or data surface as many kinds of exception inside zarr-python.
        except Exception as error:
            raise CorruptStore(
                f"the video table {folder} is damaged, array {name}: {error}. {mend_command(folder.parent)}"
            ) from error
    if values.shape != (num_rows,) or Crc32cCodec not in codecs:
        raise CorruptStore(
            f"the video table {folder} is damaged: {name} has shape {values.shape}, the manifest says {num_rows} rows. "
            f"{mend_command(folder.parent)}"
        )
    return values
