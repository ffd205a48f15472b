"""A store in a bucket is the local store, byte for byte, and as hard to fool: over the S3 protocol, against moto's server."""

import numpy as np
import pytest
import zarr
from obstore.store import S3Store

from vcache.store.commits import read_shard_commits
from vcache.store.constants import Constant, write_constants
from vcache.store.errors import CorruptStore, RowNotCommitted, StoreExists, StoreNotFound, UnsupportedFormat
from vcache.store.manifest import VideoTable
from vcache.store.object_path import store_path
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import (
    ShardWriter,
    add_split,
    add_videos,
    clean_temporary,
    create_store,
    declare_arrays,
    sole_writer,
)

ROWS = [6, 0, 3, 3, 5, 1]


@pytest.fixture
def path(bucket):
    return store_path(f"s3://{bucket}/stores/s.zarr")


@pytest.fixture(scope="module")
def local_files(world, tmp_path_factory):
    """What a complete local store holds; row 4 failed."""
    path = tmp_path_factory.mktemp("local") / "s.zarr"
    world.build(path, failed=[4])
    return world.tree(path)


@pytest.fixture
def sound(local_files, path, s3):
    """A local store copied into the bucket by others' tools."""
    for name, data in local_files.items():
        s3.put_object(Bucket=path.bucket, Key=f"{path.key}/{name}", Body=data)
    return path


def objects(s3, path):
    """Every object under the path with its bytes, as boto3 sees them."""
    keys = [entry["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket=path.bucket)
            for entry in page.get("Contents", [])]  # fmt: skip
    prefix = f"{path.key}/"
    return {
        key.removeprefix(prefix): s3.get_object(Bucket=path.bucket, Key=key)["Body"].read()
        for key in keys
        if key.startswith(prefix)
    }


def change(s3, path, change_bytes):
    data = s3.get_object(Bucket=path.bucket, Key=path.key)["Body"].read()
    s3.put_object(Bucket=path.bucket, Key=path.key, Body=change_bytes(data))


def flip(position):
    def flipped(data):
        position_from_start = position % len(data)
        return data[:position_from_start] + bytes([data[position_from_start] ^ 4]) + data[position_from_start + 1 :]

    return flipped


def shard(world, path, number, spec=None):
    return path / "train/view-0" / (spec or world.tokens).shard_path(number)


def test_the_objects_are_the_files_of_the_local_store(world, path, s3, tmp_path):
    world.build(tmp_path / "s.zarr", failed=[4])
    store = world.build(path, failed=[4])
    add_split(store, "val", world.videos(5))
    add_split(FeatureStore.open(tmp_path / "s.zarr"), "val", world.videos(5))
    for each in (store, FeatureStore.open(tmp_path / "s.zarr")):
        add_videos(each, "val", VideoTable(("new",), ("new.mp4",), np.array([2])))
        write_constants(each, {"mean/8": Constant(("channel",), np.arange(6, dtype=np.float32))})
    assert objects(s3, path) == world.tree(tmp_path / "s.zarr")
    assert store.constant("mean/8").tolist() == [0, 1, 2, 3, 4, 5]
    assert FeatureStore.open(path).videos("val").ids[-1] == "new"


def test_rows_frames_and_repeats_read_equal_to_the_local_store(world, path, tmp_path):
    world.build(path)
    with FeatureStore.open(str(path)) as remote, world.build(tmp_path / "s.zarr") as local:
        assert remote.manifest == local.manifest
        assert remote.arrays("train") == local.arrays("train")
        assert remote.views("train") == local.views("train") == (0,)
        assert remote.videos("train").ids == local.videos("train").ids
        assert remote.size_bytes() == local.size_bytes()
        assert remote.committed_rows("train", ["tokens/8", "cls/8"]).all()
        for spec in world.all:
            expected = np.stack([world.value(spec, row) for row in ROWS])
            np.testing.assert_array_equal(remote.read("train", spec.name, ROWS), expected)
            if spec.by_frame:
                np.testing.assert_array_equal(
                    remote.read("train", spec.name, ROWS, frames=[3, 0, 3]), expected[:, [3, 0, 3]]
                )
        out = np.zeros((2, *world.tokens.shape), dtype=np.float16)
        assert remote.read("train", "tokens/8", [5, 0], out=out) is out
        np.testing.assert_array_equal(out, local.read("train", "tokens/8", [5, 0]))
        assert remote.read("train", "tokens/8", []).shape == (0, *world.tokens.shape)


def test_a_batch_of_32_rows_in_two_shards_takes_four_requests_and_then_two(world, path, s3_server):
    world.fill(world.create(path, num_rows=40, rows_per_shard=20), [world.tokens])
    rows = np.random.default_rng(0).permutation(40)[:32]
    with FeatureStore.open(path) as store:
        store.committed_rows("train", ["tokens/8"])  # have the records
        counts = []
        for _ in range(2):
            s3_server.requests.clear()
            read = store.read("train", "tokens/8", rows)
            counts.append(len(s3_server.requests))
        np.testing.assert_array_equal(read, np.stack([world.value(world.tokens, row) for row in rows]))
    assert counts == [4, 2]  # an index and the ranges of each shard; the indices are kept


def test_large_reads_are_shared_out_among_requests(world, path, s3_server, monkeypatch):
    monkeypatch.setattr("vcache.store.object_file.RANGES_BYTES", 3 * (world.tokens.chunk_bytes + 4))
    world.fill(world.create(path), [world.tokens])
    with FeatureStore.open(path) as store:
        store.read("train", "tokens/8", [0])
        s3_server.requests.clear()
        np.testing.assert_array_equal(store.read("train", "tokens/8", [2, 1])[0], world.value(world.tokens, 2))
        assert len(s3_server.requests) == 3  # eight chunks, three at most in one


def test_a_row_that_is_not_committed_raises(world, path):
    store = world.fill(world.create(path), world.all, shards=[0, 2], failed=[1])
    with pytest.raises(RowNotCommitted, match=r"s3://.*/s\.zarr holds no tokens/8 for video 'vidéo-3'.*not extracted"):
        store.read("train", "tokens/8", [0, 3])
    with pytest.raises(RowNotCommitted, match=r"'vidéo-1'.*failed \(truncated"):
        FeatureStore.open(path).read("train", "tokens/8", [1])


def test_an_aborted_shard_leaves_no_object_and_is_resumed_to_the_same_bytes(world, path, s3, tmp_path):
    store = world.fill(world.create(path), world.all, shards=[0])
    before = objects(s3, path)
    with pytest.raises(RuntimeError, match="killed"), ShardWriter(store, "train", 1, world.all) as writer:
        world.put(writer, 3)
        raise RuntimeError("killed")
    assert objects(s3, path) == before
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=path.bucket)
    store = FeatureStore.open(path)
    assert clean_temporary(store) == 0
    world.fill(store, world.all, shards=[1, 2])
    world.build(tmp_path / "calm.zarr")
    assert objects(s3, path) == world.tree(tmp_path / "calm.zarr")


