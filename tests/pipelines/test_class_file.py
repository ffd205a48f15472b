"""Class names from files of every form that the official repositories have them in."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.pipelines.class_file import ClassFileError, read_class_names

NAMES = ("air drumming", "massaging person's head", "skiing (not slalom)")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("k400_class_mappings.json", json.dumps(NAMES)),
        ("labels.json", json.dumps({"2": NAMES[2], "0": NAMES[0], "1": NAMES[1]})),
        ("labels.json", json.dumps({NAMES[1]: "1", NAMES[0]: "0", NAMES[2]: 2})),
        ("labels.csv", "id,name\n0,air drumming\n2,skiing (not slalom)\n1,massaging person's head\n"),
        ("labels.csv", "0,air drumming\n1,massaging person's head\n2,skiing (not slalom)"),
        ("classes.txt", "air drumming\nmassaging person's head \r\nskiing (not slalom)\n\n"),
        ("classes.txt", "\ufeffair drumming\nmassaging person's head\nskiing (not slalom)"),
    ],
)
def test_every_form_gives_the_names_by_index(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name, 3) == NAMES


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S"))), unique=True, min_size=1, max_size=9
    )
)
def test_json_and_csv_of_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    names = [name or "nameless" for name in names if name != "nameless"]
    folder = tmp_path_factory.mktemp("names")
    (folder / "a.json").write_text(json.dumps(dict(enumerate(names))))
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    (folder / "a.csv").write_text("".join(f"{index},{name}\n" for index, name in enumerate(quoted)), encoding="utf-8")
    for path in folder.iterdir():
        assert read_class_names(path, len(names)) == tuple(names)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "x\ny\n", "has 2 class names; the checkpoint has 3 classes"),
        ("a.txt", "x\ny\nx\n", "has 'x' twice"),
        ("a.txt", "x\n\nz\n", "has a class without a name"),
        ("a.json", '["x", "y"', "gives no class names: .* delimiter"),
        ("a.json", '[1, 2, 3]', "neither a list of names nor an object"),
        ("a.json", '{"0": "x", "1": "y", "3": "z"}', "its indices are not 0 to 2, each once"),
        ("a.json", '{"x": 0, "y": 1, "z": "last"}', "'last' is not the index of a name"),
        ("a.csv", "id,name\n1,x\n2,y\n3,z\n", "its indices are not 0 to 2, each once"),
        ("a.csv", "0,x\n1,y,z\n2,z\n", "'1,y,z' is not of the form index,name"),
        ("a.txt", b"\xff\xfe\x00", "gives no class names: 'utf-8' codec"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_name_each_class_once_is_refused(
    name: str, text: str | bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ClassFileError, match=words):
        read_class_names(path, 3)


def test_a_file_that_is_not_there_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(ClassFileError, match=r"--classes .*nosuch\.json cannot be read: no such file or directory\."):
        read_class_names(tmp_path / "nosuch.json", 3)
