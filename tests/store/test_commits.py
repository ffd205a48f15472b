"""Commit records: read once each, every byte of them checked, and what they say together."""

import json
from dataclasses import replace

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.store import commits
from vcache.store.commits import CommitRecord, RowFailure, StoredFile, pass_name, read_commit, read_commits
from vcache.store.errors import CorruptStore
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter

# What a text of a record would have to hold to be taken for the record's own checksum.
TRAP = ',"crc32c":0,"failures":'
COUNTS = st.integers(0, 2**40)


def spec(name: str, frames: int = 4) -> ArraySpec:
    return ArraySpec(name=name, dims=("frame", "channel"), shape=(frames, 6), chunk=(1, 6), dtype="float16")


def record(arrays=("tokens/8", "crc32c"), reason="ends after 3 of 8 packets", shard=2) -> CommitRecord:
    return CommitRecord(
        split="train",
        view=0,
        shard=shard,
        first_row=3 * shard,
        num_rows=3,
        files=tuple(StoredFile(spec(name), 500, 1, 2**32 - 1) for name in sorted(arrays)),
        failures=(RowFailure(3 * shard, "vidéo-6", "folder/6.mp4", "truncated", reason),),
    )


def put(store, record, data=None):
    path = store / record.relative_path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record.encode() if data is None else data)
    return path


@settings(max_examples=60, deadline=None)
@given(
    reason=st.text() | st.just(TRAP),
    path=st.text(),
    row=COUNTS,
    names=st.sets(st.from_regex(r"[abd-z_]{1,9}", fullmatch=True), min_size=1),
    data=st.data(),
)
def test_a_record_comes_back_as_it_was_and_its_checksum_is_of_the_json_without_it(
    tmp_path_factory, reason, path, row, names, data
):
    files = tuple(
        StoredFile(spec(name, data.draw(st.integers(1, 9))), *data.draw(st.tuples(COUNTS, COUNTS, COUNTS)))
        for name in sorted(names)
    )
    failure = RowFailure(row, "id", path, "kind", reason)
    written = CommitRecord(split="a", view=1, shard=5, first_row=row, num_rows=3, files=files, failures=(failure,))
    file = put(tmp_path_factory.mktemp("store"), written)
    document = json.loads(file.read_bytes())
    checksum = document.pop("crc32c")
    assert checksum == crc32c(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    assert read_commit(file) == written
    assert read_commit(file).arrays == names


@pytest.mark.parametrize("reason", ["", TRAP, "é" + TRAP * 2])
def test_every_flipped_bit_of_a_record_is_noticed(tmp_path, reason):
    file = put(tmp_path, record(reason=reason))
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(CorruptStore, match="is damaged. Mend it with:  vcache repair "):
            read_commit(file)
            pytest.fail(f"bit {bit} was flipped and nobody noticed")
    file.write_bytes(data)
    assert read_commit(file) == record(reason=reason)


def test_every_cut_and_every_added_byte_is_noticed(tmp_path):
    file = put(tmp_path, record())
    data = file.read_bytes()
    longer = [data + b"\n", data + b" ", b" " + data, data[:-1] + b" \n", data.replace(b'"crc32c":', b'"crc32c":0', 1)]
    spaced = [data[:at] + b" " + data[at:] for at in range(0, len(data), 7)]
    for damaged in [data[:size] for size in range(len(data))] + longer + spaced:
        file.write_bytes(damaged)
        with pytest.raises(CorruptStore):
            read_commit(file)


def test_a_record_with_a_field_more_or_less_is_refused_though_its_checksum_is_right(tmp_path):
    document = json.loads(record().encode())
    del document["crc32c"]
    less = {name: value for name, value in document.items() if name != "num_rows"}
    for other in ({**document, "colour": "red"}, less):
        checksum = crc32c(json.dumps(other, sort_keys=True, separators=(",", ":")).encode())
        data = json.dumps(other | {"crc32c": checksum}, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        with pytest.raises(CorruptStore):
            read_commit(put(tmp_path, record(), data))


def test_a_record_in_the_folder_of_another_pass_or_shard_is_refused(tmp_path):
    file = put(tmp_path, record())
    for place in (
        f"{pass_name(['cls/8'])}/{file.name}",
        f"{file.parent.name}/train-view-0-3.json",
        f"{file.parent.name}/val-view-0-2.json",
    ):
        other = tmp_path / "_commit" / place
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(file.read_bytes())
        with pytest.raises(CorruptStore):
            read_commit(other)


def test_thousands_of_records_come_in_the_order_of_passes_and_shards(tmp_path):
    shards = list(range(2 * commits._READ_AT_ONCE + 3))
    for shard in reversed(shards):
        for arrays in (["tokens/8"], ["cls/8"]):
            put(tmp_path, record(arrays, shard=shard))
    put(tmp_path, replace(record(["cls/8"], shard=1), split="train-2"))
    first, second = sorted([["tokens/8"], ["cls/8"]], key=pass_name)
    expected = [(frozenset(arrays), shard) for arrays in (first, second) for shard in shards]
    assert [(found.arrays, found.shard) for found in read_commits(tmp_path, "train", 0)] == expected


def test_a_damaged_record_among_thousands_is_named(tmp_path):
    files = [put(tmp_path, record(shard=shard)) for shard in range(commits._READ_AT_ONCE + 9)]
    files[70].write_bytes(files[70].read_bytes()[:-9])
    with pytest.raises(CorruptStore, match=f"{files[70]} is damaged"):
        list(read_commits(tmp_path, "train", 0))


def test_a_store_reads_each_record_once_whatever_is_asked_of_it(world, tmp_path, monkeypatch):
    world.fill(world.build(tmp_path / "s.zarr", failed=[4]), [spec("cls/9")], failed=[1])
    reads = []
    read = commits._read_file
    monkeypatch.setattr(commits, "_read_file", lambda path: reads.append(path) or read(path))
    with FeatureStore.open(tmp_path / "s.zarr") as store:
        assert reads == []
        for name in store.arrays("train"):
            store.committed_rows("train", [name])
            store.view("train").failures(name)
        assert [failure.row for failure in store.failures("train")] == [1, 4]
        assert all(len(store.committed_arrays("train", shard)) == 7 for shard in range(3))
        assert store.size_bytes() > 0
    assert sorted(reads) == sorted(map(str, (tmp_path / "s.zarr").glob("_commit/*/*.json")))
    assert len(reads) == 6


def test_the_state_of_every_row_is_what_its_records_say_one_by_one(world, tmp_path):
    """Against a slow oracle, also after a shard is committed in this process."""
    store = world.fill(world.create(tmp_path / "s.zarr"), world.all, shards=[0, 2], failed=[2])
    world.fill(store, [spec("cls/9"), spec("cls/10")], shards=[0, 1], failed=[4])
    check_rows(store)
    with ShardWriter(store, "train", 1, world.all) as writer:
        for row in store.shard_rows("train", 1):
            world.put(writer, row, row == 5)
    check_rows(store)
    assert [failure.row for failure in store.view("train").failures("tokens/8")] == [2, 5]
    assert [failure.row for failure in store.view("train").failures()] == [2, 4, 5]


def check_rows(store):
    records = list(read_commits(store.path, "train", 0))
    for name in store.arrays("train"):
        expected = np.zeros(7, dtype=bool)
        for one in records:
            if name in {file.spec.name for file in one.files}:
                failed = {failure.row for failure in one.failures}
                expected[[row for row in range(one.first_row, one.first_row + one.num_rows) if row not in failed]] = (
                    True
                )
        assert store.committed_rows("train", [name]).tolist() == expected.tolist(), name
