"""HTML as Python calls: tag("td", name, class_="num"). Text is escaped, unless it is markup already."""

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = frozenset({"br", "col", "hr", "img", "link", "meta"})


class Markup(str):
    """Text that is HTML already."""


Content = str | int | None | Iterable[Any]
"""Plain text, markup, a number, nothing, or contents one after the other."""


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """An element. Underscores of attributes stand for hyphens, one at the end is left out (`class_`); True is one without a
    value, False and None leave it out."""
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    if name in _VOID:
        return Markup(opened)
    return Markup(f"{opened}{join(content)}</{name}>")


def join(content: Content) -> Markup:
    """The contents one after the other."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int):
        return Markup(escape(str(content), quote=False))
    return Markup("".join(map(join, content)))


def _attribute(name: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
