"""The table of videos of a part: string arrays `video_id` and `path`, int64 `label`, and columns, through zarr-python.

Read once per store, so the speed of zarr-python does not matter here. Each array is one chunk with a CRC32C. The attributes
of the group name the columns, so that a lost one is noticed, and have a checksum of all the arrays together.
"""

import json
from collections.abc import Mapping, Sequence
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
from vcache.store.manifest import TABLE_ARRAYS, VideoTable
from vcache.store.object_path import StorePath, readable_folder

_CHECKSUM = "vcache_table_crc32c"
_COLUMNS = "vcache_table_columns"
# The second axis of a column: a dimension may not have the name of an array of two axes.
_AXES = {"multi_hot": "class"}
_FILL_VALUES: dict[str, Any] = {
    "string": "",
    "int64": int(np.iinfo(np.int64).min),
    "float64": float("nan"),
    "uint8": 255,
    "bool": False,
}


def write_table(folder: Path, table: VideoTable) -> None:
    """Make `folder` a Zarr group with the arrays of the table; not synced."""
    group = zarr.create_group(store=str(folder), zarr_format=3, attributes=table_attributes(table))
    _write(group, "video_id", np.array(table.ids, dtype=np.dtypes.StringDType()))
    _write(group, "path", np.array(table.paths, dtype=np.dtypes.StringDType()))
    _write(group, "label", table.labels)
    for name, values in table.columns.items():
        _write(group, name, values)


def read_table(folder: StorePath, num_rows: int) -> VideoTable:
    """Read what `write_table` wrote; columns come in the order of their names.

    Raises:
        CorruptStore: an array is missing, damaged, or not of `num_rows` rows.
    """
    ids, paths, labels = (read_column(folder, name, num_rows) for name in TABLE_ARRAYS)
    columns = {name: read_column(folder, name, num_rows) for name in column_names(folder)}
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    try:
        table = VideoTable(tuple(ids.tolist()), tuple(paths.tolist()), labels, columns)
    except ValueError as error:
        raise CorruptStore(f"the video table {folder} is damaged: {error}. {mend_command(folder.parent)}") from error
    if (written := _attribute(folder, _CHECKSUM)) not in (None, _checksum(table)):
        raise CorruptStore(
            f"the video table {folder} is damaged: its ids, paths and labels are not those that were written together "
            f"(their checksum is {_checksum(table)}, not {written}). Restore the folder from a copy."
        )
    return table


def table_attributes(table: VideoTable) -> dict[str, Any]:
    """What the group of the table says of it."""
    return {_CHECKSUM: _checksum(table)} | ({_COLUMNS: sorted(table.columns)} if table.columns else {})


def was_written_here(folder: Path, table: VideoTable) -> bool:
    """Whether the group's checksum, if it can be read, is that of this table."""
    return _attribute(folder, _CHECKSUM) in (None, _checksum(table))


def column_names(folder: StorePath) -> tuple[str, ...]:
    """The columns of the table in the order of their names, as its group lists them.

    Of a group that says nothing of its table, as it is damaged or another's: the arrays that lie there.

    Raises:
        CorruptStore: the group lists something else than names.
    """
    if not {_CHECKSUM, _COLUMNS} & (_attributes(folder) or {}).keys():
        return _arrays_there(folder)
    names = _attribute(folder, _COLUMNS) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptStore(
            f"the video table {folder} is damaged: {_COLUMNS} is {names!r}, not a list of names. "
            f"{mend_command(folder.parent)}"
        )
    return tuple(sorted(names))


def table_files(folder: StorePath) -> set[StorePath]:
    """The files of the table's arrays, there or not."""
    try:
        names = (*TABLE_ARRAYS, *column_names(folder))
    except CorruptStore:
        names = (*TABLE_ARRAYS, *_arrays_there(folder))
    return {folder / name / METADATA for name in names} | {_chunk(folder, name) for name in names}


def _arrays_there(folder: StorePath) -> tuple[str, ...]:
    arrays = (child.name for child in folder.glob("*/") if (child / "c").is_dir())
    return tuple(sorted(name for name in arrays if name not in TABLE_ARRAYS))


