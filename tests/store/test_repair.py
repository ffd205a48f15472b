"""repair_store mends exactly what is damaged: afterwards the store is the undamaged one, byte for byte."""

import json
import random
import shutil

import numpy as np
import pytest
from shim import FAULTS, Died, Shim
from store_files import flip

from vcache.store.checksum import crc32c
from vcache.store.constants import Constant, write_constants
from vcache.store.errors import CannotRecompute, StoreBusy, StoreError
from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.reader import FeatureStore
from vcache.store.repair import repair_store
from vcache.store.verify import verify_store
from vcache.store.writer import RowFailure, sole_writer

CONSTANT = Constant(("channel",), np.arange(5, dtype=np.float32))
FAILED_ROW = 4  # of shard 1, which holds rows 3 to 5


@pytest.fixture
def sound(copy_whole, tmp_path):
    copy_whole(tmp_path / "sound.zarr", failed=(FAILED_ROW,))
    with sole_writer(tmp_path / "sound.zarr"):  # leaves its lock file
        pass
    return tmp_path / "sound.zarr"


@pytest.fixture
def tokens(world, sound):
    return [sound / "train" / "view-0" / world.tokens.shard_path(shard) for shard in range(3)]


class Videos:
    """The videos that a store was made of, as the callbacks of `repair_store` see them; keeps account of what is read."""

    def __init__(self, world, gone=(), changed=0.0):
        self.world, self.gone, self.changed, self.read = world, set(gone), changed, []
        self.failing = (FAILED_ROW,)

    def recompute(self, split, view, rows, arrays):
        for row in rows:
            self.read.append((row, {spec.name for spec in arrays}))
            video_id = self.world.videos(7).ids[row]
            if row in self.failing:
                yield row, RowFailure(row, video_id, f"folder/{video_id}.mp4", "truncated", "ends after 3 of 8 packets")
            elif row in self.gone:
                yield row, RowFailure(row, video_id, f"folder/{video_id}.mp4", "missing", "No such file")
            else:
                yield row, {spec.name: self.value(spec, row) for spec in arrays}

    def value(self, spec, row):
        value = self.world.value(spec, row)
        return (value * (1 + self.changed)).astype(value.dtype) if value.dtype.kind == "f" else value

    def list_videos(self, split):
        return self.world.videos(7)

    def constant(self, name):
        return CONSTANT

    @property
    def rows(self):
        return sorted(row for row, _ in self.read)


class Nothing:
    """Neither videos nor a list of them."""

    def refuse(self, *args):
        raise CannotRecompute("there is nothing here")

    recompute = list_videos = constant = refuse


def repair(path, origin=None, **options):
    with FeatureStore.open(path) as store:
        return repair_store(store, origin or Nothing(), **options)


def verify(path):
    with FeatureStore.open(path) as store:
        return verify_store(store)


