"""The golden store of format version 1 reads as its script says, and this vcache still writes the very same one."""

import json
from pathlib import Path

import numpy as np
import pytest
from make_golden_store import FAILED, FIRST_PASS, SECOND_PASS, SPLITS, constant, make, value, videos

from vcache.store.errors import RowNotCommitted, UnsupportedFormat
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

GOLDEN = Path(__file__).with_name("golden_v1")
REMAKE = "the format changed: give it a new version, or before any release make golden_v1 anew with its script"


def rows_of(split, specs):
    """The rows that hold these arrays."""
    last = 4 if specs is SECOND_PASS else SPLITS[split]
    return [row for row in range(min(last, SPLITS[split])) if (split, row) != FAILED]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("specs", [FIRST_PASS, SECOND_PASS], ids=["first pass", "second pass"])
def test_every_value_is_the_one_of_the_script(split, specs):
    with FeatureStore.open(GOLDEN) as store:
        for spec in specs:
            rows = rows_of(split, specs)
            expected = np.stack([value(split, spec, row) for row in rows])
            np.testing.assert_array_equal(store.read(split, spec.name, rows), expected)
            if spec.by_frame:
                np.testing.assert_array_equal(
                    store.read(split, spec.name, rows, frames=[2, 0, 2]), expected[:, [2, 0, 2]]
                )
            assert np.flatnonzero(store.committed_rows(split, [spec.name])).tolist() == rows
            assert store.arrays(split)[spec.name] == spec


def test_what_is_not_an_array_is_as_written():
    with FeatureStore.open(GOLDEN) as store:
        assert store.manifest.splits == SPLITS
        assert store.manifest.format_version == 1
        assert store.manifest.class_names == ("wave", "jump")
        for split in SPLITS:
            table = store.videos(split)
            assert (table.ids, table.paths) == (videos(split).ids, videos(split).paths)
            np.testing.assert_array_equal(table.labels, videos(split).labels)
        np.testing.assert_array_equal(store.constant("bias"), constant())
        assert [(failure.row, failure.kind) for failure in store.failures(FAILED[0])] == [(FAILED[1], "truncated")]
        with pytest.raises(RowNotCommitted, match="vidéo-3.*failed"):
            store.read(*FAILED[:1], "tokens/11", [FAILED[1]])
        with pytest.raises(RowNotCommitted, match="vidéo-4.*not extracted yet"):
            store.read("train", "q/11", [4])


def test_it_is_whole():
    with FeatureStore.open(GOLDEN) as store:
        verification = verify_store(store)
    assert verification.ok, verification.findings
    assert not verification.notes
    assert (verification.num_shards, verification.num_rows, verification.num_failures) == (4, 7, 1)


def test_written_anew_it_is_the_same(tmp_path):
    make(tmp_path / "s")
    ours, golden = tree(tmp_path / "s"), tree(GOLDEN)
    assert ours.keys() == golden.keys(), REMAKE
    assert [name for name in golden if ours[name] != golden[name]] == [], REMAKE
    assert sum(map(len, (path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()))) < 50_000


def tree(path):
    """Every file; of a zarr.json what it means, as versions of zarr-python may leave out what goes without saying."""
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: _meaning(file) if file.name == "zarr.json" else file.read_bytes() for name, file in files.items()}


def _meaning(file):
    return {name: field for name, field in json.loads(file.read_bytes()).items() if field not in ([], {}, None)}


def test_a_store_of_the_next_version_is_refused(tmp_path):
    text = (GOLDEN / "zarr.json").read_text()
    (tmp_path / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UnsupportedFormat, match="has format version 2; this vcache reads version 1"):
        FeatureStore.open(tmp_path)
