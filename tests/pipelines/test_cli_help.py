"""The help of every command: its examples are lines that the command takes, and typing errors are met with the right word."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vcache.pipelines.cli import app

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
Vcache = Callable[..., tuple[int, str, str]]


def examples() -> Iterator[str]:
    """Every line that a help text shows under Example or Examples."""
    for command in COMMANDS.values():
        _, _, shown = (command.help or "").partition("[bold]Example")
        yield from re.findall(r"vcache [^\n|]*[^\n| ]", shown)


def parsed(line: str) -> None:
    """Click reads the words as if the command were called, which it is not."""
    _, name, *words = shlex.split(line, comments=True)
    COMMANDS[name].make_context(name, words)


@pytest.mark.parametrize("line", list(examples()))
def test_every_example_is_a_line_that_the_command_takes(line: str) -> None:
    parsed(line)


@pytest.mark.parametrize("line", ["vcache eval", "vcache eval runs/evl-1 --veiws 3x1", "vcache compare a --seed one"])
def test_the_check_above_can_fail(line: str) -> None:
    with pytest.raises(Exception, match=r"Missing|No such option|valid integer"):
        parsed(line)


def test_every_command_has_an_example() -> None:
    assert {line.split()[1] for line in examples()} == set(COMMANDS)


@pytest.mark.parametrize("width", [80, 110])
def test_help_fits_the_terminal_and_names_its_arguments_in_capitals(width: int) -> None:
    for name in COMMANDS:
        lines = CliRunner(env={"COLUMNS": str(width)}).invoke(app, [name, "--help"]).output.splitlines()
        assert max(map(len, lines)) <= width
        usage = next(line for line in lines if "Usage:" in line)
        assert not re.search(r"\{[a-z]+\}", usage) and "......" not in usage, usage


@pytest.mark.parametrize(
    ("line", "meant"), [("evall", "'eval'"), ("trainhead", "'train-head'"), ("eval run --spilt val", "--split")]
)
def test_a_misspelt_command_or_option_is_answered_with_the_right_one(vcache: Vcache, line: str, meant: str) -> None:
    status, _, err = vcache(line)
    assert status == 2 and meant in err


def test_the_module_is_the_command() -> None:
    told = [sys.executable, "-m", "vcache.pipelines.cli", "heads", "--help"]
    shown = subprocess.run(told, capture_output=True, text=True, check=True).stdout
    assert "Usage: vcache heads" in shown