def stats(path):
    return {
        str(file.relative_to(path)): (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    }


def record_of(store, shard):
    (path,) = store.glob(f"_commit/*/train-view-0-{shard}.json")
    return path


def rewrite_record(path, change):
    document = json.loads(path.read_text())
    document.pop("crc32c")
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["crc32c"] = crc32c(text.encode())
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


def test_a_whole_store_is_left_alone(sound):
    before = stats(sound)
    result = repair(sound)
    assert result.ok
    assert (result.mended, result.recomputed_rows) == ([], 0)
    assert stats(sound) == before


@pytest.mark.parametrize("where", ["data", "checksum"])
def test_only_the_damaged_row_is_computed_again_and_only_its_file_is_replaced(world, sound, tokens, where):
    tree, before, videos = world.tree(sound), stats(sound), Videos(world)
    step = world.tokens.chunk_bytes + CRC_BYTES
    flip(tokens[1], 5 * step + (7 if where == "data" else step - 1))  # row 5: the second one written, as row 4 failed
    result = repair(sound, videos)
    assert result.ok
    assert videos.read == [(5, {"tokens/8"})]
    assert (result.recomputed_rows, result.copied_rows) == (1, 1)
    assert world.tree(sound) == tree
    changed = {name for name, stat in stats(sound).items() if before[name] != stat}
    assert changed == {tokens[1].relative_to(sound).as_posix()}


def test_the_damage_of_several_arrays_of_a_shard_reads_each_video_once(world, sound):
    tree, videos = world.tree(sound), Videos(world)
    view = sound / "train" / "view-0"
    for spec in world.all:
        flip(view / spec.shard_path(0), 0)
    (view / world.cls.shard_path(0)).unlink()
    assert repair(sound, videos).ok
    assert videos.rows == [0, 1, 2]
    assert world.tree(sound) == tree


@pytest.mark.parametrize("damage", ["index", "index checksum", "longer", "index lost"])
def test_a_file_whose_rows_are_whole_is_mended_without_a_video(world, sound, tokens, damage):
    tree = world.tree(sound)
    data = tokens[1].read_bytes()
    size = world.tokens.index_bytes(3)
    changed = {"index": data[:-size] + bytes(size), "longer": data + b"x", "index lost": data[:-size]}
    tokens[1].write_bytes(changed.get(damage, data[:-1] + bytes([data[-1] ^ 1])))
    result = repair(sound)
    assert result.ok
    assert result.copied_rows == 2
    assert world.tree(sound) == tree


def test_a_file_cut_in_a_row_loses_that_row_and_those_after_it(world, sound, tokens):
    tree, videos = world.tree(sound), Videos(world)
    row = world.tokens.chunks_per_row * (world.tokens.chunk_bytes + CRC_BYTES)
    tokens[0].write_bytes(tokens[0].read_bytes()[: row + 9])
    assert repair(sound, videos).ok
    assert videos.rows == [1, 2]
    assert world.tree(sound) == tree


def test_exchanged_files_are_computed_again_whole(world, tmp_path):
    store = world.build(tmp_path / "s.zarr")
    first, second = (store.path / "train" / "view-0" / world.tokens.shard_path(shard) for shard in (0, 1))
    tree, videos, data = world.tree(store.path), Videos(world), first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    flip(first, 0)  # an exchanged file that is damaged besides: its other rows are sound, and of other videos
    videos.failing = ()
    assert repair(store.path, videos).ok
    assert {name: data for name, data in world.tree(store.path).items() if name in tree} == tree
    assert set(videos.rows) == {0, 1, 2, 3, 4, 5}


def test_rows_of_other_last_bits_get_a_new_record_and_the_sound_rows_are_kept(world, sound, tokens):
    flip(tokens[0], 0)
    before, videos = stats(sound), Videos(world, changed=0.01)
    result = repair(sound, videos)
    assert result.ok
    assert videos.rows == [0]
    assert verify(sound).ok
    with FeatureStore.open(sound) as store:
        read = store.read("train", "tokens/8", [0, 1, 2])
    expected = [videos.value(world.tokens, 0), *(world.value(world.tokens, row) for row in (1, 2))]
    np.testing.assert_array_equal(read, np.stack(expected))
    changed = {name for name, stat in stats(sound).items() if before[name] != stat}
    assert changed == {str(path.relative_to(sound)) for path in (tokens[0], record_of(sound, 0))}


def test_sound_rows_beside_a_lost_checksum_are_not_trusted_where_the_bits_come_out_otherwise(world, sound, tokens):
    flip(tokens[0], world.tokens.chunk_bytes)  # in a checksum: the committed list of checksums cannot be told any more
    videos = Videos(world, changed=0.01)
    assert repair(sound, videos).ok
    assert videos.rows == [0, 0, 1, 2]
    assert verify(sound).ok


def test_a_row_whose_video_is_gone_is_left_and_nothing_of_its_shard_changes(world, sound, tokens):
    flip(tokens[0], 0)
    flip(tokens[2], 0)
    before, videos = stats(sound), Videos(world, gone=[0])
    result = repair(sound, videos)
    assert not result.ok
    ((finding, reason),) = result.left.values()
    assert (finding.path, finding.rows) == (tokens[0], (0,))
    assert "its video 'vidéo-0' (folder/vidéo-0.mp4) cannot be read (missing: No such file)" in reason
    changed = {name for name, stat in stats(sound).items() if before[name] != stat}
    assert changed == {tokens[2].relative_to(sound).as_posix()}


def test_committed_values_that_are_not_finite_are_computed_again(world, sound, tokens):
    """As a writer before this one may have stored them: with their checksums, and in the record."""
    tree, videos = world.tree(sound), Videos(world)
    data, size = bytearray(tokens[2].read_bytes()), world.tokens.chunk_bytes
    data[:2] = np.array(np.inf, dtype=np.float16).tobytes()
    data[size : size + CRC_BYTES] = crc32c(data[:size]).to_bytes(CRC_BYTES, "little")
    ends = range(size + CRC_BYTES, world.tokens.chunks_per_row * (size + CRC_BYTES) + 1, size + CRC_BYTES)
    checksums = b"".join(bytes(data[end - CRC_BYTES : end]) for end in ends)
    data[ends[-1] : ends[-1] + CRC_BYTES] = crc32c(checksums).to_bytes(CRC_BYTES, "little")  # the seal
    tokens[2].write_bytes(data)
    rewrite_record(
        record_of(sound, 2), lambda record: record["arrays"]["tokens/8"].update(chunks_crc32c=crc32c(checksums))
    )
    assert [finding.kind for finding in verify(sound).findings] == ["not_finite"]
    assert repair(sound, videos).ok
    assert videos.rows == [6]
    assert world.tree(sound) == tree


def test_values_that_are_not_finite_are_never_put_in_a_repaired_file(world, sound, tokens):
    flip(tokens[0], 0)
    before, videos = stats(sound), Videos(world, changed=np.nan)
    result = repair(sound, videos)
    assert "values that are not finite" in result.left[tokens[0]][1]
    assert stats(sound) == before


@pytest.mark.parametrize("position", [2, 40, 100, 300, -40, -1])
def test_a_damaged_record_is_rebuilt_from_its_files(world, sound, position):
    tree, videos = world.tree(sound), Videos(world)
    flip(record_of(sound, 1), position)
    assert repair(sound, videos).ok
    assert world.tree(sound) == tree


def test_a_record_with_its_checksum_left_is_rebuilt_without_a_video(world, sound):
    tree = world.tree(sound)
    flip(record_of(sound, 1), 40)
    assert repair(sound).ok
    assert world.tree(sound) == tree


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 300])
def test_a_record_that_says_nothing_is_rebuilt_and_one_row_is_compared(world, sound, content):
    tree, videos = world.tree(sound), Videos(world)
    record_of(sound, 1).write_bytes(content)
    assert repair(sound, videos).ok
    assert videos.rows == [3, 4]  # a row to compare, and why row 4 failed
    assert world.tree(sound) == tree


