"""A thousand faults and more: whatever happens to whichever byte, a read gives the true values or says what is wrong."""

import itertools
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bit_rot import FAULTS, places
from conftest import World

from vcache.store.errors import ArrayNotFound, CorruptStore, RowNotCommitted, StoreError, UnsupportedFormat
from vcache.store.reader import FeatureStore

ALL_ROWS = range(7)
MEMORY = "/dev/shm"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    with tempfile.TemporaryDirectory(
        dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path_factory.mktemp("rot")
    ) as folder:
        path = Path(folder, "s.zarr")
        World().build(path)
        yield path


@pytest.fixture(scope="module")
def truth():
    world = World()
    return {spec.name: np.stack([world.value(spec, row) for row in ALL_ROWS]) for spec in world.all}


def single_row(store, truth, place, rng):
    name, row = near(place, rng)
    same(store.read("train", name, [row]), truth[name][[row]])


def batch_with_repeats(store, truth, place, rng):
    name, row = near(place, rng)
    rows = [row, *rng.choices(ALL_ROWS, k=3), row]
    same(store.read("train", name, rows), truth[name][rows])


def frame_subset(store, truth, place, rng):
    name, row = near(place, rng, by_frame=True)
    frames = rng.choices(range(4), k=2)
    same(store.read("train", name, [row], frames=frames), truth[name][[row]][:, frames])


def whole_view(store, truth, place, rng):
    for name in rng.sample(sorted(truth), k=len(truth)):
        same(store.read("train", name, ALL_ROWS), truth[name])
    expected = World().videos(7)
    table = store.videos("train")
    assert (table.ids, table.paths) == (expected.ids, expected.paths), "other data"
    same(table.labels, expected.labels)


SELECTIONS = (single_row, batch_with_repeats, frame_subset, whole_view)


def near(place, rng, by_frame=False):
    """An array and a row: those of the damaged file where it has them, as far as the selection allows."""
    names = ("tokens/8", "q/8") if by_frame else tuple(spec.name for spec in World().all)
    name = place.array if place.array in names else rng.choice(names)
    rows = ALL_ROWS if place.shard is None else range(3 * place.shard, min(3 * place.shard + 3, 7))
    return name, rng.choice(rows)


def same(read, expected):
    assert read.dtype == expected.dtype
    assert np.array_equal(read, expected), "other data"


def outcome(sound, truth, place, select, rng):
    """ "read" if the values are the true ones, else the name of the error; other values fail the test."""
    try:
        with FeatureStore.open(sound, num_threads=1) as store:
            select(store, truth, place, rng)
    except StoreError as error:
        check_words(error, sound, place)
        return type(error).__name__
    return "read"


def check_words(error, sound, place):
    """The message names the file, or for what is simply not there any more the store."""
    assert str(sound) in str(error), error
    if isinstance(error, CorruptStore) and place.kind in ("data", "chunk crc", "seal", "index", "index crc"):
        assert str(sound / "train" / "view-0") in str(error), error
    if isinstance(error, RowNotCommitted):
        assert "vidéo-" in str(error)
        assert place.kind == "record"
    if isinstance(error, ArrayNotFound):
        assert place.kind.endswith("metadata")


def test_no_fault_ever_gives_other_values(sound, truth):
    rng = random.Random(0)
    by_kind = places(sound, World().all, 3)
    assert by_kind.keys() >= {"data", "chunk crc", "seal", "index", "index crc", "record", "array metadata",
                              "group metadata", "manifest", "table"}  # fmt: skip
    outcomes = Counter()
    cases = itertools.product(sorted(by_kind), FAULTS, SELECTIONS)
    for kind, fault, select in itertools.islice(itertools.cycle(cases), 1200):
        place = rng.choice(by_kind[kind])
        restore = fault(place, rng, sound)
        try:
            outcomes[kind, fault.__name__, outcome(sound, truth, place, select, rng)] += 1
        except Exception as error:
            error.add_note(f"{fault.__name__} in {kind} {place}, {select.__name__}")
            raise
        finally:
            restore()
    assert outcome(sound, truth, place, whole_view, rng) == "read"
    check_reach(outcomes)


def check_reach(outcomes):
    """Enough of the faults were met by the read beside them, in each class of bytes."""
    assert outcomes.total() >= 1000
    noticed = Counter()
    for (kind, _, result), count in outcomes.items():
        noticed[kind] += count * (result != "read")
    assert noticed.total() >= 600
    # Nothing that is read depends on the metadata of groups: those are for other Zarr readers.
    assert all(noticed[kind] >= 30 for kind in {kind for kind, _, _ in outcomes} - {"group metadata"})


def test_every_two_shard_files_exchanged_are_noticed(sound, truth):
    """Sound files, and among shards of one size the index is the same."""
    files = sorted({place.file for place in places(sound, World().all, 3)["seal"]})
    for one, two in itertools.combinations(files, 2):
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        for file in (one, two):
            name, shard = file.relative_to(sound / "train" / "view-0").as_posix().split("/c/")
            with FeatureStore.open(sound) as store, pytest.raises(CorruptStore, match=str(file)):
                store.read("train", name, [3 * int(shard.split("/")[0])])
        one.write_bytes(first)
        two.write_bytes(second)
    assert len(files) == 18


def test_a_format_version_that_is_none_is_refused(sound):
    path = sound / "zarr.json"
    before = path.read_text()
    for version in ("0", "2", "17", "-1", "true", '"1"', "1.0", "null"):
        path.write_text(before.replace('"format_version": 1', f'"format_version": {version}'))
        with pytest.raises(UnsupportedFormat, match=str(sound)):
            FeatureStore.open(sound)
    path.write_text(before)
