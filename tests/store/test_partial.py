"""Rows of damaged videos: stored and readable as any other, and the record says what is wrong with their videos."""

import json
from dataclasses import replace

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.store.commits import CommitRecord, RowFailure, StoredFile, read_commit
from vcache.store.errors import CorruptStore
from vcache.store.layout import ArraySpec
from vcache.store.origin import PartialRow
from vcache.store.reader import FeatureStore
from vcache.store.repair import repair_store
from vcache.store.verify import verify_store
from vcache.store.writer import ShardWriter, add_videos, declare_arrays

SPEC = ArraySpec(name="cls/8", dims=("frame", "channel"), shape=(4, 6), chunk=(4, 6), dtype="float16")
FAILED, PARTIAL = 4, 5  # of shard 1, which holds rows 3 to 5


def damage(world, row, kind="truncated"):
    video_id = world.videos(7).ids[row]
    return RowFailure(row, video_id, f"folder/{video_id}.mp4", kind, f"ends after {row} of 8 packets")


def fill(world, store, specs, partial):
    declare_arrays(store, "train", specs)
    for shard in range(store.num_shards("train")):
        with ShardWriter(store, "train", shard, specs) as writer:
            for row in store.shard_rows("train", shard):
                values = {spec.name: world.value(spec, row) for spec in specs}
                if row == FAILED:
                    writer.fail(damage(world, row, "empty"))
                else:
                    writer.write(row, values, partial=damage(world, row) if row in partial else None)
    return store


@pytest.fixture
def store(world, tmp_path):
    with fill(world, world.create(tmp_path / "s.zarr"), world.all, {PARTIAL}) as store:
        yield store


class Videos:
    """Gives a partial row where the store holds one, as an origin has to."""

    def __init__(self, world, kind="truncated"):
        self.world, self.kind = world, kind

    def recompute(self, split, view, rows, arrays):
        for row in rows:
            values = {spec.name: self.world.value(spec, row) for spec in arrays}
            whole = PartialRow(values, damage(self.world, row, self.kind)) if row == PARTIAL else values
            yield row, damage(self.world, row, "empty") if row == FAILED else whole


def record_of(store, shard):
    (path,) = store.path.glob(f"_commit/*/train-view-0-{shard}.json")
    return path


@settings(max_examples=40, deadline=None)
@given(reason=st.text(), rows=st.sets(st.integers(0, 8)), failed=st.sets(st.integers(0, 8)))
def test_a_record_says_which_rows_are_partial_and_one_without_any_has_the_bytes_it_always_had(reason, rows, failed):
    def entries(rows):
        return tuple(RowFailure(row, f"v{row}", f"{row}.mp4", "truncated", reason) for row in sorted(rows))

    record = CommitRecord(
        split="train",
        view=0,
        shard=0,
        first_row=0,
        num_rows=9,
        files=(StoredFile(SPEC, 500, 1, 2),),
        failures=entries(failed),
        partial=entries(rows - failed),
    )
    document = json.loads(record.encode())
    assert ("partial" in document) == bool(rows - failed)
    assert document.keys() - {"partial"} == json.loads(replace(record, partial=()).encode()).keys()
    assert record.stored_rows == tuple(row for row in range(9) if row not in failed)


def test_partial_rows_are_read_as_any_other_and_listed_beside_the_failures(world, store):
    with FeatureStore.open(store.path) as opened:
        assert opened.partial("train") == (damage(world, PARTIAL),)
        assert opened.failures("train") == (damage(world, FAILED, "empty"),)
        assert opened.view("train").partial("cls/8") == [damage(world, PARTIAL)]
        np.testing.assert_array_equal(opened.read("train", "cls/8", [PARTIAL])[0], world.value(world.cls, PARTIAL))


def test_a_row_that_only_one_pass_stored_in_part_is_partial_in_that_one(world, tmp_path):
    with fill(world, world.create(tmp_path / "s.zarr"), [world.tokens], {PARTIAL}) as store:
        fill(world, store, [world.cls], set())
        view = store.view("train")
        assert [row.row for row in view.partial()] == [PARTIAL]
        assert view.partial("cls/8") == []
        assert store.committed_rows("train", ["tokens/8", "cls/8"])[PARTIAL]