def test_a_record_that_says_nothing_is_not_rebuilt_on_trust(world, sound):
    record_of(sound, 0).write_bytes(b"")
    result = repair(sound, Videos(world, gone=range(7)))
    assert "none of the shard's videos is there to compare" in next(iter(result.left.values()))[1]
    assert record_of(sound, 0).read_bytes() == b""


def test_sound_files_of_other_videos_under_a_damaged_record_are_computed_again(world, sound, tokens):
    tree, videos = world.tree(sound), Videos(world)
    world.build(sound.with_name("other.zarr"))
    strange = ArraySpec(**{**world.tokens.__dict__, "name": "strange"})
    rows = np.stack([world.value(strange, row) for row in range(3)])
    with FeatureStore.open(sound) as store:
        shape = store.read("train", "tokens/8", [0, 1, 2]).shape
    assert rows.shape == shape
    data = bytearray(tokens[0].read_bytes())
    step, size = world.tokens.chunk_bytes + CRC_BYTES, world.tokens.chunk_bytes
    for chunk, values in enumerate(rows.reshape(-1, *world.tokens.chunk)):
        raw = values.tobytes()
        data[chunk * step : (chunk + 1) * step] = raw + crc32c(raw).to_bytes(CRC_BYTES, "little")
        assert len(raw) == size
    tokens[0].write_bytes(data)
    record_of(sound, 0).write_bytes(b"")
    assert repair(sound, videos).ok
    assert world.tree(sound) == tree


