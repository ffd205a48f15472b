"""Every command on every page exists, and takes the options and arguments that the page gives it."""

import pytest
import typer
from pages import PAGES, Command, commands
from typer.main import get_command

from vcache.pipelines.cli import app

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
SHOWN = [command for page in PAGES for command in commands(page) if command.vcache is not None]


def problem(command: Command) -> str | None:
    """What the parser of the command has against the line; values are not looked at."""
    name, *words = command.vcache or [""]
    if name.startswith("-"):
        return None if name in ("--help", "--version") else f"no option {name}"
    if name not in COMMANDS:
        return None if not name.islower() else f"no command {name!r}"
    if words == ["--help"]:
        return None
    parsed = COMMANDS[name]
    context = typer.Context(parsed, info_name=name)
    try:
        values, left, _ = parsed.make_parser(context).parse_args(words)
    except Exception as error:  # click's own, which typer carries under another name
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    if left:
        return f"takes no further {left}"
    missing = [item.name for item in parsed.params if item.required and not values.get(item.name)]
    return f"lacks {missing}" if missing else None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists_and_takes_what_it_is_given(page: str) -> None:
    problems = {str(command): problem(command) for command in SHOWN if command.page == page}
    assert {line: text for line, text in problems.items() if text} == {}


def test_the_pages_show_every_command() -> None:
    shown = {(command.vcache or [""])[0] for command in SHOWN}
    assert set(COMMANDS) - shown == set()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vcache extact k400", "no command"),
        ("vcache extract k400 --layer -4:", "--layer"),
        ("vcache eval", "lacks ['run']"),
        ("vcache eval runs/a runs/b", "takes no further"),
        ("torchrun --nproc-per-node 2 --no-python vcache train-head evl --epoch 3", "--epoch"),
    ],
)
def test_a_wrong_line_is_found(line: str, says: str) -> None:
    assert says in str(problem(Command("page.md", 1, line)))
