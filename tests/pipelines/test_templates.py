"""Names of classes as words, and sets of templates from a file."""

from pathlib import Path

import pytest

from vcache.pipelines.templates import TEMPLATE_SETS, TemplateError, TemplateSet, class_words, template_set


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ('"celebrating" a goal', "celebrating a goal"),  # Kinetics, as DiST's list has it
        ("brush_hair", "brush hair"),  # HMDB-51
        ("ApplyEyeMakeup", "Apply Eye Makeup"),  # UCF101
        ("YoYo", "Yo Yo"),
        ("Pushing something from left to right", "Pushing something from left to right"),  # Something-Something V2
        ("TV", "TV"),
        ("Archery", "Archery"),
        ("  spaced\tout ", "spaced out"),
        ("_", "_"),  # nothing would be left
    ],
)
def test_class_names_become_words(name: str, words: str) -> None:
    assert class_words(name) == words


def test_the_label_alone_is_a_set() -> None:
    assert template_set("label") == TEMPLATE_SETS["label"] == TemplateSet("label", ("{}",))
    assert template_set("label").fill("a {} b") == ("a {} b",)


def test_sets_have_as_many_templates_as_their_sources() -> None:
    sizes = {"label": 1, "text4vis": 1, "actionclip": 16, "clip_kinetics": 28}
    assert {name: len(one.templates) for name, one in TEMPLATE_SETS.items()} == sizes
    assert all(len(set(one.templates)) == sizes[name] for name, one in TEMPLATE_SETS.items())
    assert all(template.count("{}") == 1 for one in TEMPLATE_SETS.values() for template in one.templates)


def test_a_file_gives_a_set_called_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my_2.txt").write_text("\ufeffa video of {}.\r\n\n  {}, {0} and {name}  \n", encoding="utf-8")
    one = template_set(str(tmp_path / "my_2.txt"))
    assert one == TemplateSet("my_2", ("a video of {}.", "{}, {0} and {name}"))
    assert one.fill("jump") == ("a video of jump.", "jump, {0} and {name}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", r"a\.txt gives no templates: it is empty\. Write one a line, as: a video of \{\}\.$"),
        ("a.txt", b"a {}\n\nno slot\n", r"a\.txt, line 3: a template has \{\} where the name of the class goes\.$"),
        ("a.txt", b"\xff{}", r"a\.txt gives no templates: it is not UTF-8\.$"),
        ("my-words.txt", b"{}", r"'my-words' cannot be the name of an array\. Rename the file"),
        ("c.txt", b"{}", "'c' cannot be the name of an array"),
        ("logit_scale.txt", b"{}", "'logit_scale' cannot be the name of an array"),
        ("label.txt", b"a {}", r"'label' is a set of vcache's own\. Give the file another name\.$"),
    ],
)
def test_what_gives_no_templates_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TemplateError, match=words):
        template_set(str(tmp_path / name))


def test_an_unknown_name_lists_the_sets(tmp_path: Path) -> None:
    there_are = ", ".join(TEMPLATE_SETS)
    with pytest.raises(
        TemplateError, match=rf"--templates labels: neither a file nor a set of templates; .*: {there_are}\.$"
    ):
        template_set("labels")
    with pytest.raises(TemplateError, match="cannot be read: is a directory"):
        template_set(str(tmp_path))