def test_shard_files_without_a_record_are_written_again(world, path, s3, tmp_path):
    """As after a kill between the uploads and the record, with other bytes to make sure that they are replaced."""
    world.build(path)
    for record in path.glob("_commit/*/train-view-0-1.json"):
        s3.delete_object(Bucket=path.bucket, Key=record.key)
    change(s3, shard(world, path, 1), flip(5))
    store = FeatureStore.open(path)
    with pytest.raises(RowNotCommitted):
        store.read("train", "tokens/8", [3])
    world.fill(store, world.all, shards=[1])
    world.build(tmp_path / "calm.zarr")
    assert objects(s3, path) == world.tree(tmp_path / "calm.zarr")


def test_the_record_is_the_last_object_of_a_shard_and_the_manifest_the_last_of_a_store(world, path, s3_server):
    store = world.create(path)
    puts = [target for method, target, _ in s3_server.requests if method == "PUT"]
    assert puts[-1].endswith("/s.zarr/zarr.json")
    declare_arrays(store, "train", world.all)
    s3_server.requests.clear()
    world.fill(store, world.all, shards=[0])
    puts = [target for method, target, _ in s3_server.requests if method == "PUT"]
    assert ["_commit" in target for target in puts] == [False] * len(world.all) + [True]


def test_a_large_shard_goes_up_in_parts_and_a_failing_part_leaves_nothing(world, path, s3, s3_server, monkeypatch):
    monkeypatch.setattr("vcache.store.object_client.MAX_RETRIES", 1)
    spec = type(world.tokens)(
        name="pixels", dims=("frame", "byte"), shape=(5, 2 << 20), chunk=(1, 2 << 20), dtype="uint8"
    )
    store = world.create(path, num_rows=1, rows_per_shard=1)
    declare_arrays(store, "train", [spec])
    values = np.random.default_rng(0).integers(0, 256, spec.shape, dtype=np.uint8)

    def write():
        with ShardWriter(store, "train", 0, [spec]) as writer:
            writer.write(0, {"pixels": values})

    with monkeypatch.context() as patch:
        patch.setattr(
            s3_server, "fault", lambda method, target, _: "503 SlowDown" if "partNumber=2" in target else None
        )
        with pytest.raises(RuntimeError, match="503"):
            write()
    assert not shard(world, path, 0, spec).exists()
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=path.bucket)
    write()
    assert sum("partNumber=2" in target for _, target, _ in s3_server.requests) == 3
    with FeatureStore.open(path) as opened:
        np.testing.assert_array_equal(opened.read("train", "pixels", [0])[0], values)


