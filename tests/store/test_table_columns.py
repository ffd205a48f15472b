"""The columns of a video table: any Zarr library reads them, they grow with their split, and they are verified and mended."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from growing import X, drawn, fill, state, table
from hypothesis import given, settings
from hypothesis import strategies as st
from store_files import flip

from vcache.store.errors import CannotRecompute, CorruptStore
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.object_path import store_path
from vcache.store.reader import FeatureStore
from vcache.store.repair import repair_store
from vcache.store.verify import verify_store
from vcache.store.writer import add_videos, create_store

VALUES = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(),
    "uint8": st.integers(0, 255),
    "bool": st.booleans(),
}
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: name not in ("c", "path", "label"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def columns(draw, num_rows):
    """Up to three columns of any kind."""
    made = {}
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        dtype = draw(st.sampled_from([*VALUES, "text"]))
        if dtype == "text":
            texts = draw(st.lists(TEXT, min_size=num_rows, max_size=num_rows))
            made[name] = np.array(texts, dtype=np.dtypes.StringDType())
            continue
        shape = (num_rows, *draw(st.lists(st.integers(1, 3), max_size=1)))
        flat = draw(st.lists(VALUES[dtype], min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        made[name] = np.array(flat, dtype=dtype).reshape(shape)
    return made


def manifest(num_rows):
    return Manifest(
        key="0" * 16, spec={}, dataset="toy", class_names=("a",), rows_per_shard=2, splits={"train": num_rows}
    )


def assert_same_columns(columns, expected):
    assert list(columns) == sorted(expected)
    for name, values in expected.items():
        assert columns[name].dtype == values.dtype
        np.testing.assert_array_equal(columns[name], values)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 4))
def test_columns_are_read_back_by_vcache_and_by_zarr_python(data, num_rows):
    expected = data.draw(columns(num_rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.zarr")
        create_store(path, manifest(num_rows), {"train": replace(table("a", num_rows), columns=expected)})
        with FeatureStore.open(path) as store:
            assert_same_columns(store.videos("train").columns, expected)
            verification = verify_store(store)
        assert (verification.findings, verification.notes) == ((), ())
        group = zarr.open_group(str(path / "train"), mode="r")
        assert set(group.array_keys()) == {"video_id", "path", "label", *expected}
        for name, values in expected.items():
            np.testing.assert_array_equal(group[name][:], values)
            assert group[name].metadata.dimension_names == ("video", f"{name}_axis")[: values.ndim]


COLUMNS = {
    "stop_frame": np.array([4.5, np.nan, 9.0]),
    "start_frame": np.array([0.0, np.nan, 7.5]),
    "verb": np.array([2, 0, -1]),
    "multi_hot": np.array([[1, 0], [0, 0], [1, 1]], dtype=np.uint8),
    "actions": np.array(["0 1.5 2.0", "", "é"], dtype=np.dtypes.StringDType()),
}


def rows_of(columns, rows):
    return {name: values[rows] for name, values in columns.items()}


def annotated(prefix, rows=(0, 1, 2)):
    return replace(table(prefix, len(rows)), columns=rows_of(COLUMNS, list(rows)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three videos with columns, then two more."""
    path = tmp_path_factory.mktemp("made") / "s.zarr"
    create_store(path, manifest(3), {"train": annotated("a")})
    with FeatureStore.open(path) as store:
        fill(store, "train", [X], drawn([X], 3))
        fill(store, add_videos(store, "train", annotated("b", (2, 0))), [X], drawn([X], 2))
    return path


