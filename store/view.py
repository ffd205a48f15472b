"""What one view of a part holds: its arrays, its commit records, and the state of every row. Filled from disk once."""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from vcache.store.commits import CommitRecord, RowFailure, StoredFile, read_commits
from vcache.store.errors import ArrayNotFound, CorruptStore, UnsupportedFormat
from vcache.store.findings import mend_command
from vcache.store.layout import METADATA, ArraySpec, spec_of_metadata
from vcache.store.object_path import StorePath
from vcache.store.parts import PartName

ABSENT, READABLE, FAILED = 0, 1, 2


class StoredView:
    """A snapshot of `<part>/view-<v>`; what other processes commit later is not in it. Rows are rows of the part."""

    def __init__(self, store: StorePath, part: PartName, view: int, num_rows: int, rows_per_shard: int) -> None:
        self.store, self.part, self.view = store, part, view
        self.num_rows, self.rows_per_shard = num_rows, rows_per_shard
        self.folder = view_folder(store, part, view)
        self._row_states: dict[str, np.ndarray] = {}
        self._pass_states: dict[frozenset[str], np.ndarray] = {}
        self._pass_specs: dict[frozenset[str], list[tuple[StoredFile, CommitRecord]]] = {}

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The declared arrays by name, written or not."""
        folders = sorted(self.folder.glob("*/")) + sorted(self.folder.glob("*/*/"))
        names = [folder.relative_to(self.folder).as_posix() for folder in folders]
        specs = (read_spec(self.folder, name, self.num_rows, self.rows_per_shard) for name in names)
        return {spec.name: spec for spec in specs if spec is not None}

    @cached_property
    def records(self) -> dict[int, list[CommitRecord]]:
        """Commit records by shard."""
        records: dict[int, list[CommitRecord]] = {}
        for record in read_commits(self.store, self.part, self.view):
            records.setdefault(record.shard, []).append(record)
        return records

    @cached_property
    def _passes(self) -> dict[frozenset[str], list[CommitRecord]]:
        """Commit records by the arrays they name: a few groups of thousands, alike in all but their rows."""
        passes: dict[frozenset[str], list[CommitRecord]] = {}
        for group in self.records.values():
            for record in group:
                passes.setdefault(record.arrays, []).append(record)
        return passes

    def include(self, record: CommitRecord) -> None:
        """Take in a record that was just committed."""
        known = self.records.setdefault(record.shard, [])
        if record not in known:
            known.append(record)
        self.__dict__.pop("_passes", None)
        self._row_states.clear()
        self._pass_states.clear()
        self._pass_specs.clear()

    def spec(self, name: str) -> ArraySpec:
        """The declared array; raises ArrayNotFound with the names there are."""
        if name not in self.specs:
            there = ", ".join(sorted(self.specs)) or "none"
            raise ArrayNotFound(
                f"no array {name!r} in {self.part}/view-{self.view} of {self.store}; there are: {there}"
            )
        return self.specs[name]

    def row_states(self, name: str) -> np.ndarray:
        """ABSENT, READABLE or FAILED for each row of the array."""
        states = self._row_states.get(name)
        if states is None:
            self.spec(name)
            states = np.full(self.num_rows, ABSENT, dtype=np.int8)
            for arrays in self._passes:
                if name in arrays:
                    self._check_committed_specs(arrays, name)
                    np.maximum(states, self._states_of_pass(arrays), out=states)
            self._row_states[name] = states
        return states

    def _states_of_pass(self, arrays: frozenset[str]) -> np.ndarray:
        """The states of the rows that all arrays of one pass share."""
        states = self._pass_states.get(arrays)
        if states is None:
            states = np.full(self.num_rows, ABSENT, dtype=np.int8)
            for record in self._passes[arrays]:
                states[record.first_row : record.first_row + record.num_rows] = READABLE
                if record.failures:
                    states[[failure.row for failure in record.failures]] = FAILED
            self._pass_states[arrays] = states
        return states

    def failures(self, name: str | None = None) -> list[RowFailure]:
        """Failed rows in order, one entry each; of one array or of any."""
        return _by_row(failure for record in self._records_of(name) for failure in record.failures)

    def partial(self, name: str | None = None) -> list[RowFailure]:
        """Rows stored although their video is damaged, in order, one entry each; of one array or of any."""
        return _by_row(row for record in self._records_of(name) for row in record.partial)

    def _records_of(self, name: str | None) -> Iterator[CommitRecord]:
        for arrays, records in self._passes.items():
            if name is None or name in arrays:
                yield from records

    def stored_file(self, name: str, shard: int) -> tuple[StoredFile, CommitRecord]:
        """What was committed of an array in a shard, and the record that says so."""
        for record in self.records.get(shard, []):
            for file in record.files:
                if file.spec.name == name:
                    self._check_same_spec(file, record)
                    return file, record
        raise LookupError(f"{name} of shard {shard} is not committed")

    def size_bytes(self) -> int:
        files: Iterable[StoredFile] = (
            file for group in self.records.values() for record in group for file in record.files
        )
        return sum(file.size_bytes for file in files)

    def _check_committed_specs(self, arrays: frozenset[str], name: str) -> None:
        """Every record of the pass committed the array as it is declared; records share specs, so a few are compared."""
        if arrays not in self._pass_specs:
            found = {id(file.spec): (file, record) for record in self._passes[arrays] for file in record.files}
            self._pass_specs[arrays] = list(found.values())
        for file, record in self._pass_specs[arrays]:
            if file.spec.name == name:
                self._check_same_spec(file, record)

    def _check_same_spec(self, file: StoredFile, record: CommitRecord) -> None:
        name = file.spec.name
        if file.spec != self.spec(name):
            raise CorruptStore(
                f"{self.folder / name / METADATA} describes {self.spec(name)}, but {record.relative_path} committed "
                f"{file.spec}: the metadata was changed. {mend_command(self.store)}"
            )


def _by_row(entries: Iterable[RowFailure]) -> list[RowFailure]:
    by_row = {entry.row: entry for entry in entries}
    return [by_row[row] for row in sorted(by_row)]


def view_folder(store: StorePath, part: str, view: int) -> StorePath:
    return store / part / f"view-{view}"


def read_spec(view: StorePath, name: str, num_rows: int, rows_per_shard: int) -> ArraySpec | None:
    """The array declared in the folder `name` of a view; None if there is none (a group, or nothing)."""
    path = view / name / METADATA
    try:
        metadata = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is damaged: {error}. {mend_command(view.parents[1])}") from error
    if not isinstance(metadata, dict) or metadata.get("node_type") not in ("array", "group"):
        what = "it describes neither an array nor a group"
        raise CorruptStore(f"{path} is damaged: {what}. {mend_command(view.parents[1])}")
    if metadata["node_type"] == "group":
        return None
    try:
        return spec_of_metadata(name, metadata, num_rows, rows_per_shard)
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{path}: {error}") from error
