"""URLs as paths: parsed without surprises, and answering as pathlib does over the same tree."""

from pathlib import Path

import pytest

from vcache.store.errors import UnsupportedLocation
from vcache.store.object_path import ObjectPath, remove_tree, store_path

FILES = ("zarr.json", "a/zarr.json", "a/b c/1.json", "a/b c/2.json", "a/é/1.json", "ab/1.txt", "p%q/~x+=.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/a/b.zarr", ObjectPath("bucket", "a/b.zarr")),
        ("S3://bucket/a//b.zarr/", ObjectPath("bucket", "a/b.zarr")),
        ("s3://bucket/./b", ObjectPath("bucket", "b")),
        ("s3://bucket/.hidden/b", ObjectPath("bucket", ".hidden/b")),
        ("s3://bucket", ObjectPath("bucket", "")),
        ("s3://bucket/", ObjectPath("bucket", "")),
        ("a/b.zarr", Path("a/b.zarr")),
        ("/s3/b", Path("/s3/b")),
        ("a:b/c", Path("a:b/c")),
    ],
)
def test_a_location_is_a_url_or_a_path(text, expected):
    assert store_path(text) == expected
    assert store_path(store_path(text)) == expected


def test_a_url_is_printed_as_it_was_given():
    assert str(store_path("s3://bucket/a/b.zarr")) == "s3://bucket/a/b.zarr"
    assert (
        str(store_path("s3://bucket/a/b.zarr") / "train" / Path("view-0/c/0"))
        == "s3://bucket/a/b.zarr/train/view-0/c/0"
    )
    assert str(store_path("s3://bucket")) == "s3://bucket"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("gs://bucket/a", "not gs://"),
        ("https://host/bucket/a", "not https://"),
        ("s3:///a", "not of the form"),
        ("s3://bucket/../other", "not of the form"),
        ("s3://bucket/a?versionId=1", "not of the form"),
        (Path("s3://bucket/a"), "one slash after the colon; a store in a bucket is s3://BUCKET/PATH"),
    ],
)
def test_other_urls_are_refused(location, words):
    with pytest.raises(UnsupportedLocation, match=words):
        store_path(location)


@pytest.mark.parametrize("url", ["s3://KEY:sec/ret@bucket/a", "s3://KEY:secret@bucket/a", "gs://KEY:secret@bucket/a"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UnsupportedLocation, match="AWS_SECRET_ACCESS_KEY") as caught:
        store_path(url)
    assert "KEY:" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.fixture
def trees(bucket, s3, tmp_path):
    """The same files as a local tree and as objects, and objects beside them that a sloppy prefix would take in."""
    for name in FILES:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(name.encode())
        s3.put_object(Bucket=bucket, Key=f"top/{name}", Body=name.encode())
    s3.put_object(Bucket=bucket, Key="top2/zarr.json", Body=b"beside")
    return tmp_path / "top", ObjectPath(bucket, "top")


@pytest.mark.parametrize(
    "pattern",
    ["*", "*/", "*/*/", "a/*", "a/*/*.json", "zarr.json", "*/zarr.json", "a/b*/2.json", "none/*", "a", "a/", "?b/*"],
)
def test_globbing_finds_what_pathlib_finds(trees, pattern):
    local, remote = ({path.relative_to(top) for path in top.glob(pattern)} for top in trees)
    assert remote == local


def test_paths_answer_as_pathlib_does(trees):
    local, remote = trees
    for name in (*FILES, "a", "a/b c", "none", "a/none.json", "p%q"):
        for question in ("exists", "is_file", "is_dir"):
            assert getattr(remote / name, question)() == getattr(local / name, question)(), (name, question)
    assert {path.name for path in remote.iterdir()} == {path.name for path in local.iterdir()}
    assert sorted(path.relative_to(remote) for path in remote.rglob("*")) == sorted(map(Path, FILES))
    assert [path.name for path in remote.rglob("*.txt")] == ["1.txt"]
    for name in FILES:
        assert (remote / name).read_bytes() == name.encode()
        assert [path.relative_to(remote) for path in (remote / name).parents[:-1]] == [
            path.relative_to(local) for path in (local / name).parents if path.is_relative_to(local)
        ]
    with pytest.raises(FileNotFoundError, match="s3://.*/top/none is not there"):
        (remote / "none").read_bytes()
    with pytest.raises(ValueError, match="top2"):
        (remote / "a").relative_to(remote.with_name("top2"))


def test_what_is_created_twice_keeps_its_first_bytes(bucket, s3):
    path = ObjectPath(bucket, "record.json")
    path.create_bytes(b"one")
    path.create_bytes(b"one")
    with pytest.raises(FileExistsError, match="s3://.*/record.json is there already"):
        path.create_bytes(b"two")
    assert s3.get_object(Bucket=bucket, Key="record.json")["Body"].read() == b"one"


def test_removing_a_tree_leaves_what_lies_beside_it(trees, s3):
    _, remote = trees
    remove_tree(remote)
    assert [entry["Key"] for entry in s3.list_objects_v2(Bucket=remote.bucket)["Contents"]] == ["top2/zarr.json"]
    remove_tree(remote)