def test_a_record_of_another_store_is_replaced(world, sound, tmp_path):
    tree = world.tree(sound)
    other = world.fill(world.create(tmp_path / "other.zarr", rows_per_shard=4), world.all)
    shutil.copy(record_of(other.path, 1), record_of(sound, 1))
    assert repair(sound, Videos(world)).ok
    assert world.tree(sound) == tree


def test_a_second_record_of_an_array_is_removed(world, sound, tmp_path):
    tree = world.tree(sound)
    other = world.fill(world.create(tmp_path / "other.zarr"), [world.tokens], failed=[FAILED_ROW])
    target = sound / record_of(other.path, 1).relative_to(other.path)
    target.parent.mkdir()
    shutil.copy(record_of(other.path, 1), target)
    assert repair(sound, Videos(world)).ok
    assert verify(sound).ok
    assert {name for name in world.tree(sound) if not name.startswith("_commit")} == {
        name for name in tree if not name.startswith("_commit")
    }


def test_a_record_of_a_split_that_is_not_there_is_left(sound):
    path = record_of(sound, 1)
    shutil.copy(path, path.with_name("val-view-0-1.json"))
    result = repair(sound)
    assert [finding.kind for finding, _ in result.left.values()] == ["record"]
    assert path.with_name("val-view-0-1.json").exists()


@pytest.mark.parametrize("change", ["lost", "empty", "{", '{"zarr_format": 3}', "dtype"])
def test_lost_or_changed_metadata_of_arrays_and_groups_is_written_anew(world, sound, change):
    tree = world.tree(sound)
    for path in [
        sound / "_commit" / "zarr.json",
        sound / "train" / "zarr.json",
        *sound.glob("train/view-0/**/zarr.json"),
    ]:
        text = path.read_text()
        if change == "lost":
            path.unlink()
        else:
            path.write_text(
                "" if change == "empty" else text.replace("float16", "int16") if change == "dtype" else change
            )
        assert repair(sound).ok
        assert world.tree(sound) == tree


def test_remarks_of_the_user_outlive_a_repair(world, sound):
    for path, old, new in (
        (sound / "zarr.json", '"zarr_format": 3', '"zarr_format": 2'),
        (sound / "train" / "view-0" / "embed" / "zarr.json", "float32", "int32"),
    ):
        document = json.loads(path.read_text())
        document["attributes"]["remark"] = "mine"
        path.write_text(json.dumps(document).replace(old, new))
        assert repair(sound).ok
        assert json.loads(path.read_text())["attributes"]["remark"] == "mine"
    assert verify(sound).ok


def test_a_damaged_declaration_of_an_array_that_holds_nothing_is_removed(world, tmp_path):
    store = world.fill(world.create(tmp_path / "s.zarr"), [world.tokens])
    world.fill(store, [world.cls], shards=[])
    path = store.path / "train" / "view-0" / "cls" / "8" / "zarr.json"
    path.write_text("{")
    assert repair(store.path).ok
    assert not path.exists()
    assert verify(store.path).ok


