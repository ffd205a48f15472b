"""verify_store finds every damaged byte and says where it is; harmless leftovers are notes."""

import json
import random
import shutil

import numpy as np
import pytest
from crc32c import crc32c
from store_files import flip

from vcache.store.layout import CRC_BYTES
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import sole_writer

FAILED_ROW = 4  # of shard 1, which holds rows 3 to 5


@pytest.fixture
def sound(copy_whole, tmp_path):
    copy_whole(tmp_path / "sound.zarr", failed=(FAILED_ROW,))
    return tmp_path / "sound.zarr"


@pytest.fixture
def tokens(world, sound):
    return [sound / "train" / "view-0" / world.tokens.shard_path(shard) for shard in range(3)]


def verify(path):
    with FeatureStore.open(path) as store:
        return verify_store(store)


def the_finding(path):
    verification = verify(path)
    assert not verification.ok
    (finding,) = verification.findings
    assert finding.path.exists() or finding.kind in ("missing", "metadata")
    assert str(finding.path) in finding.message
    return finding


def place(finding):
    return finding.kind, finding.split, finding.view, finding.shard, finding.array, finding.rows, finding.video_ids


def test_a_whole_store_is_ok_and_counted(world, sound):
    progress = []
    with FeatureStore.open(sound) as store:
        verification = verify_store(store, on_progress=lambda done, total: progress.append((done, total)))
        size = store.size_bytes()
    assert verification.ok
    assert verification.findings == verification.notes == ()
    assert (verification.num_shards, verification.num_files) == (3, 3 * len(world.all))
    assert (verification.num_rows, verification.num_failures, verification.num_bytes) == (7, 1, size)
    assert progress == sorted(progress)
    assert len(progress) == verification.num_files
    assert progress[-1] == (size, size)


