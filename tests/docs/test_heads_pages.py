"""docs/heads: a page for each head, whose settings, defaults, presets and proofs are those of the code."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import head_tables
import pytest

from vcache.heads.registry import get_head, list_heads
from vcache.pipelines.head_presets import presets_of
from vcache.pipelines.matching import SETTABLE_FACTS, STORE_FACTS

REPO = Path(__file__).parents[2]
PAGES = REPO / "docs" / "heads"
HEADS = sorted(list_heads())


def page(head: str) -> str:
    return (PAGES / f"{head}.md").read_text()


def test_every_head_has_a_page_that_the_index_links() -> None:
    index = (PAGES / "README.md").read_text()
    assert HEADS and all(f"[`{head}`]({head}.md)" in index for head in HEADS)
    assert {path.stem for path in PAGES.glob("*.md")} == {*HEADS, "README", "other-tails"}


@pytest.mark.parametrize("head", [*HEADS, "README"])
def test_tables_are_what_the_code_says_now(head: str) -> None:
    assert head_tables.with_tables(page(head), head) == page(head), "run: python tests/docs/head_tables.py"
    assert head == "README" or re.findall(r"<!-- (\w+) -->", page(head)) == ["settings", "end", "recipe", "end"]


def read_back(text: str, default: Any) -> Any:
    """A default as the page writes it, read without the code that wrote it."""
    if isinstance(default, bool):
        return {"true": True, "false": False}[text]
    if isinstance(default, tuple):
        items = [] if text == "none" else text.split(",")
        pairs = [tuple(item.rsplit(":", 1)) if ":" in item else item for item in items]
        return tuple((name[0], float(name[1])) if isinstance(name, tuple) else name for name in pairs)
    return None if text == "None" else type(default)(text) if default is not None else text


def as_text(value: Any) -> Any:
    return (
        tuple(str(one) if not isinstance(one, tuple) else one for one in value) if isinstance(value, tuple) else value
    )


@pytest.mark.parametrize("head", HEADS)
def test_every_settable_field_is_there_with_its_default(head: str) -> None:
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*?) \|", page(head).split("## Settings")[1].split("<!-- end -->")[0], re.M)
    )
    fields = {field.name: field for field in dataclasses.fields(get_head(head).Config)}
    settable = {name for name in fields if name not in STORE_FACTS or name in SETTABLE_FACTS}
    assert rows.keys() - {"depth"} == settable
    for name in settable - set(STORE_FACTS):
        default = fields[name].default
        assert read_back(rows[name].strip("`"), default) == as_text(default), name


@pytest.mark.parametrize("head", HEADS)
def test_every_field_of_the_recipe_is_there_with_its_value(head: str) -> None:
    block = " ".join(page(head).split("<!-- recipe -->")[1].split("```")[1].split()).replace("off: ", ", ")
    told = dict(re.findall(r"(\w+)=(.*?)(?:, (?=\w+=)|, , |$| , )", block))
    recipe = dataclasses.asdict(get_head(head).recipe)
    assert told.keys() == recipe.keys()
    for name, value in recipe.items():
        assert read_back(told[name].strip(" ,"), value) == as_text(value), name


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_what_proves_a_number_is_there(path: Path) -> None:
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", path.read_text())
    for file, test in named:
        assert (REPO / file).exists(), file
        assert not test or re.search(rf"^def {test}\(", (REPO / file).read_text(), re.M), f"{file}::{test}"
    assert named or path.stem == "README"


@pytest.mark.parametrize("head", HEADS)
def test_presets_that_are_named_exist_and_are_counted(head: str) -> None:
    there, text = set(presets_of(head)), page(head)
    for name in re.findall(r"(?:--preset |`)((?:k400|k700|k300|ssv2|hmdb51|ucf101|diving48)-[\w-]+)", text):
        assert name in there, name
    for ending in re.findall(r"`\.\.\.(-[\w-]+)`", text):
        assert any(name.endswith(ending) for name in there), ending
    counted = re.search(r"(?:All|The) (\d+) presets", text)
    assert int(counted[1]) == len(there) if counted else not there