def test_flipped_bits_and_short_objects_are_found_by_reading_and_by_verifying(world, sound, s3):
    path = shard(world, sound, 1)
    data = path.read_bytes()
    damages = [(flip(7), "chunk", "do not match"), (flip(-1), "index", "index"), (flip(-40), "index", "index")]
    damages += [(lambda data, n=n: data[:n], "size", r"has \d+ bytes, \d+ were") for n in (0, 1, len(data) - 1)]
    damages += [(lambda data: data + b"0", "size", r"has \d+ bytes, \d+ were")]
    for damage, kind, words in damages:
        s3.put_object(Bucket=path.bucket, Key=path.key, Body=damage(data))
        with FeatureStore.open(sound) as store:
            with pytest.raises(CorruptStore, match=rf"s3://.*/tokens/8/c/1/0/0/0 .*{words}.*'vidéo-3'.*Delete s3://"):
                store.read("train", "tokens/8", [1, 3])
            (finding,) = verify_store(store).findings
            assert (finding.kind, finding.shard, finding.array) == (kind, 1, "tokens/8")
            np.testing.assert_array_equal(store.read("train", "tokens/8", [1])[0], world.value(world.tokens, 1))


@pytest.mark.parametrize("chunks_left", [0, 4])
def test_an_object_that_shrinks_while_the_store_is_open_raises(world, sound, s3, chunks_left, capfd):
    with FeatureStore.open(sound) as store:
        store.read("train", "tokens/8", [0])
        change(s3, shard(world, sound, 0), lambda data: data[: chunks_left * (world.tokens.chunk_bytes + 4) + 1])
        with pytest.raises(CorruptStore, match="ends in the middle of a chunk"):
            store.read("train", "tokens/8", [2])
        with pytest.raises(CorruptStore, match="ends in the middle of a chunk"):
            store.read("train", "tokens/8", [0, 2], frames=[0, 3])


def test_a_lost_object_is_found_and_is_never_fill_values(world, sound, s3):
    s3.delete_object(Bucket=sound.bucket, Key=shard(world, sound, 1).key)
    with FeatureStore.open(sound) as store:
        with pytest.raises(CorruptStore, match=r"tokens/8/c/1/0/0/0 is missing: row 5 of .*'vidéo-5'"):
            store.read("train", "tokens/8", [0, 5])
        assert [finding.kind for finding in verify_store(store).findings] == ["missing"]


