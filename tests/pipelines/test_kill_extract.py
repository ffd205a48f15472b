"""`vcache extract`, killed for real at random moments from the creation of the store on, and started again."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vcache.pipelines.request import ExtractionConfig
from vcache.store.errors import StoreNotFound
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import clean_temporary

# Shards of two videos, so that there are many moments between two commits.
EXTRACT = """
import torch
import vcache.pipelines.setup as setup
from vcache.pipelines.cli import main
torch.set_num_threads(1)
setup.MAX_ROWS_PER_SHARD = 2
main()
"""


def start(made: ExtractionConfig, store: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    """The command in a process of its own, which decodes in processes of its own."""
    options = {
        "--layers": made.layers, "--frames": made.frames, "--stride": made.stride, "--model": made.model,
        "--dtype": made.dtype, "--batch-size": made.batch_size, "--device": "cpu", "--store": store,
        "--decode-workers": workers,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    return subprocess.Popen([sys.executable, "-c", EXTRACT, "extract", made.dataset, *words], stdout=subprocess.DEVNULL)


def finish(made: ExtractionConfig, store: Path) -> None:
    assert start(made, store).wait() == 0
    with FeatureStore.open(store) as opened:
        assert clean_temporary(opened) == 0 or not list(store.rglob("*.tmp"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def kill_at_random(made: ExtractionConfig, store: Path, rng: random.Random, seconds: float) -> bool:
    """Wait until the process begins to change the disk, and a while; whether it was still running then."""
    before = files(store.parent)
    process = start(made, store, workers=rng.choice((1, 4)))
    while process.poll() is None and files(store.parent) == before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def check_old_or_complete(store: Path, calm: Path) -> int:
    """All that is committed equals the undisturbed store; returns how many rows of an array that is."""
    try:
        opened = FeatureStore.open(store)
    except StoreNotFound:
        return 0
    num_rows = 0
    with opened, FeatureStore.open(calm) as expected:
        for split in opened.manifest.splits:
            for name in opened.arrays(split):
                rows = np.flatnonzero(opened.committed_rows(split, [name]))
                np.testing.assert_array_equal(opened.read(split, name, rows), expected.read(split, name, rows))
                num_rows += len(rows)
        assert verify_store(opened).ok
    return num_rows


def tree(store: Path) -> dict[str, object]:
    """Every file; the manifest without the time of creation and the checksum that covers it."""
    contents: dict[str, object] = {
        file.relative_to(store.parent).as_posix(): file.read_bytes()
        for file in store.parent.rglob("*")
        if file.is_file()
    }
    manifest = json.loads((store / "zarr.json").read_bytes())["attributes"]["vcache"]
    left_out = ("created", "crc32c")
    return contents | {"s.zarr/zarr.json": {name: manifest[name] for name in manifest if name not in left_out}}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_five_moments_it_always_goes_on_to_the_same_store(
    config: Callable[..., ExtractionConfig], tmp_path: Path
) -> None:
    made, rng = config(), random.Random(0)
    calm = tmp_path / "calm" / "s.zarr"
    calm.parent.mkdir()
    process = start(made, calm)
    while not calm.exists():
        time.sleep(0.002)
    begin = time.monotonic()
    assert process.wait() == 0
    seconds, kills, found, partial = time.monotonic() - begin, 0, 0, 0
    killed = tmp_path / "killed" / "s.zarr"
    killed.parent.mkdir()
    while kills < 25:
        # Short waits, so that several kills fall into one extraction, now and then already while it is created.
        died = kill_at_random(made, killed, rng, rng.choice((0.05, 0.3, 1.0)) * seconds)
        kills += died
        now = check_old_or_complete(killed, calm)
        assert now >= found
        partial += now not in (0, check_old_or_complete(calm, calm))
        found = now
        if not died:
            assert tree(killed) == tree(calm)
            for path in sorted(killed.parent.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            found = 0
    finish(made, killed)
    assert tree(killed) == tree(calm)
    assert partial >= 3
