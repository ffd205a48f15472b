"""Links between pages lead to files and headings that are there, and every page is reached from the README."""

from pathlib import PurePosixPath

import pytest
from pages import PAGES, REPO, anchors, links, text_of

LINKED_FROM = (*PAGES, "benchmarks/results.md", "benchmarks/scaling.md")


def resolved(page: str, link: str) -> tuple[str, str]:
    """Path from the root of the repository, and the anchor."""
    path, _, anchor = link.partition("#")
    if not path:
        return page, anchor
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / path).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts), anchor


def problem(page: str, link: str) -> str | None:
    """Why a link leads nowhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path, anchor = resolved(page, link)
    if not (REPO / path).exists():
        return f"no file {path}"
    if anchor and anchor not in anchors(path):
        return f"no heading {anchor!r} in {path}"
    return None


@pytest.mark.parametrize("page", LINKED_FROM)
def test_every_link_leads_somewhere(page: str) -> None:
    problems = {link: problem(page, link) for link in links(page)}
    assert {link: text for link, text in problems.items() if text} == {}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {resolved(page, link)[0] for page in new for link in links(page)} & set(PAGES) - reached
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("link", ["docs/no-such.md", "docs/code.md#no-such-heading", "#no-such-heading"])
def test_a_broken_link_is_found(link: str) -> None:
    assert problem("README.md", link)


def test_the_pages_are_short() -> None:
    long = {page: len(text_of(page).splitlines()) for page in PAGES if page != "docs/code.md"}
    assert {page: lines for page, lines in long.items() if lines > 300} == {}
