"""`vcache ...`: the commands in the order of the help, and what becomes of their errors.

A command builds a dataclass and calls one function. torch, zarr and everything that loads them are imported inside the command
that needs them, so that help is instant.
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import (
    cli_correlation,
    cli_demo,
    cli_extract,
    cli_heads,
    cli_predict,
    cli_report,
    cli_runs,
    cli_stores,
    cli_sweep,
    cli_upkeep,
    cli_zero_shot,
    console,
)
from vcache.pipelines.completion import offer_completions

# With OpenMP's default the idle threads of two torch pools spin against each other and against the decode threads:
# measured twice the CPU time for nothing. Has to be set before torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Features": {"extract": cli_extract.extract, "plan": cli_extract.plan, "datasets": cli_extract.datasets},
    "Heads": {
        "heads": cli_heads.heads,
        "train-head": cli_heads.train_head,
        "sweep": cli_sweep.sweep,
        "few-shot": cli_sweep.few_shot,
        "resume": cli_heads.resume,
        "import-head": cli_heads.import_head,
    },
    "Runs": {
        "eval": cli_runs.evaluate,
        "predict": cli_predict.predict,
        "export": cli_predict.export,
        "report": cli_report.report,
        "compare": cli_report.compare,
        "zero-shot": cli_zero_shot.zero_shot,
        "ensemble": cli_runs.ensemble,
        "explain": cli_runs.explain,
        "cka": cli_runs.cka,
        "correlation": cli_correlation.correlation,
    },
    "Stores": {
        "ls": cli_upkeep.list_stores,
        "info": cli_stores.info,
        "verify": cli_stores.verify,
        "repair": cli_stores.repair,
        "text": cli_stores.text,
        "rm": cli_upkeep.remove,
        "gc": cli_upkeep.collect,
    },
    "This machine": {"doctor": cli_upkeep.doctor, "demo": cli_demo.demo},
}
"""Panels of the help, and what each holds."""

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"vcache {version('vcache')}")
        raise typer.Exit
    return asked


@app.callback(no_args_is_help=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Extract frozen CLIP video features once, train video-recognition heads on them many times."""


def _flowing(text: str) -> str:
    """A docstring for any width: paragraphs without line breaks, each example on a line of its own."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("[bold]Example"):
            title, _, examples = paragraph.partition("  ")
            paragraph = "\n".join(["\b", title, *examples.split("  |  ")])
        elif not paragraph.startswith("\b"):
            paragraph = " ".join(paragraph.split())
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        offer_completions(_command)
        app.command(_name, help=_flowing(_command.__doc__ or ""), rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry point.

    Exit statuses of all commands:
        0    done
        1    a foreseen error in one message, or something was found wrong, failed or was left: `verify`, `sweep`
        2    the line itself: no such command or option, a value that it does not take
        130  stopped by Ctrl-C; 143 by SIGTERM. Nothing is lost, and the message says how to go on
    """
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere if _rank() else sys.stdout):
        _run()


def _run() -> None:
    try:
        app(prog_name="vcache")  # also of `python -m vcache.pipelines.cli`
    except KeyboardInterrupt:
        console.err.print("stopped")
        sys.exit(130)
    except Exception as error:
        if status := getattr(error, "exit_status", None):  # stopped as asked, and nothing is lost
            if not _rank():
                console.err.print(str(error), soft_wrap=True, markup=False, highlight=False)
            sys.exit(status)
        if os.environ.get("VCACHE_TRACEBACK"):
            raise
        console.fail(f"rank {_rank()}: {_message(error)}" if _rank() else _message(error))


def _rank() -> int:
    """Of this process among those that torchrun started. The first, as one alone, is 0: it says for all what is done."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if "LOCAL_RANK" in os.environ and rank.isdecimal() else 0


def _message(error: Exception) -> str:
    """Our own errors and the system's explain themselves; anything else is a bug of ours and says how to see it."""
    if type(error).__module__.startswith("vcache.") or isinstance(error, OSError):
        return str(error)
    return (
        f"{type(error).__name__}: {error}\n"
        "This is not an error vcache foresaw. Run again with VCACHE_TRACEBACK=1 to see where, and please report it."
    )


if __name__ == "__main__":
    main()
