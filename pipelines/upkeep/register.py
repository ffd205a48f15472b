"""Which runs there are: each training, import and evaluation leaves a note of its run, as runs lie wherever `--out` says.

$VCACHE_HOME/register/DIGEST.json       of every run of this user
STORE's folder/.STORE.runs/DIGEST.json  the same beside the run's store, for others that share its disk; not in a bucket

A note has a file of its own, named by host and path and written under a temporary name, so any number of processes note runs at
once without a lock. It says where to look and proves nothing: whoever reads it looks whether the run is there.
"""

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vcache.pipelines.stores import vcache_home
from vcache.store.files import write_durably

RUN_CONFIG = "config.json"
"""As in runs.py, which loads torch."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """That a run was begun, imported or read at a place."""

    run: str
    """Absolute."""
    host: str
    mount: str
    """Where the file system of the run is mounted: a run on a disk that is not mounted now is not gone."""
    head: str
    dataset: str | None
    store: str | None
    """None of an imported head."""
    store_key: str | None
    noted: str
    """ISO 8601 time."""

    @property
    def here(self) -> bool:
        """Whether it was written on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether the run is certainly no longer at its path: this machine wrote it, and sees its disk."""
        try:
            there = (Path(self.run) / RUN_CONFIG).is_file()
            return self.here and Path(self.mount).is_mount() and not there
        except (OSError, ValueError):
            return False  # a folder that is not to be looked into, a server that is away


def is_file(path: Path) -> bool:
    """Path.is_file, and False too where it cannot be told: another user's folder, a server that is away."""
    try:
        return path.is_file()
    except OSError:
        return False


def register_folder() -> Path:
    """Of this user; need not be there."""
    return vcache_home() / "register"


def notes_beside(store: Path) -> Path:
    """The folder of the notes that lie beside a store; need not be there."""
    return store.with_name(f".{store.name}.runs")


def note_run(run: Path, config: Mapping[str, Any]) -> None:
    """Write the notes of a run with that config.json. Where nothing can be written none is: a training does not end for it."""
    run = run.resolve()
    note = Note(
        run=str(run),
        host=socket.gethostname(),
        mount=str(next(folder for folder in (run, *run.parents) if folder.is_mount())),
        head=config["head"],
        dataset=config.get("dataset"),
        store=config["store"],
        store_key=config["store_key"],
        noted=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    name = hashlib.sha256(f"{note.host}\0{note.run}".encode()).hexdigest()[:16] + ".json"
    for folder in _folders(note):
        with suppress(OSError):
            _write(folder / name, note)


def _folders(note: Note) -> list[Path]:
    store = None if note.store is None or "://" in note.store else Path(note.store)
    return [register_folder(), *([notes_beside(store)] if store is not None and store.is_dir() else [])]


def _write(file: Path, note: Note) -> None:
    if (there := _read(file)) is None or {**vars(there), "noted": ""} != {**vars(note), "noted": ""}:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, (json.dumps(asdict(note), indent=2) + "\n").encode())


def read_notes(folders: Iterable[Path]) -> dict[Path, Note]:
    """The notes in these folders by their files; what is no note is passed over."""
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    return {file: note for file in files if (note := _read(file)) is not None}


def _read(file: Path) -> Note | None:
    try:
        values = json.loads(file.read_bytes())
        told = {field.name: values[field.name] for field in fields(Note)}
        optional = ("dataset", "store", "store_key")
        sound = all(isinstance(value, str) or (value is None and name in optional) for name, value in told.items())
        return Note(**told) if sound and Path(told["run"]).is_absolute() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