@pytest.fixture
def sound(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s.zarr")


def verify(path):
    with FeatureStore.open(path) as store:
        return verify_store(store)


def test_columns_of_a_grown_split_are_those_of_its_parts_in_a_row(sound):
    with FeatureStore.open(sound) as store:
        assert_same_columns(store.videos("train").columns, rows_of(COLUMNS, [0, 1, 2, 2, 0]))
        assert_same_columns(store.part_videos("train+1").columns, rows_of(COLUMNS, [2, 0]))
        assert verify_store(store).notes == ()


def test_xarray_opens_a_table_with_columns(sound):
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(str(sound / "train"), consolidated=False, chunks=None)
    assert opened["multi_hot"].dims == ("video", "class")
    np.testing.assert_array_equal(opened["start_frame"].values, COLUMNS["start_frame"])
    assert opened["actions"].values.tolist() == COLUMNS["actions"].tolist()


def test_a_table_in_a_bucket_has_the_files_of_the_local_one(sound, bucket, s3):
    path = store_path(f"s3://{bucket}/s.zarr")
    create_store(path, manifest(3), {"train": annotated("a")})
    with FeatureStore.open(path) as store:
        assert_same_columns(store.videos("train").columns, COLUMNS)
    for file in sorted(file for file in (sound / "train").glob("*/**/*") if file.is_file() and X.name not in str(file)):
        if "view-0" not in file.parts:
            key = f"s.zarr/{file.relative_to(sound).as_posix()}"
            assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == file.read_bytes()


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {name: COLUMNS[name][:2] for name in ("verb", "multi_hot")},
        rows_of(COLUMNS, [0, 1]) | {"verb": np.array([0.0, 1.0])},
        rows_of(COLUMNS, [0, 1]) | {"multi_hot": np.ones((2, 3), dtype=np.uint8)},
    ],
)
def test_videos_with_other_columns_are_not_added(sound, columns):
    before = state(sound)
    with FeatureStore.open(sound) as store, pytest.raises(ValueError, match="do not go with columns actions .string"):
        add_videos(store, "train", replace(table("c", 2), columns=columns))
    assert state(sound) == before


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("label", np.zeros(2), "column name 'label' must be lower-case"),
        ("view-0", np.zeros(2), "column name 'view-0' must be"),
        ("c", np.zeros(2), "column name 'c' must be"),
        ("x", np.zeros(2, dtype=np.float32), "must be int64, float64, uint8, bool or text, got float32"),
        ("x", np.array(["a", "b"]), "must be int64, float64, uint8, bool or text, got <U1"),
        ("x", np.zeros(3), r"must have 2 rows along 1 or 2 axes, got \(3,\)"),
        ("x", np.zeros((2, 0)), r"got \(2, 0\)"),
        ("x", np.zeros((2, 1, 1)), r"got \(2, 1, 1\)"),
    ],
)
def test_what_is_no_column_is_refused(name, values, words):
    with pytest.raises(ValueError, match=words):
        replace(table("a", 2), columns={name: values})


class Listed:
    """The dataset that the store was made of; it lists the videos in another order than the store has them."""

    def __init__(self, **changed):
        self.columns = {name: np.concatenate([values[::-1], values[[0, 2]]]) for name, values in COLUMNS.items()}
        self.columns |= changed

    def list_videos(self, part):
        ids = ("a-2", "a-1", "a-0", "b-1", "b-0")
        labels = np.array([int(name[2:]) % 2 for name in ids])
        return VideoTable(ids, tuple(f"{name}.mp4" for name in ids), labels, self.columns)

    def recompute(self, *args):
        raise CannotRecompute("no features are damaged")

    constant = recompute


def repair(path, origin):
    with FeatureStore.open(path) as store:
        return repair_store(store, origin)


def tree(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "writer.lock"
    }