def _checksum(table: VideoTable) -> int:
    """CRC32C of the arrays: each has one of its own, but sound arrays may be exchanged for one another."""
    checksum = crc32c(table.labels.astype("<i8").tobytes(), crc32c(_joined([*table.ids, *table.paths])))
    for name, values in sorted(table.columns.items()):
        data = _joined(values.tolist()) if _dtype(values) == "string" else _little_endian(values).tobytes()
        checksum = crc32c(data, crc32c(f"{name} {_dtype(values)} {values.shape}".encode(), checksum))
    return checksum


def _joined(texts: Sequence[str]) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in map(str.encode, texts))


def _little_endian(values: np.ndarray) -> np.ndarray:
    return values.astype(values.dtype.newbyteorder("<"))


def _attribute(folder: StorePath, name: str) -> object:
    """None where the group cannot tell: it is damaged, which is for verify to say, or of before this attribute."""
    return (_attributes(folder) or {}).get(name)


def _attributes(folder: StorePath) -> Mapping[str, object] | None:
    """None for a group that is damaged."""
    try:
        attributes = json.loads((folder / METADATA).read_bytes())["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return attributes if isinstance(attributes, dict) else None


def join_tables(store: StorePath, split: str, tables: Sequence[VideoTable]) -> VideoTable:
    """The tables of the parts of a split as one.

    Raises:
        CorruptStore: two parts have a video of the same id, or other columns.
    """
    ids, paths, labels = zip(*((table.ids, table.paths, table.labels) for table in tables), strict=True)
    try:
        return VideoTable(tuple(chain(*ids)), tuple(chain(*paths)), np.concatenate(labels), _joined_columns(tables))
    except ValueError as error:
        raise CorruptStore(
            f"the video tables of the parts of split {split!r} of {store} clash: {error}. Restore them from a copy."
        ) from error


def check_columns(table: VideoTable, others: VideoTable) -> None:
    """Raise ValueError unless the tables can be those of two parts: columns of the same names, dtypes and sizes."""
    one, other = (_described_columns(each) for each in (table, others))
    if one != other:
        raise ValueError(f"columns {', '.join(one) or 'none'} do not go with columns {', '.join(other) or 'none'}")


def _joined_columns(tables: Sequence[VideoTable]) -> dict[str, np.ndarray]:
    for table in tables[1:]:
        check_columns(table, tables[0])
    return {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}


def _described_columns(table: VideoTable) -> list[str]:
    columns = sorted(table.columns.items())
    return [
        f"{name} ({_dtype(values)}{''.join(f' x {size}' for size in values.shape[1:])})" for name, values in columns
    ]


def _dtype(values: np.ndarray) -> str:
    """What Zarr calls it."""
    return "string" if values.dtype.kind == "T" else values.dtype.name


def _write(group: zarr.Group, name: str, values: np.ndarray) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=_dtype(values),
        chunks=values.shape,
        compressors=[Crc32cCodec()],
        fill_value=_FILL_VALUES[_dtype(values)],
        dimension_names=["video", _AXES.get(name, f"{name}_axis")][: values.ndim],
        # Without this, a chunk that holds nothing but the fill value gets no file, and looks like a lost one.
        config={"write_empty_chunks": True},
    )
    array[:] = values


def _chunk(folder: StorePath, name: str) -> StorePath:
    """The file with the array's only chunk, whose name has a zero for each axis; that of one axis if there is none."""
    of_two_axes = folder / name / "c" / "0" / "0"
    return of_two_axes if of_two_axes.is_file() else folder / name / "c" / "0"


def read_column(folder: StorePath, name: str, num_rows: int) -> np.ndarray:
    """One array of the table; raises CorruptStore as `read_table` does."""
    chunk = _chunk(folder, name)
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
    axes = (1,) if name in TABLE_ARRAYS else (1, 2)
    if values.shape[:1] != (num_rows,) or values.ndim not in axes or Crc32cCodec not in codecs:
        raise CorruptStore(
            f"the video table {folder} is damaged: {name} has shape {values.shape}, the manifest says {num_rows} rows. "
            f"{mend_command(folder.parent)}"
        )
    return values
