"""Every command on every page exists, and takes the options and arguments that the page gives it."""

import pytest
import typer
from pages import PAGES, Command, commands, fenced, inline, languages
from typer.main import get_command

from vcache.pipelines.cli import app

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
SHOWN = [command for page in PAGES for command in commands(page) if command.vcache is not None]
OPTIONS = {
    option for command in COMMANDS.values() for item in command.params for option in item.opts + item.secondary_opts
}
# Of torchrun, dask's workers and pip.
OTHERS = {
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--memory-limit",
    "--nthreads",
    "--rmm-pool-size",
    "--nworkers",
    "--device",
}


def problem(command: Command) -> str | None:
    """What the parser of the command has against the line; values are not looked at."""
    name, *words = command.vcache or [""]
    if name.startswith("-"):
        return None if name in ("--help", "--version") else f"no option {name}"
    if name not in COMMANDS:
        return f"no command {name!r}"
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


def inline_problem(code: str) -> str | None:
    """What is wrong with a command or an option in a sentence; arguments may be left out, and stand for others in capitals."""
    first, *words = code.split()
    if first == "vcache" and words and words[0].islower():
        if (name := words[0]) not in COMMANDS and not name.startswith("-"):
            return f"no command {name!r}"
        known = {option for item in COMMANDS[name].params for option in item.opts} if name in COMMANDS else OPTIONS
        words = words[1:]
    elif first.startswith("--") and first.strip("-"):
        known, words = OPTIONS | OTHERS, [first, *words]
    else:
        return None
    unknown = [
        word for word in words if word.startswith("--") and word.split("=")[0] not in known | {"--help", "--version"}
    ]
    return f"no option {unknown}" if unknown else None


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_sentences_exist(page: str) -> None:
    problems = {code: inline_problem(code) for code in inline(page)}
    assert {code: text for code, text in problems.items() if text} == {}


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_where_none_is_looked_for(page: str) -> None:
    assert languages(page) <= {"", "python", "hex"}, (
        "commands are read from indented blocks, and after $ in fenced ones"
    )
    lost = [line for _, block in fenced(page, "") for line in block.splitlines() if line.startswith("vcache ")]
    assert lost == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("vcache predicts RUN", "no command 'predicts'"),
        ("vcache info A B --jsn", "--jsn"),
        ("--evaluation-views 3x1", "--evaluation-views"),
        ("vcache COMMAND --help", "None"),
        ("vcache heads HEAD --preset NAME", "None"),
    ],
)
def test_a_wrong_word_in_a_sentence_is_found(code: str, says: str) -> None:
    assert says in str(inline_problem(code))


def test_the_pages_show_every_command() -> None:
    shown = {(command.vcache or [""])[0] for command in SHOWN}
    assert set(COMMANDS) - shown == set()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vcache extact k400", "no command"),
        ("vcache PREDICT run", "no command"),
        ("vcache extract k400 --layer -4:", "--layer"),
        ("vcache eval", "lacks ['run']"),
        ("vcache eval runs/a runs/b", "takes no further"),
        ("torchrun --nproc-per-node 2 --no-python vcache train-head evl --epoch 3", "--epoch"),
    ],
)
def test_a_wrong_line_is_found(line: str, says: str) -> None:
    assert says in str(problem(Command("page.md", 1, line)))