def replaced(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


DAMAGES = {
    "a lost array": lambda part: shutil.rmtree(part / "verb"),
    "a lost array of two axes": lambda part: shutil.rmtree(part / "multi_hot"),
    "a lost chunk": lambda part: (part / "multi_hot" / "c" / "0" / "0").unlink(),
    "a flipped bit": lambda part: flip(part / "stop_frame" / "c" / "0", 5),
    "a flipped bit of text": lambda part: flip(part / "actions" / "c" / "0", 9),
    "a flipped bit of two axes": lambda part: flip(part / "multi_hot" / "c" / "0" / "0", 1),
    "lost metadata": lambda part: (part / "start_frame" / "zarr.json").unlink(),
    "another dtype": lambda part: replaced(part / "verb" / "zarr.json", '"int64"', '"uint64"'),
    "another dimension": lambda part: replaced(part / "multi_hot" / "zarr.json", '"class"', '"clazz"'),
    "an unnamed column": lambda part: replaced(part / "zarr.json", '"verb"', '"verc"'),
    "no list of columns": lambda part: replaced(part / "zarr.json", '"vcache_table_columns": [', '"vcache": ["x",'),
    "another group and a lost chunk": lambda part: (
        shutil.copy(part / "view-0" / "zarr.json", part / "zarr.json"),
        (part / "multi_hot" / "c" / "0" / "0").unlink(),
    ),
    "a lost group": lambda part: (part / "zarr.json").unlink(),
    "a lost group and column": lambda part: ((part / "zarr.json").unlink(), flip(part / "verb" / "c" / "0", 3)),
}


OF_THE_GROUP = ("an unnamed column", "no list of columns", "another group", "a lost group")


@pytest.mark.parametrize(
    ("kind", "part"),
    # A column is mended from its own part's rows, whichever part that is; a group of a part that was added knows less.
    [(kind, ("train", "train+1")[i % 2]) for i, kind in enumerate(DAMAGES) if not kind.startswith(OF_THE_GROUP)]
    + [(kind, part) for kind in DAMAGES if kind.startswith(OF_THE_GROUP) for part in ("train", "train+1")],
)
def test_a_damaged_column_is_found_and_mended(sound, kind, part):
    before = tree(sound)
    DAMAGES[kind](sound / part)
    findings = verify(sound).findings
    assert {finding.kind for finding in findings} <= {"table", "metadata"}
    assert {part} >= {finding.split for finding in findings if finding.kind == "table"}
    assert findings
    assert repair(sound, Listed()).ok
    assert verify(sound).ok
    after = tree(sound)
    assert after.keys() == before.keys()
    for name, data in before.items():
        same = without_remarks(after[name]) == without_remarks(data) if name.endswith("zarr.json") else None
        assert after[name] == data if same is None else same, name


def without_remarks(data):
    """A damaged name of an attribute stays, as a remark."""
    document = json.loads(data)
    document["attributes"].pop("vcache", None)
    return document


def test_a_group_that_does_not_name_its_columns_still_has_them(sound):
    shutil.copy(sound / "train" / "view-0" / "zarr.json", sound / "train" / "zarr.json")
    with FeatureStore.open(sound) as store:
        assert_same_columns(store.part_videos("train").columns, COLUMNS)


def test_an_array_of_the_users_own_is_no_column(sound):
    zarr.open_group(str(sound / "train"), mode="r+").create_array("mine", data=np.zeros(3))
    with FeatureStore.open(sound) as store:
        assert_same_columns(store.part_videos("train").columns, COLUMNS)
        assert {note.kind for note in verify_store(store).notes} == {"unknown"}


def test_two_sound_columns_in_each_others_place_are_found(sound):
    part = sound / "train"
    (part / "start_frame").rename(part / "x")
    (part / "stop_frame").rename(part / "start_frame")
    (part / "x").rename(part / "stop_frame")
    (finding,) = verify(sound).findings
    assert "are not those that were written together" in finding.message
    with FeatureStore.open(sound) as store, pytest.raises(CorruptStore, match="not those that were written together"):
        store.videos("train")


def test_a_list_with_other_values_mends_no_column(sound):
    (sound / "train" / "verb" / "c" / "0").unlink()
    before = tree(sound)
    other = Listed(verb=np.array([-1, 0, 3, 2, -1]))
    ((_, reason),) = repair(sound, other).left.values()
    assert "differs from the one that" in reason
    assert tree(sound) == before
