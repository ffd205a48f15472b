"""The short way that nearly every row takes, against the definition by os.path."""

import os.path
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vcache.extract.datasets.base import DatasetError, inside, plain_name

FILE = Path("/lists/a.csv")


def by_definition(base: Path, listed: str) -> str | None:
    """Joined, normalised, and below the root by commonpath; None if it leaves it or is it."""
    root, path = os.path.normpath(base), os.path.normpath(listed if listed.startswith("/") else f"{base}/{listed}")
    if path == root or os.path.commonpath([root, path]) != root:
        return None
    return path[len(root) :].lstrip("/")


pieces = st.sampled_from(["a", "b c", "ä", "..", ".", "", ".hidden", "...", "..a", "x.mp4", "x.", "日本", " ", "root"])
relative = st.lists(pieces, min_size=1, max_size=6).map("/".join)
listed_paths = (
    relative | relative.map("/data/root/".__add__) | relative.map("/data/".__add__) | relative.map("//".__add__)
)


@given(listed=listed_paths | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8))
@example("a/../b")
@example("./x")
@example("a//b")
@example("a/..")
@example("../root/x")
@example("../root2/x")
@example("/data/root/x")
@example("/data/root2/x")
def test_paths_are_taken_as_os_path_takes_them(listed: str) -> None:
    for base in (Path("/data/root"), Path("/data/other/../root")):
        expected = by_definition(base, listed)
        if expected is None:
            with pytest.raises(DatasetError, match="leaves .* say --root") as caught:
                inside(base, listed, FILE, 7)
            assert (caught.value.file, caught.value.line) == (FILE, 7)
        else:
            assert inside(base, listed, FILE, 7) == expected


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0", "\ud800"])
def test_what_cannot_be_the_name_of_a_file_is_refused(name: str) -> None:
    with pytest.raises(DatasetError, match=r"a.csv, line 3: "):
        plain_name(name, "id", FILE, 3)


@pytest.mark.parametrize("name", ["a b", "...", "-x", "ü.mp4", "#1 (HQ)"])
def test_odd_names_are_names(name: str) -> None:
    assert plain_name(name, "id", FILE, None) == name


@pytest.mark.parametrize("path", ["a/\0/b", "a/\udfff.mp4"])
def test_paths_that_no_file_can_have_are_refused(path: str) -> None:
    with pytest.raises(DatasetError, match="holds a character that no file name can"):
        inside(Path("/data"), path, FILE, 1)
