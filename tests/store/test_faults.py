"""No read returns unwritten or damaged data: it raises, and says which file and which video."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
from crc32c import crc32c

from vcache.store.errors import CorruptStore, RowNotCommitted, StoreError, UnsupportedFormat
from vcache.store.reader import FeatureStore
from vcache.store.writer import declare_arrays

ALL_ROWS = range(7)


@pytest.fixture
def sound(copy_whole, tmp_path):
    return copy_whole(tmp_path / "sound.zarr")


def read_everything(path, world):
    """The values as read, or the error; the read must never give other values than were written."""
    with FeatureStore.open(path) as store:
        store.videos("train")
        for spec in world.all:
            read = store.read("train", spec.name, ALL_ROWS)
            np.testing.assert_array_equal(read, np.stack([world.value(spec, row) for row in ALL_ROWS]))
            if spec.by_frame:
                store.read("train", spec.name, ALL_ROWS, frames=[2, 0])


def test_a_row_that_is_not_extracted_yet_raises_and_names_its_video(world, tmp_path):
    store = world.fill(world.create(tmp_path / "s.zarr"), world.all, shards=[0, 2])
    assert store.committed_rows("train", ["tokens/8"]).tolist() == [True, True, True, False, False, False, True]
    with pytest.raises(
        RowNotCommitted, match=r"no tokens/8 for video 'vidéo-3' \(row 3 of train/view-0\): it is not ext"
    ):
        store.read("train", "tokens/8", [0, 3, 4])


def test_a_row_that_failed_raises_with_its_reason(world, tmp_path):
    store = world.build(tmp_path / "s.zarr", failed=[4])
    np.testing.assert_array_equal(store.read("train", "tokens/8", [5])[0], world.value(world.tokens, 5))
    with pytest.raises(RowNotCommitted, match=r"'vidéo-4'.*failed \(truncated: ends after 3 of 8 packets\)"):
        store.read("train", "tokens/8", [4])


def test_a_row_that_failed_in_a_later_pass_keeps_its_earlier_arrays(world, tmp_path):
    store = world.fill(world.create(tmp_path / "s.zarr"), [world.tokens])
    world.fill(store, [world.cls], failed=[1])
    assert store.committed_rows("train", ["tokens/8"])[1]
    assert not store.committed_rows("train", ["tokens/8", "cls/8"])[1]
    store.read("train", "tokens/8", [1])


@pytest.mark.parametrize("name", ["tokens/8/c/1/0/0/0", "flip/c/1"])
def test_a_shard_file_that_is_lost_raises_and_is_never_fill_values(world, sound, name):
    (sound / "train" / "view-0" / name).unlink()
    with FeatureStore.open(sound) as store, pytest.raises(CorruptStore) as caught:
        store.read("train", name.split("/c/")[0], [0, 4])
    assert f"{name} is missing: row 4 of " in str(caught.value)
    assert "(video 'vidéo-4')" in str(caught.value)
    assert str(caught.value).endswith(f"Mend it with:  vcache repair {sound}")


def test_a_shard_without_its_record_is_not_there(world, sound):
    for record in sound.glob("_commit/*/train-view-0-1.json"):
        record.unlink()
    with FeatureStore.open(sound) as store:
        assert store.committed_arrays("train", 1) == frozenset()
        with pytest.raises(RowNotCommitted):
            store.read("train", "tokens/8", [3])


def data_files(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "zarr.json"]


def test_every_flipped_bit_in_data_index_or_record_is_noticed(world, sound):
    rng = random.Random(0)
    for file in data_files(sound):
        data = file.read_bytes()
        for bit in rng.sample(range(8 * len(data)), k=min(9, 8 * len(data))):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises((CorruptStore, RowNotCommitted)):
                read_everything(sound, world)
                pytest.fail(f"bit {bit} of {file} was flipped and nobody noticed")
        file.write_bytes(data)
    read_everything(sound, world)


@pytest.mark.parametrize("place", ["data", "crc", "offset", "index crc"])
def test_a_flip_in_each_kind_of_byte_of_a_shard_is_noticed_for_one_row_and_for_one_frame(world, sound, place):
    file = sound / "train" / "view-0" / world.tokens.shard_path(0)
    data = bytearray(file.read_bytes())
    chunk = world.tokens.chunk_bytes
    data[{"data": 7, "crc": chunk + 1, "offset": len(data) - 4 - 3 * 4 * 16, "index crc": len(data) - 1}[place]] ^= 4
    file.write_bytes(data)
    for frames in (None, [0]):
        with FeatureStore.open(sound) as store, pytest.raises(CorruptStore, match=r"tokens/8/c/0.*'vidéo-0'"):
            store.read("train", "tokens/8", [0], frames=frames)


def test_every_truncation_is_noticed(world, sound):
    for file in data_files(sound):
        data = file.read_bytes()
        for size in {0, 1, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:size])
            with pytest.raises((CorruptStore, RowNotCommitted)):
                read_everything(sound, world)
                pytest.fail(f"{file} was cut to {size} bytes and nobody noticed")
        file.write_bytes(data)


def test_every_lost_file_is_noticed(world, sound):
    for file in data_files(sound):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises((CorruptStore, RowNotCommitted)):
            read_everything(sound, world)
            pytest.fail(f"{file} was deleted and nobody noticed")
        file.write_bytes(data)


def test_a_file_cut_while_it_is_open_raises(world, sound):
    with FeatureStore.open(sound) as store:
        store.read("train", "tokens/8", [0])
        with (sound / "train" / "view-0" / world.tokens.shard_path(0)).open("r+b") as file:
            file.truncate(world.tokens.chunk_bytes * 3)
        with pytest.raises(CorruptStore, match="ends in the middle of a chunk"):
            store.read("train", "tokens/8", [0])


def test_damaged_metadata_raises_or_changes_no_value(world, sound):
    """A flip in zarr.json may hit a byte that nothing depends on; it must never change what is read."""
    rng = random.Random(1)
    for file in sorted(sound.rglob("zarr.json")):
        data = file.read_bytes()
        for bit in rng.sample(range(8 * len(data)), k=12):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                read_everything(sound, world)
                with FeatureStore.open(sound) as store:
                    assert store.manifest == world.manifest()
                    assert store.videos("train").ids == world.videos(7).ids
            except StoreError:
                pass
        file.write_bytes(data)


def test_a_record_moved_to_another_shard_is_refused(sound):
    record = next(sound.glob("_commit/*/train-view-0-0.json"))
    shutil.copy(record, record.with_name("train-view-0-1.json"))
    with (
        FeatureStore.open(sound) as store,
        pytest.raises(CorruptStore, match="is damaged. Mend it with:  vcache repair"),
    ):
        store.committed_arrays("train", 1)


def test_metadata_that_contradicts_the_committed_arrays_is_refused(sound):
    path = sound / "train" / "view-0" / "frame_index" / "zarr.json"
    path.write_text(path.read_text().replace("int32", "uint32").replace("-2147483648", "4294967295"))
    with FeatureStore.open(sound) as store, pytest.raises(CorruptStore, match="the metadata was changed"):
        store.read("train", "frame_index", [0])


def test_a_record_whose_fields_changed_with_their_checksum_of_before_is_refused(sound):
    path = next(sound.glob("_commit/*/train-view-0-1.json"))
    path.write_text(path.read_text().replace('"num_rows":3', '"num_rows":2'))
    with FeatureStore.open(sound) as store, pytest.raises(CorruptStore, match="is damaged"):
        store.failures("train")


def test_a_later_format_version_is_refused_with_what_to_do(sound):
    path = sound / "zarr.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UnsupportedFormat, match="format version 2; this vcache reads version 1.*pip install --upgrade"):
        FeatureStore.open(sound)


@pytest.mark.parametrize(
    "content", ['{"zarr_format": 3, "node_type": "group", "attributes": {}}', "[]", '{"attributes": {"vcache": [1]}}']
)
def test_a_foreign_group_is_refused(tmp_path, content):
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(UnsupportedFormat, match="not a vcache store"):
        FeatureStore.open(tmp_path)


def test_a_folder_and_a_file_are_no_stores(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"has no zarr\.json"):
        FeatureStore.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedFormat, match="is a file"):
        FeatureStore.open(tmp_path / "file")


def test_a_manifest_edited_by_hand_is_refused(sound):
    path = sound / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["vcache"]["class_names"][0] = "run"
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptStore, match="the manifest of .* is damaged"):
        FeatureStore.open(sound)


def test_an_array_of_another_layout_is_refused(world, sound):
    path = sound / "train" / "view-0" / "tokens" / "8" / "zarr.json"
    path.write_text(path.read_text().replace('"index_location": "end"', '"index_location": "start"'))
    with FeatureStore.open(sound) as store, pytest.raises(UnsupportedFormat, match="tokens/8 is not laid out as"):
        declare_arrays(store, "train", [world.tokens])


def test_a_crc_of_a_whole_file_of_chunks_with_their_crc_would_say_nothing():
    """Why a commit record holds the CRC of the chunk checksums and not that of the file."""
    rng = np.random.default_rng(0)
    chunks = [rng.bytes(50) for _ in range(4)]
    files = [b"".join(c + crc32c(c).to_bytes(4, "little") for c in pair) for pair in (chunks[:2], chunks[2:])]
    assert files[0] != files[1]
    assert crc32c(files[0]) == crc32c(files[1])


def test_a_disk_that_fails_to_read_names_file_and_video(world, sound, monkeypatch):
    def preadv(fd, buffers, offset):
        raise OSError(number, os.strerror(number))

    with FeatureStore.open(sound) as store:
        store.read("train", "tokens/8", [3])
        monkeypatch.setattr(os, "preadv", preadv)
        number = errno.EIO
        with pytest.raises(
            CorruptStore, match=r"/tokens/8/c/1/0/0/0 cannot be read: .*row 3 .*'vidéo-3'.*vcache repair"
        ):
            store.read("train", "tokens/8", [3])
        number = errno.EMFILE
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
            store.read("train", "tokens/8", [3])
        assert not isinstance(caught.value, CorruptStore)