@pytest.mark.parametrize("name", ["video_id/c/0", "path/c/0", "label/c/0", "label/zarr.json", "video_id/zarr.json"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_video_table_is_mended_from_the_list_of_the_dataset(world, sound, name, lost):
    tree, before = world.tree(sound), stats(sound)
    path = sound / "train" / name
    path.unlink() if lost else flip(path, 2)
    assert repair(sound, Videos(world)).ok
    assert world.tree(sound) == tree
    assert {name for name, stat in stats(sound).items() if before[name] != stat} == {f"train/{name}"}


@pytest.mark.parametrize("name", [".", "c/0", "zarr.json"])
def test_a_damaged_constant_is_made_again_if_it_has_the_same_values(world, sound, name):
    with FeatureStore.open(sound) as store:
        write_constants(store, {"blocks/8/bias": CONSTANT})
    tree, folder = world.tree(sound), sound / "constants" / "blocks" / "8" / "bias"
    shutil.rmtree(folder) if name == "." else flip(folder / name, 2)
    assert repair(sound, Videos(world)).ok
    assert world.tree(sound) == tree

    class Other(Videos):
        def constant(self, name):
            return Constant(("channel",), np.zeros(5, dtype=np.float32))

    shutil.rmtree(folder)
    ((_, reason),) = repair(sound, Other(world)).left.values()
    assert "made again it has other values than the manifest names" in reason


def test_a_list_that_is_not_the_stores_any_more_mends_no_table(world, sound):
    class Other(Videos):
        def list_videos(self, split):
            table = self.world.videos(7)
            return type(table)(tuple(reversed(table.ids)), table.paths, table.labels)

    flip(sound / "train" / "label" / "c" / "0", 2)
    before = stats(sound)
    ((_, reason),) = repair(sound, Other(world)).left.values()
    assert "differs from the one that" in reason
    assert stats(sound) == before
    for name in ("video_id", "path"):
        (sound / "train" / name / "c" / "0").unlink()
    ((_, reason),) = repair(sound, Videos(world)).left.values()
    assert "has lost ids and paths" in reason


def test_leftovers_are_removed_and_strange_files_are_not(world, sound, tmp_path):
    record_of(sound, 2).unlink()
    (sound / "train" / "view-0" / "embed" / ".2.0123456789ab.tmp").touch()
    (tmp_path / ".sound.zarr.0123456789ab.tmp").mkdir()
    (sound / "train" / "notes.txt").touch()
    result = repair(sound)
    assert sorted({mended.kind for mended in result.mended}) == ["orphan", "temporary"]
    assert [note.kind for note in verify(sound).notes] == ["unknown"]
    assert not (sound / "train" / "view-0" / world.tokens.name / "c" / "2").exists()
    assert not list(tmp_path.glob(".sound*"))


def test_a_store_that_is_being_written_is_left_alone(world, sound, tokens):
    flip(tokens[0], 0)
    with sole_writer(sound), pytest.raises(StoreBusy, match="another process"):
        repair(sound, Videos(world))


def test_a_dry_run_says_what_there_is_to_do_and_changes_nothing(world, sound, tokens):
    flip(tokens[0], 0)
    flip(record_of(sound, 2), 40)
    (sound / "train" / "view-0" / "embed" / ".2.0123456789ab.tmp").touch()
    before = stats(sound)
    with sole_writer(sound):
        result = repair(sound, dry_run=True)
    assert [finding.kind for finding, _ in result.left.values()] == ["record", "chunk"]
    assert (result.recomputed_rows, result.mended) == (1, [])
    assert stats(sound) == before


def damages(world, sound, rng):
    """One random fault of each kind; returns how to say which."""
    view = sound / "train" / "view-0"
    spec, shard = rng.choice(world.all), rng.randrange(3)
    file = view / spec.shard_path(shard)
    kind = rng.choice(
        ["flip", "cut", "lose", "record", "metadata", "index"] if file.exists() else ["record", "metadata"]
    )
    if kind == "flip":
        flip(file, rng.randrange(max(1, file.stat().st_size)), rng.randrange(1, 256))
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    elif kind == "lose":
        file.unlink()
    elif kind == "index":
        flip(file, -rng.randrange(1, spec.index_bytes(3) + 1), rng.randrange(1, 256))
    elif kind == "record":
        path = record_of(sound, shard)
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(1, 256))
    else:
        flip(rng.choice(sorted(view.glob("**/zarr.json"))), rng.randrange(30), rng.randrange(1, 256))
    return kind, spec.name, shard


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_are_mended_to_the_undamaged_tree(world, sound, seed):
    check_random_faults(world, sound, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 300))
