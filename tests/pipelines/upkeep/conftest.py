"""Folders that look like stores and runs to whoever removes them, made in no time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.store.manifest import Manifest


def make_store(path: Path, *, key: str = "k" * 16, dataset: str = "tiny", shards: int = 2) -> Path:
    """A manifest as it is written, and files where shards and records lie."""
    manifest = Manifest(key=key, spec={}, dataset=dataset, class_names=("a",), rows_per_shard=4, splits={"train": 4})
    files = {f"train/tokens/c/{number}": b"x" * (100 + number) for number in range(shards)}
    told = {"zarr_format": 3, "node_type": "group", "attributes": {"vcache": manifest.to_json()}}
    for name, data in {**files, "_commit/writer.lock": b"", "zarr.json": json.dumps(told).encode()}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_run(
    path: Path, store: Path | str | None, *, key: str = "k" * 16, dataset: str = "tiny", complete: bool = True
) -> Path:
    """What is read of a run without building its head."""
    store = None if store is None else str(store)
    config = {
        "head": "linear",
        "head_config": {},
        "dataset": dataset,
        "store": store,
        "store_key": key if store else None,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "val_top1": 0.625}) + "\n")
    if complete:
        (path / "head.safetensors").write_bytes(b"weights")
    return path


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every file with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store_at() -> Callable[..., Path]:
    return make_store


@pytest.fixture
def run_at_path() -> Callable[..., Path]:
    return make_run


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    return bytes_below
