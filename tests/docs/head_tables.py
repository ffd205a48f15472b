"""The parts of docs/heads/*.md that the code makes. To write them anew, from the root:  python tests/docs/head_tables.py

A page has them between <!-- settings --> and <!-- end --> and between <!-- recipe --> and <!-- end -->.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from vcache.pipelines.head_listing import describe_head
from vcache.pipelines.matching import SETTABLE_FACTS

PAGES = Path(__file__).parents[2] / "docs" / "heads"
_BLOCK = re.compile(r"<!-- (settings|recipe|meanings) -->\n.*?<!-- end -->", re.S)


def word(value: Any) -> str:
    """A default as --set takes it: "-4,-3", "true", "blocks.*:0.1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return (
            ",".join(":".join(map(str, one)) if isinstance(one, tuple | list) else str(one) for one in value) or "none"
        )
    return str(value)


def settings_table(head: str) -> str:
    """Every field that --set takes."""
    rows = ["| setting | default | values | |", "| --- | --- | --- | --- |"]
    for name, field in describe_head(head)["fields"].items():
        if not field["from_store"] or name in SETTABLE_FACTS:
            default = "the store's" if field["from_store"] else f"`{word(field['default'])}`"
            values = field["type"].replace(" | ", ", ")
            rows.append(f"| `{name}` | {default} | {values} | {field['meaning'].replace('|', ', ')} |")
    return "\n".join(rows)


def recipe_block(head: str) -> str:
    """Every field of the recipe, what is off in a block of its own."""
    fields = describe_head(head)["recipe_fields"]
    told = {name: word(field["default"]) for name, field in fields.items()}
    off = [
        name
        for name, value in told.items()
        if value in ("None", "none", "0", "false") or (value == "0.0" and name != "warmup_start")
    ]
    on = textwrap.fill(
        ", ".join(f"{name}={told[name]}" for name in told if name not in off), 120, break_on_hyphens=False
    )
    rest = textwrap.fill("off: " + ", ".join(f"{name}={told[name]}" for name in off), 120, break_on_hyphens=False)
    return f"```\n{on}\n{rest}\n```"


def meanings_table() -> str:
    """What the fields of a recipe are; their defaults are each head's own."""
    rows = ["| field | values | |", "| --- | --- | --- |"]
    for name, field in describe_head("linear")["recipe_fields"].items():
        rows.append(f"| `{name}` | {field['type'].replace(' | ', ', ')} | {field['meaning']} |")
    return "\n".join(rows)


def with_tables(page: str, head: str) -> str:
    """The page with its generated parts as the code has them now."""
    made = {"settings": settings_table, "recipe": recipe_block, "meanings": lambda _: meanings_table()}
    return _BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{made[match[1]](head)}\n<!-- end -->", page)


def main() -> None:
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(with_tables(path.read_text(), path.stem))


if __name__ == "__main__":
    main()