def test_many_random_faults_are_mended_to_the_undamaged_tree(world, sound, seed):
    check_random_faults(world, sound, seed)


def check_random_faults(world, sound, seed):
    rng, tree = random.Random(seed), world.tree(sound)
    faults = [damages(world, sound, rng) for _ in range(rng.randrange(1, 4))]
    result = repair(sound, Videos(world))
    assert result.ok, (faults, result.left)
    assert verify(sound).ok, faults
    after = world.tree(sound)
    assert after.keys() == tree.keys()
    for name, data in after.items():
        assert json_or_bytes(name, data) == json_or_bytes(name, tree[name]), (faults, name)


def json_or_bytes(name, data):
    """A flip may change the white space of a zarr.json, which is no damage."""
    return json.loads(data) if name.endswith("zarr.json") else data


def many_damages(world, store):
    """One of each kind that takes calls of its own to mend."""
    view = store / "train" / "view-0"
    flip(view / world.tokens.shard_path(0), 0)
    flip(view / world.cls.shard_path(0), -9)
    (view / world.cls.shard_path(1)).unlink()
    flip(record_of(store, 2), 40)
    (view / "embed" / "zarr.json").unlink()
    flip(store / "train" / "label" / "c" / "0", 2)
    (view / "embed" / ".2.0123456789ab.tmp").touch()


def disturbed(world, sound, top, fail_at, fault, changed):
    """Repair with a fault at one call, look, and repair again; False where there is no such call."""
    store = top / "s.zarr"
    shutil.copytree(sound, store)
    many_damages(world, store)
    videos = Videos(world, changed=changed)
    try:
        with Shim(fail_at, fault) as shim:
            repair(store, videos)
    except Died:
        pass
    except OSError as error:
        assert "planted" in str(error), error
    try:
        check_values(world, store, changed)
        with Shim():  # without a fault; for its speed
            assert repair(store, Videos(world, changed=changed)).ok
            assert verify(store).ok
        check_values(world, store, changed)
        if not changed:
            assert world.tree(store) == world.tree(sound)
        else:
            assert world.tree(store).keys() <= world.tree(sound).keys()
        return shim.fired
    finally:
        shutil.rmtree(store)


def check_values(world, store, changed):
    """Every row reads as committed or as recomputed, or raises; what is not readable is damaged or not committed."""
    with FeatureStore.open(store) as opened:
        for spec in world.all:
            for row in range(7):
                try:
                    read = opened.read("train", spec.name, [row])[0]
                except StoreError:
                    continue
                known = [world.value(spec, row), Videos(world, changed=changed).value(spec, row)]
                assert any(np.array_equal(read, value) for value in known), (spec.name, row)


@pytest.mark.parametrize("changed", [0.0, 0.01])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_repair_leaves_sound_or_uncommitted_rows(world, sound, tmp_path, fault, changed):
    (tmp_path / "t").mkdir()
    start = 2 * FAULTS.index(fault) + bool(changed)
    tried = [disturbed(world, sound, tmp_path / "t", fail_at, fault, changed) for fail_at in range(start, 300, 97)]
    assert tried[0]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [0.0, 0.01])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_call_of_a_repair(world, sound, tmp_path, fault, changed):
    (tmp_path / "t").mkdir()
    fail_at = 0
    while disturbed(world, sound, tmp_path / "t", fail_at, fault, changed):
        fail_at += 1
    assert fail_at > 100
