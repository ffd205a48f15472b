"""What the pages of the documentation hold: blocks, the commands in them, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

REPO = Path(__file__).parents[2]
PAGES = tuple(
    path.relative_to(REPO).as_posix()
    for path in (REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), REPO / "pipelines" / "clusters.md")
)
"""All pages for users, from the root of the repository."""

_FENCE = re.compile(r"^```(\w*)[^\n`]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))?)+", re.MULTILINE)
# What may stand before `vcache` on its line.
_LAUNCHERS = ("torchrun", "srun")
_SHELL_WORDS = {"&", "&&", "|", ";", ">", "2>&1"}


@dataclass(frozen=True)
class Command:
    """One line of a shell: where it stands, its text without continuation and comment, and the output shown below it."""

    page: str
    line: int
    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """As the shell splits them."""
        return shlex.split(self.text)

    @property
    def vcache(self) -> list[str] | None:
        """The words after `vcache`, as far as they are its own; None for other programs."""
        words = self.words
        if "vcache" not in words:
            return None
        start = words.index("vcache")
        before = [word for word in words[:start] if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if before and before[0] not in _LAUNCHERS:
            return None
        rest = words[start + 1 :]
        end = next((index for index, word in enumerate(rest) if word in _SHELL_WORDS), len(rest))
        return rest[:end]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def text_of(page: str) -> str:
    """The page as it is written."""
    return (REPO / page).read_text()


def fenced(page: str, language: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks of one language; "" for those without any."""
    text = text_of(page)
    return [(_line(text, match.start(2)), match[2]) for match in _FENCE.finditer(text) if match[1] == language]


def languages(page: str) -> set[str]:
    """Of all fenced blocks; "" for those without any."""
    return {match[1] for match in _FENCE.finditer(text_of(page))}


def inline(page: str) -> list[str]:
    """Code within sentences and tables, as `vcache info A B`; a line break in it is a space."""
    text = re.sub(r"(?m)^    .*$", "", _FENCE.sub("", text_of(page)))
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]


def commands(page: str) -> list[Command]:
    """All lines of a shell, in the order of the page: of indented blocks every line, of fenced ones those after "$ "."""
    text = text_of(page)
    found = [command for line, block in fenced(page, "") for command in _of_session(page, line, block)]
    # Blanked, so that line numbers stay.
    unfenced = _FENCE.sub(lambda match: re.sub(r"[^\n]", "", match[0]), text)
    for match in _INDENTED.finditer(unfenced):
        if not _is_list(unfenced, match.start()):
            found += _of_lines(page, _line(unfenced, match.start()), re.sub(r"^    ", "", match[0], flags=re.MULTILINE))
    return sorted(found, key=lambda command: command.line)


def links(page: str) -> list[str]:
    """Targets of all links and pictures, without those of code."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text_of(page)))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#{1,6} (.*)$", _FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _of_session(page: str, start: int, block: str) -> Iterator[Command]:
    lines = block.splitlines()
    prompts = [index for index, line in enumerate(lines) if line.startswith("$ ")]
    for here, following in pairwise([*prompts, len(lines)]):
        end = here
        while lines[end].endswith("\\"):
            end += 1
        text = "\n".join(lines[here : end + 1])[2:]
        output = "\n".join(lines[end + 1 : following])
        yield Command(page, start + here, _plain(text), output)


def _of_lines(page: str, start: int, block: str) -> Iterator[Command]:
    joined = re.sub(r"\\\n\s*", lambda match: " " + "\0" * match[0].count("\n"), block)
    line = start
    for text in joined.splitlines():
        if plain := _plain(text.replace("\0", "")):
            yield Command(page, line, plain)
        line += 1 + text.count("\0")


def _plain(text: str) -> str:
    """Without continuation and comment."""
    text = re.sub(r"\\\n\s*", "", text)
    return re.sub(r"(?:^|\s+)#.*$", "", text).strip()


def _is_list(text: str, position: int) -> bool:
    """Whether indented text goes on with an item of a list."""
    before = text[:position].rstrip("\n").rsplit("\n", 1)[-1]
    return bool(re.match(r"\s*(?:[-*]|\d+\.) ", before))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
