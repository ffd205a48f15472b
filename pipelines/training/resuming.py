"""How a training that was stopped is gone on with, by as many processes as began it."""

import shlex
from pathlib import Path

from vcache.pipelines.runs import RunError


def resume_command(run: Path, num_processes: int) -> str:
    """The line that goes on with a run, or with all below a folder; of several processes for one machine."""
    launcher = f"torchrun --nproc-per-node {num_processes} --no-python " if num_processes > 1 else ""
    return launcher + shlex.join(["vcache", "resume", str(run)])


def check_number_of_processes(path: Path, began: int, now: int) -> None:
    """Each process has its own share of a batch and draws the dropout of it: another number would train another head.

    Raises:
        RunError: the run or sweep at `path` was begun with another number than there is now.
    """
    if began != now:
        raise RunError(
            f"{path} was begun with {began} process{'es' * (began > 1)}, and now there {'are' if now > 1 else 'is'} {now}. "
            f"Go on with:  {resume_command(path, began)}"
        )
