"""Writing a store: create it, declare arrays, write whole shards. A shard has one owner, and counts once committed.

create_store(path, manifest, {"train": table})
store = FeatureStore.open(path)
(part,) = store.parts("train")
declare_arrays(store, part, specs)
with ShardWriter(store, part, 0, specs) as writer:
    for row in store.shard_rows(part, 0):
        writer.write(row, {"tokens/8": ..., "cls/8": ...})   # or writer.fail(RowFailure(row, ...))
part = add_videos(store, "train", table)                     # later: again arrays and shards, of that part
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vcache.store.commits import COMMITS, CommitRecord, read_shard_commits
from vcache.store.commits import RowFailure as RowFailure
from vcache.store.errors import ArrayNotFound, NotFinite, StoreExists
from vcache.store.files import (
    folders_up,
    in_parallel,
    make_folders,
    published_folder,
    remove_stale_temporaries,
    sync_folder,
    write_durably,
    write_once,
)
from vcache.store.finite import all_finite
from vcache.store.groups import encode_manifest, make_groups, write_manifest
from vcache.store.layout import (
    BFLOAT16,
    METADATA,
    ArraySpec,
    array_metadata,
    encode_metadata,
    group_metadata,
    widened_bfloat16,
)
from vcache.store.locks import sole_writer as sole_writer
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.object_path import ObjectPath, StorePath, local, remove_tree, store_path
from vcache.store.parts import PartName, check_split_name, part_name, split_of
from vcache.store.reader import FeatureStore
from vcache.store.shard_file import ShardFileWriter
from vcache.store.tables import check_columns, write_table
from vcache.store.view import read_spec, view_folder


def create_store(path: str | StorePath, manifest: Manifest, videos: Mapping[str, VideoTable]) -> None:
    """Make a store with these splits and no arrays: whole at `path`, or not there at all.

    Raises:
        StoreExists: there is something at `path`.
        ValueError: `videos` and `manifest.splits` do not agree.
    """
    path = store_path(path)
    num_rows = {split: len(table) for split, table in videos.items()}
    if num_rows != manifest.splits:
        raise ValueError(f"the manifest has splits {manifest.splits}, the video tables have {num_rows}")
    make_folders(path.parent)
    with published_folder(path) as folder:
        for split, table in videos.items():
            write_table(folder / split, table)
        (folder / COMMITS).mkdir()
        # As a group of its own it does not make Zarr libraries warn about an unknown folder.
        (folder / COMMITS / METADATA).write_bytes(encode_metadata(group_metadata()))
        (folder / METADATA).write_bytes(encode_manifest(manifest))


def add_split(store: FeatureStore, split: str, table: VideoTable) -> None:
    """Add a split to a store, and refresh `store`.

    Raises:
        StoreExists: the store has a split of that name.
        ValueError: a split cannot have that name.
    """
    store.refresh()
    check_split_name(split)
    if split in store.splits:
        raise StoreExists(f"{store.path} already has a split {split!r} of {store.splits[split]} videos")
    _add_part(store, part_name(split, 0), table)


def add_videos(store: FeatureStore, split: str, table: VideoTable) -> PartName:
    """Add videos behind those of a split, as a new part without arrays; refresh `store`, and return the part.

    Of the files that are there, only the manifest changes. Of two processes that add at the same time one would be lost:
    hold `sole_writer`.

    Raises:
        SplitNotFound: there is no such split to add to.
        StoreExists: the split has one of the videos.
        ValueError: the split has other columns.
    """
    store.refresh()
    if known := frozenset(store.videos(split).ids).intersection(table.ids):
        raise StoreExists(f"split {split!r} of {store.path} already has video {min(known)!r}")
    check_columns(table, store.videos(split))
    part = part_name(split, len(store.parts(split)))
    _add_part(store, part, table)
    return part


def _add_part(store: FeatureStore, part: PartName, table: VideoTable) -> None:
    """The folder first, then the manifest: a part is there once the manifest names it."""
    manifest = replace(store.manifest, splits=store.manifest.splits | {part: len(table)})
    # A part that the manifest does not name is what a killed call left: no array can be in it.
    remove_tree(store.path / part)
    with published_folder(store.path / part) as folder:
        write_table(folder, table)
    write_manifest(store.path, manifest)
    store.refresh()


def record_facts(store: FeatureStore, facts: Mapping[str, Any]) -> None:
    """Add facts to the manifest, or replace those of the same name, and refresh `store`."""
    store.refresh()
    write_manifest(store.path, replace(store.manifest, facts={**store.manifest.facts, **facts}))
    store.refresh()


def declare_arrays(store: FeatureStore, part: PartName, specs: Iterable[ArraySpec], view: int = 0) -> None:
    """Write the metadata of arrays, so that shards of them can be written, and refresh `store`. Again is no change.

    Raises:
        ValueError: this or another part of the split declares an array of that name with another shape, chunk, dtype or dims.
    """
    folder = view_folder(store.path, part, view)
    num_rows, rows_per_shard = store.manifest.splits[part], store.manifest.rows_per_shard
    for spec in specs:
        declared = {sibling: _declared(store, sibling, spec.name, view) for sibling in store.parts(split_of(part))}
        for sibling, there in declared.items():
            if there not in (None, spec):
                raise ValueError(f"{spec.name} of {sibling}/view-{view} is declared as {there}, not {spec}")
        if declared[part] is None:
            make_groups((folder / spec.name).parent, store.path / part)
            (folder / spec.name).mkdir(exist_ok=True)
            metadata = array_metadata(spec, num_rows, rows_per_shard)
            write_durably(folder / spec.name / METADATA, encode_metadata(metadata))
            sync_folder((folder / spec.name).parent)
    store.refresh()


def clean_temporary(store: FeatureStore) -> int:
    """Remove what killed writers left, and leave what living ones are writing; returns how many leftovers there were.

    Leftovers take space and do no other harm. An object store has none: what is not complete is no object. Beside processes
    on other machines it takes a `set_up_turn`: the folder that one of them fills is locked for its own machine alone.
    """
    if isinstance(store.path, ObjectPath):
        return 0
    path = local(store.path)

    def candidates() -> Iterator[Path]:
        yield from path.parent.glob(f".{path.name}.*")
        for folder, subfolders, names in os.walk(path):
            yield from (Path(folder, name) for name in [*names, *subfolders])
            subfolders[:] = [name for name in subfolders if name != "c"]  # finished shards only

    return remove_stale_temporaries(candidates())


class ShardWriter:
    """Writes one shard of some arrays of a view: rows in order, to temporary files, committed on a clean exit.

    A row is on its way to disk when `write` returns and memory holds no more than that row. On an exception nothing is
    committed and the temporary files are removed; a killed process leaves them to `clean_temporary`.
    """

    def __init__(
        self, store: FeatureStore, part: PartName, shard: int, specs: Iterable[ArraySpec], view: int = 0
    ) -> None:
        """
        Raises:
            ArrayNotFound: an array is not declared like this.
            StoreExists: the shard holds one of the arrays already.
        """
        self.store, self.part, self.shard, self.view = store, part, shard, view
        self.rows = store.shard_rows(part, shard)
        self.specs = {spec.name: spec for spec in specs}
        self._folder = view_folder(store.path, part, view)
        self._check_declared()
        self._files: dict[str, ShardFileWriter] = {}
        self._failures: list[RowFailure] = []
        self._partial: list[RowFailure] = []
        self._next_row = self.rows.start

    def __enter__(self) -> "ShardWriter":
        self._refuse_stored()
        try:
            for name, spec in self.specs.items():
                self._files[name] = ShardFileWriter(self._folder, spec, self.shard, self.store.manifest.rows_per_shard)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, row: int, arrays: Mapping[str, np.ndarray], *, partial: RowFailure | None = None) -> None:
        """Append one row of every array; `partial` says what is wrong with its video if that is damaged.

        Raises:
            ValueError: the row is not the next one, an array is missing or too many, or has another shape or dtype than
                declared; or it holds NaN or infinity (NotFinite). Nothing of the row is written then.
        """
        self._check_next(row)
        if partial is not None and partial.row != row:
            raise ValueError(f"row {row} is written with the damage of row {partial.row}")
        if arrays.keys() != self.specs.keys():
            missing, unknown = sorted(self.specs.keys() - arrays.keys()), sorted(arrays.keys() - self.specs.keys())
            raise ValueError(
                f"row {row} must have the arrays of this shard; missing {missing}, not declared here {unknown}"
            )
        encoded = {}
        for name, array in arrays.items():
            check_array(self.specs[name], row, array)
            encoded[name] = self._files[name].encode_row(array)  # at once, while it is in the processor's cache
        for name, buffers in encoded.items():
            self._files[name].append(row - self.rows.start, buffers)
        if partial is not None:
            self._partial.append(partial)
        self._next_row += 1

    def fail(self, failure: RowFailure) -> None:
        """Record that the next row has no data, and why."""
        self._check_next(failure.row)
        self._failures.append(failure)
        self._next_row += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        """Files first, then the folders that name them, then the record that says they are there."""
        if self._next_row != self.rows.stop:
            raise ValueError(
                f"shard {self.shard} of {self.part!r} has rows {self.rows.start} to {self.rows.stop - 1}, but row "
                f"{self._next_row} was neither written nor failed; nothing of the shard is committed"
            )
        stored = [self._files[name].finish() for name in sorted(self._files)]
        in_parallel(ShardFileWriter.sync, list(self._files.values()))
        if isinstance(self.store.path, ObjectPath):  # where no lock kept others from committing it meanwhile
            self._refuse_stored()
        for file in self._files.values():
            file.publish()
        # Up to the name of the store itself: the run that declared the arrays, or added the split, may have been killed
        # before it synced them, and after a power cut a record must not be all that is left of its arrays.
        in_parallel(
            sync_folder, folders_up([file.path.parent for file in self._files.values()], self.store.path.parent)
        )
        record = CommitRecord(
            split=self.part,
            view=self.view,
            shard=self.shard,
            first_row=self.rows.start,
            num_rows=len(self.rows),
            files=tuple(stored),
            failures=tuple(self._failures),
            partial=tuple(self._partial),
        )
        path = self.store.path / record.relative_path
        path.parent.mkdir(exist_ok=True)
        sync_folder(path.parents[1])
        try:
            write_once(path, record.encode())
        except FileExistsError as error:
            raise StoreExists(
                f"another process has committed shard {self.shard} of {self.part}/view-{self.view} of {self.store.path} with "
                "other values while this one wrote it. Run one extraction at a time, and `vcache verify` now: it says whether "
                "the shard has to be redone."
            ) from error
        self.store.include(record)

    def _refuse_stored(self) -> None:
        done = [record.arrays for record in read_shard_commits(self.store.path, self.part, self.view, self.shard)]
        if stored := self.specs.keys() & frozenset[str]().union(*done):
            raise StoreExists(
                f"shard {self.shard} of {self.part}/view-{self.view} of {self.store.path} already holds "
                f"{', '.join(sorted(stored))}; stored features are never written again"
            )

    def _check_declared(self) -> None:
        if not self.specs:
            raise ValueError("a shard needs at least one array")
        for name, spec in self.specs.items():
            if (declared := _declared(self.store, self.part, name, self.view)) != spec:
                raise ArrayNotFound(
                    f"{spec} is not declared in {self.part}/view-{self.view} of {self.store.path} "
                    f"(there is {declared}); call declare_arrays first"
                )

    def _check_next(self, row: int) -> None:
        if not self._files:
            raise ValueError("a ShardWriter is used in a with statement")
        if row != self._next_row:
            raise ValueError(
                f"row {row} came where row {self._next_row} is next: each of rows {self.rows.start} to "
                f"{self.rows.stop - 1} of shard {self.shard} is written or failed once, in order"
            )

    def _discard(self) -> None:
        files, self._files = self._files, {}
        with ExitStack() as discarded:  # all of them, also when one cannot be removed
            for file in files.values():
                discarded.callback(file.discard)


def check_array(spec: ArraySpec, row: int, array: np.ndarray) -> None:
    """Raise ValueError unless the array is one row of the spec; NotFinite if it holds NaN or infinity."""
    if array.shape != spec.shape or array.dtype != spec.numpy_dtype:
        raise ValueError(
            f"{spec.name} of row {row} must be {spec.numpy_dtype} of shape {spec.shape}, got {array.dtype} of shape "
            f"{array.shape}"
        )
    if not all_finite(array, spec.exponent_bits):
        finite = np.isfinite(widened_bfloat16(array) if spec.dtype == BFLOAT16 else array)
        first = tuple(int(axis) for axis in np.argwhere(~finite)[0])
        value = widened_bfloat16(array[first]) if spec.dtype == BFLOAT16 else array[first]
        raise NotFinite(
            f"{spec.name} of row {row} holds {np.size(finite) - np.count_nonzero(finite)} values that are not finite, the "
            f"first is {value} at {first}; a head trained on it would learn nothing. Float16 overflows above "
            "65504: if this one did, store bfloat16 or float32 (--dtype float32)."
        )


def _declared(store: FeatureStore, part: PartName, name: str, view: int) -> ArraySpec | None:
    """The array as it is declared on disk now."""
    folder = view_folder(store.path, part, view)
    return read_spec(folder, name, store.manifest.splits[part], store.manifest.rows_per_shard)