def test_partial_rows_of_later_parts_are_rows_of_the_split(world, store):
    more = world.videos(9)
    table = replace(more, ids=more.ids[7:], paths=more.paths[7:], labels=more.labels[7:])
    part = add_videos(store, "train", table)
    declare_arrays(store, part, [world.cls])
    bad = RowFailure(1, table.ids[1], table.paths[1], "corrupt_frames", "3 of 9 frames")
    with ShardWriter(store, part, 0, [world.cls]) as writer:
        writer.write(0, {"cls/8": world.value(world.cls, 7)})
        writer.write(1, {"cls/8": world.value(world.cls, 8)}, partial=bad)
    assert [row.row for row in store.partial("train")] == [PARTIAL, 8]


def test_the_damage_of_another_row_is_refused_and_the_row_can_still_be_written(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [world.cls])
    with ShardWriter(store, "train", 2, [world.cls]) as writer:
        with pytest.raises(ValueError, match="row 6 is written with the damage of row 5"):
            writer.write(6, {"cls/8": world.value(world.cls, 6)}, partial=damage(world, 5))
        writer.write(6, {"cls/8": world.value(world.cls, 6)})
    assert store.partial("train") == ()


def test_verify_counts_partial_rows(store):
    found = verify_store(store)
    assert (found.findings, found.num_failures, found.num_partial) == ((), 1, 1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [((FAILED,), "says that rows"), ((6,), "says that rows"), ((5, 3), "says that rows"), ((3,), "calls row 3")],
)
def test_verify_refuses_a_record_whose_partial_rows_cannot_be(world, store, rows, words):
    path = record_of(store, 1)
    wrong = tuple(replace(damage(world, row), video_id="other") for row in rows)
    path.write_bytes(replace(read_commit(path), partial=wrong).encode())
    (finding,) = verify_store(store).findings
    assert finding.kind == "record"
    assert words in finding.message


def test_an_empty_list_of_partial_rows_is_no_record_of_ours(world, store):
    path = record_of(store, 2)
    document = json.loads(path.read_text())
    document.pop("crc32c")
    text = json.dumps(document | {"partial": []}, sort_keys=True, separators=(",", ":"))
    checksum = crc32c(text.encode())
    path.write_text(
        json.dumps(document | {"partial": [], "crc32c": checksum}, sort_keys=True, separators=(",", ":")) + "\n"
    )
    with pytest.raises(CorruptStore, match="damaged"):
        read_commit(path)


@pytest.mark.parametrize("what", ["file", "record", "reason", "key"])
def test_a_repair_keeps_partial_rows_partial(world, store, what):
    before = world.tree(store.path)
    if what == "file":
        path = store.path / "train" / "view-0" / world.cls.shard_path(1)
        path.write_bytes(b"x" + path.read_bytes()[1:])
    else:
        path, data = record_of(store, 1), bytearray(record_of(store, 1).read_bytes())
        at = {"record": 20, "reason": data.index(b"ends after 5"), "key": data.index(b'"num_rows"') + 3}[what]
        data[at] ^= 1
        path.write_bytes(data)
    result = repair_store(store, Videos(world))
    assert result.ok, result.left
    assert {name: data for name, data in world.tree(store.path).items() if "writer.lock" not in name} == before


def test_a_record_that_does_not_say_which_rows_are_partial_is_dropped_and_its_shard_is_extracted_again(world, tmp_path):
    with fill(world, world.create(tmp_path / "s.zarr"), world.all, {PARTIAL, 6}) as store:
        record_of(store, 1).write_bytes(b"")
        result = repair_store(store, Videos(world))
        ((finding, reason),) = result.left.values()
        assert finding.kind == "record"
        assert "nothing says which of its rows are of damaged videos" in reason
        assert "vcache extract" in reason
        assert not list(store.path.glob("_commit/*/train-view-0-1.json"))