def test_a_store_of_two_passes_two_views_and_absent_shards_is_ok(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    assert verify_store(store).ok
    world.fill(store, [world.tokens], shards=[0, 2])
    world.fill(store, [world.cls], shards=[0], failed=[1])
    world.fill(store, [world.tokens], shards=[1], view=3)
    verification = verify_store(store)
    assert verification.ok
    assert verification.notes == ()
    assert (verification.num_shards, verification.num_files, verification.num_rows) == (3, 4, 7)


@pytest.mark.parametrize(("where", "offset"), [("data", 7), ("crc", None)])
def test_a_flipped_bit_of_a_chunk_is_found_with_its_row(world, sound, tokens, where, offset):
    step = world.tokens.chunk_bytes + CRC_BYTES
    flip(tokens[1], 5 * step + (step - 1 if offset is None else offset))  # chunk 5: frame 1 of the second row written
    finding = the_finding(sound)
    assert place(finding) == ("chunk", "train", 0, 1, "tokens/8", (5,), ("vidéo-5",))
    assert finding.message.endswith(f"Mend it with:  vcache repair {sound}")
    assert "row 5 (video 'vidéo-5')" in finding.message


def test_damage_in_several_rows_and_files_is_all_found(world, sound, tokens):
    row = world.tokens.chunks_per_row * (world.tokens.chunk_bytes + CRC_BYTES)
    for position in (0, 9, 2 * row):
        flip(tokens[0], position)
    tokens[2].unlink()
    first, second = verify(sound).findings
    assert place(first)[:-1] == ("chunk", "train", 0, 0, "tokens/8", (0, 2))
    assert place(second)[:-1] == ("missing", "train", 0, 2, "tokens/8", ())


def test_a_flipped_bit_of_the_index_is_found(sound, tokens):
    flip(tokens[0], -9)
    assert place(the_finding(sound)) == ("index", "train", 0, 0, "tokens/8", (), ())


def test_a_damaged_record_is_found_and_the_other_shards_are_still_read(world, sound, tokens):
    (record,) = sound.glob("_commit/*/train-view-0-1.json")
    flip(record, 100)
    assert place(the_finding(sound)) == ("record", "train", 0, 1, None, (), ())
    verification = verify(sound)
    assert (verification.num_shards, verification.notes) == (2, ())
    flip(tokens[0], 0)
    assert [finding.kind for finding in verify(sound).findings] == ["record", "chunk"]


def test_a_record_with_a_number_beyond_float_is_damaged(sound):
    (record,) = sound.glob("_commit/*/train-view-0-1.json")
    record.write_text(record.read_text().replace('"num_rows":3', '"num_rows":9e999'))
    assert the_finding(sound).kind == "record"


def test_a_record_of_another_store_contradicts_the_manifest(world, sound, tmp_path):
    other = world.fill(world.create(tmp_path / "other.zarr", rows_per_shard=4), world.all)
    (record,) = sound.glob("_commit/*/train-view-0-1.json")
    shutil.copy(next(other.path.glob("_commit/*/train-view-0-1.json")), record)
    finding = the_finding(sound)
    assert place(finding)[:4] == ("record", "train", 0, 1)
    assert "has 3 rows from 4, but the manifest puts range(3, 6) in its shard" in finding.message


def test_two_records_of_one_array_contradict_each_other(world, sound, tmp_path):
    other = world.fill(world.create(tmp_path / "other.zarr"), [world.tokens], failed=[FAILED_ROW])
    (record,) = other.path.glob("_commit/*/train-view-0-1.json")
    target = sound / record.relative_to(other.path)
    target.parent.mkdir()
    shutil.copy(record, target)
    assert "names tokens/8, as does " in the_finding(sound).message


@pytest.mark.parametrize(("before", "after"), [('"float16"', '"float32"'), ('"frame"', '"token"'), ("{", "[")])
def test_damaged_metadata_of_an_array_is_found_once(sound, before, after):
    path = sound / "train" / "view-0" / "tokens" / "8" / "zarr.json"
    path.write_text(path.read_text().replace(before, after, 1))
    assert place(the_finding(sound)) == ("metadata", "train", 0, None, "tokens/8", (), ())


def test_lost_metadata_of_an_array_or_group_is_found(sound):
    for path in sorted(sound.glob("train/view-0/**/zarr.json")):
        data = path.read_bytes()
        path.unlink()
        assert the_finding(sound).path == path
        path.write_bytes(data)


def test_remarks_of_the_user_in_attributes_are_no_damage(sound):
    for path in (sound / "zarr.json", *sound.glob("train/view-0/**/zarr.json")):
        document = json.loads(path.read_text())
        document["attributes"]["remark"] = "mine"
        path.write_text(json.dumps(document))
    assert verify(sound).ok


def test_truncated_and_lengthened_files_are_found(sound, tokens):
    data = tokens[2].read_bytes()
    for changed in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        tokens[2].write_bytes(changed)
        finding = the_finding(sound)
        assert place(finding) == ("size", "train", 0, 2, "tokens/8", (), ())
        assert f"has {len(changed)} bytes, {len(data)} were committed" in finding.message


def test_a_missing_shard_and_a_folder_in_its_place_are_found(sound, tokens):
    tokens[1].unlink()
    assert place(the_finding(sound)) == ("missing", "train", 0, 1, "tokens/8", (), ())
    tokens[1].mkdir()
    assert the_finding(sound).kind in ("size", "unreadable")


def test_two_exchanged_shards_are_found(world, tmp_path):
    store = world.build(tmp_path / "s.zarr")  # shards 0 and 1 have equal sizes and equal indices
    first, second = (store.path / "train" / "view-0" / world.tokens.shard_path(shard) for shard in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    places = [place(finding) for finding in verify(store.path).findings]
    assert places == [("exchanged", "train", 0, shard, "tokens/8", (), ()) for shard in (0, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["tokens/8", "embed"])
def test_a_value_that_is_not_finite_is_found_under_sound_checksums(world, sound, name, value):
    (spec,) = (spec for spec in world.all if spec.name == name)
    path = sound / "train" / "view-0" / spec.shard_path(2)
    data = bytearray(path.read_bytes())
    size = spec.chunk_bytes
    data[: spec.numpy_dtype.itemsize] = np.array(value, dtype=spec.numpy_dtype).tobytes()
    data[size : size + CRC_BYTES] = crc32c(data[:size]).to_bytes(CRC_BYTES, "little")
    checksums = b"".join(
        data[(chunk + 1) * (size + CRC_BYTES) - CRC_BYTES : (chunk + 1) * (size + CRC_BYTES)]
        for chunk in range(spec.chunks_per_row)
    )
    end = len(data) - spec.index_bytes(3)
    data[end - CRC_BYTES : end] = crc32c(checksums).to_bytes(CRC_BYTES, "little")  # the seal
    path.write_bytes(data)
    rewrite_record(sound, 2, name, crc32c(checksums))
    assert place(the_finding(sound)) == ("not_finite", "train", 0, 2, name, (6,), ("vidéo-6",))


def rewrite_record(store, shard, name, chunks_crc32c):
    (path,) = store.glob(f"_commit/*/train-view-0-{shard}.json")
    document = json.loads(path.read_text())
    document.pop("crc32c")
    document["arrays"][name]["chunks_crc32c"] = chunks_crc32c
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["crc32c"] = crc32c(text.encode())
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


@pytest.mark.parametrize("name", ["video_id", "label", "path/c/0", "label/zarr.json", "."])
def test_a_missing_video_table_is_found_and_the_arrays_are_still_read(sound, tokens, name):
    path = sound / "train" / name
    if name == ".":
        for part in ("video_id", "path", "label"):
            shutil.rmtree(path / part)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert place(the_finding(sound)) == ("table", "train", None, None, None, (), ())
    assert verify(sound).notes == ()
    flip(tokens[0], 0)
    table, chunk = verify(sound).findings
    assert (table.kind, chunk.kind, chunk.rows, chunk.video_ids) == ("table", "chunk", (0,), ())


def test_a_manifest_damaged_after_opening_is_found(sound):
    with FeatureStore.open(sound) as store:
        flip(sound / "zarr.json", 150)
        (finding,) = verify_store(store).findings
    assert finding.kind == "manifest"


def test_leftovers_are_notes_and_no_damage(sound, tmp_path):
    for record in sound.glob("_commit/*/train-view-0-2.json"):
        record.unlink()
    temporary = sound / "train" / "view-0" / "embed" / ".2.0123456789ab.tmp"
    temporary.touch()
    (tmp_path / ".sound.zarr.0123456789ab.tmp").mkdir()
    (sound / "train" / "notes.txt").touch()
    with sole_writer(sound):  # leaves its lock file, which is part of the store
        pass
    verification = verify(sound)
    assert verification.ok
    kinds = [note.kind for note in verification.notes]
    assert sorted(set(kinds)) == ["orphan", "temporary", "unknown"]
    assert (kinds.count("orphan"), kinds.count("temporary"), kinds.count("unknown")) == (6, 2, 1)
    orphans = {note.array for note in verification.notes if note.kind == "orphan" and note.shard == 2}
    assert orphans == {"tokens/8", "q/8", "cls/8", "embed", "frame_index", "flip"}


def test_random_changes_of_a_byte_are_all_found_in_the_file_they_are_in(sound):
    """Every file of the store; the only changes without a finding leave the JSON of a zarr.json as it was."""
    rng = random.Random(0)
    files = [file for file in sorted(sound.rglob("*")) if file.is_file()]
    found = 0
    with FeatureStore.open(sound) as store:
        for file in files:
            data = file.read_bytes()
            for position in rng.sample(range(len(data)), k=min(4, len(data))):
                flip(file, position, rng.randrange(1, 256))
                findings = verify_store(store).findings
                if findings:
                    found += 1
                    assert len(findings) == 1, (file, position)
                    assert findings[0].path == file or findings[0].path in file.parents
                else:
                    assert file.name == "zarr.json"
                    assert json.loads(file.read_bytes()) == json.loads(data), (file, position, file.read_bytes())
                file.write_bytes(data)
        assert verify_store(store).ok
    assert found >= 75


def test_a_shard_of_which_every_video_failed_is_whole(world, tmp_path):
    with world.build(tmp_path / "s.zarr", failed=[0, 1, 2, 6]) as store:
        found = verify_store(store)
    assert (found.findings, found.notes, found.num_failures) == ((), (), 4)