def test_cut_and_lost_objects_of_the_metadata_are_found(sound, s3, local_files):
    store = FeatureStore.open(sound)
    for name in ("zarr.json", "train/label/c/0", "train/video_id/zarr.json", "train/view-0/cls/8/zarr.json"):
        for data in (local_files[name][: len(local_files[name]) // 2], None):
            if data is None:
                s3.delete_object(Bucket=sound.bucket, Key=(sound / name).key)
            else:
                s3.put_object(Bucket=sound.bucket, Key=(sound / name).key, Body=data)
            assert not verify_store(store).ok, (name, data)
        s3.put_object(Bucket=sound.bucket, Key=(sound / name).key, Body=local_files[name])


def test_verify_of_a_whole_store_is_ok_and_names_strays(world, sound, s3):
    store = FeatureStore.open(sound)
    verification = verify_store(store)
    assert verification.ok
    assert verification.notes == ()
    assert (verification.num_shards, verification.num_files) == (3, 3 * len(world.all))
    assert (verification.num_rows, verification.num_failures, verification.num_bytes) == (7, 1, store.size_bytes())
    s3.put_object(Bucket=sound.bucket, Key=f"{sound.key}/notes.txt", Body=b"mine")
    for record in read_shard_commits(sound, "train", 0, 2):
        s3.delete_object(Bucket=sound.bucket, Key=(sound / record.relative_path).key)
    notes = verify_store(store).notes
    assert {note.kind for note in notes} == {"unknown", "orphan"}
    assert all(str(note.path).startswith("s3://") and str(note.path) in note.message for note in notes)


def test_the_second_of_two_writers_with_the_same_bytes_is_as_good(world, path, s3, tmp_path):
    store = world.fill(world.create(path), world.all, shards=[1, 2])
    with sole_writer(path), ShardWriter(FeatureStore.open(path), "train", 0, world.all) as second:
        for row in range(3):
            world.put(second, row)
        # the other commits between our last check and our record
        second._refuse_stored = lambda: world.fill(store, world.all, shards=[0])
    world.build(tmp_path / "calm.zarr")
    assert objects(s3, path) == world.tree(tmp_path / "calm.zarr")


def test_the_second_of_two_writers_with_other_bytes_is_refused(world, path):
    store = world.create(path)
    declare_arrays(store, "train", world.all)
    with (
        pytest.raises(StoreExists, match=r"committed shard 0 .* with other values .*vcache verify"),
        ShardWriter(FeatureStore.open(path), "train", 0, world.all) as second,
    ):
        for row in range(3):
            world.put(second, row, failed=row == 1)
        second._refuse_stored = lambda: world.fill(store, world.all, shards=[0])
    assert len(list(path.glob("_commit/*/train-view-0-0.json"))) == 1


def test_a_writer_that_comes_late_replaces_nothing(world, path, s3):
    store = world.create(path)
    declare_arrays(store, "train", world.all)
    late = ShardWriter(FeatureStore.open(path), "train", 0, world.all)
    with pytest.raises(StoreExists, match="already holds"), late:
        for row in range(3):
            world.put(late, row, failed=row == 1)
        world.fill(store, world.all, shards=[0])
        before = objects(s3, path)
    assert objects(s3, path) == before
    assert verify_store(store).ok


def test_what_is_at_the_path_already_is_refused_and_a_half_made_store_is_made_whole(world, path, s3):
    s3.put_object(Bucket=path.bucket, Key=f"{path.key}/holiday.jpg", Body=b"mine")
    with pytest.raises(StoreExists, match="there is something at s3://"):
        world.create(path)
    assert list(objects(s3, path)) == ["holiday.jpg"]
    s3.delete_object(Bucket=path.bucket, Key=f"{path.key}/holiday.jpg")
    world.create(path)
    whole = objects(s3, path)
    with pytest.raises(StoreExists, match="there is something at s3://"):
        world.create(path)
    s3.delete_object(Bucket=path.bucket, Key=f"{path.key}/zarr.json")
    with pytest.raises(UnsupportedFormat, match=r"has no zarr\.json"):
        FeatureStore.open(path)
    create_store(str(path), world.manifest(), {"train": world.videos(7)})
    assert objects(s3, path) == whole


def test_no_store_there_says_so(path):
    with pytest.raises(
        StoreNotFound, match=r"there is no store at s3://.*/stores/s\.zarr\. Make one with:  vcache extract"
    ):
        FeatureStore.open(path)


def test_zarr_python_reads_it_equal_and_without_a_warning(world, sound):
    bucket = S3Store(sound.bucket, prefix=sound.key, client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(bucket, read_only=True), mode="r")
    assert sorted(group.keys()) == ["_commit", "train"]
    for spec in world.all:
        expected = np.stack([world.value(spec, row) for row in (0, 1, 2, 3, 5, 6)])
        np.testing.assert_array_equal(group[f"train/view-0/{spec.name}"][:][[0, 1, 2, 3, 5, 6]], expected)


def test_tensorstore_reads_it_equal(world, sound, s3_server):
    tensorstore = pytest.importorskip("tensorstore")
    for spec in world.all:
        kvstore = {
            "driver": "s3",
            "bucket": sound.bucket,
            "path": f"{sound.key}/train/view-0/{spec.name}/",
            "endpoint": s3_server.url,
            "aws_region": "us-east-1",
        }
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        expected = np.stack([world.value(spec, row) for row in (0, 1, 2, 3, 5, 6)])
        np.testing.assert_array_equal(array.read().result()[[0, 1, 2, 3, 5, 6]], expected)
